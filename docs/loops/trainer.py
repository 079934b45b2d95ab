"""transformers' Trainer: one line for the model, one callback for its checkpoints.

    python docs/loops/trainer.py

Uncompiled here, to take seconds; without `backend="eager"` Inductor compiles it, which takes a minute on a small CPU.
"""

import tempfile

from data import Sentences, furthest, small_bert
from transformers import Trainer, TrainingArguments

import mkor_fx
from mkor_fx.integrations.transformers import MKORTrainerCallback


def train(folder, backend, resume=None, **options):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=8, save_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
        disable_tqdm=True, logging_steps=4, use_cpu=True, **options,
    )  # fmt: skip
    model = mkor_fx.compile(small_bert(), backend=backend)
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=[MKORTrainerCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return model


def main(backend="eager", **options):
    with tempfile.TemporaryDirectory() as folder:
        whole = train(folder, backend, **options)
        resumed = train(folder, backend, resume=f"{folder}/checkpoint-4", **options)
    print(f"{whole.mkor}; resumed at step 4, parameters differ by {furthest(whole, resumed):g}")
    return whole, resumed


if __name__ == "__main__":
    main()
