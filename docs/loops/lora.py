"""peft: adapters are weights like others, each with its factors; merging and saving are as before.

    python docs/loops/lora.py

Uncompiled here, to take seconds; without `backend="eager"` Inductor compiles it, which takes a minute on a small CPU.
"""

import tempfile
from pathlib import Path

import torch
from data import Sentences, small_bert
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import mkor_fx


def main(backend="eager"):
    adapted = get_peft_model(small_bert(), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    model = mkor_fx.compile(adapted, backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in DataLoader(Sentences(), batch_size=8):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    print(model.coverage)
    example = Sentences()[:4]["input_ids"]
    model.eval()
    with torch.no_grad():
        before = model(input_ids=example).logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = load_file(Path(folder) / "adapter_model.safetensors")
        after = model.merge_and_unload()(input_ids=example).logits
    moved = float((before - after).abs().max())
    print(f"{len(saved)} tensors of adapters saved, such as {next(iter(saved))}; merged, the outputs differ by {moved:g}")
    return model, saved, moved


if __name__ == "__main__":
    main()
