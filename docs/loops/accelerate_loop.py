"""accelerate: prepare, accumulate, clip, save and load. The factors are registered with its checkpoints.

    python docs/loops/accelerate_loop.py

Uncompiled here, to take seconds; without `backend="eager"` Inductor compiles it, which takes a minute on a small CPU.
"""

import itertools
import tempfile

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from data import Sentences, furthest, small_bert
from torch.utils.data import DataLoader

import mkor_fx

STEPS, MICRO_BATCHES = 4, 2


def train(folder, backend, resume=False, mixed_precision="no"):
    AcceleratorState._reset_state(True)  # two runs in one process
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES, mixed_precision=mixed_precision)
    model = mkor_fx.compile(small_bert(), backend=backend)
    accelerator.register_for_checkpointing(model.mkor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Sentences(), batch_size=8))
    if resume:
        accelerator.load_state(f"{folder}/state")
    factors = accelerator.unwrap_model(model).mkor
    for batch in itertools.islice(loader, factors.step * MICRO_BATCHES, STEPS * MICRO_BATCHES):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and factors.step == STEPS // 2 and not resume:
            accelerator.save_state(f"{folder}/state")
    return accelerator.unwrap_model(model)


def main(backend="eager", **options):
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = train(folder, backend, **options), train(folder, backend, resume=True, **options)
    print(f"{whole.mkor}; resumed at step {STEPS // 2}, parameters differ by {furthest(whole, resumed):g}")
    return whole, resumed


if __name__ == "__main__":
    main()
