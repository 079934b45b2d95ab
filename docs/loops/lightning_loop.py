"""Lightning: compile what the training step calls; a callback puts the factors into the checkpoints.

    python docs/loops/lightning_loop.py

Uncompiled here, to take seconds; without `backend="eager"` Inductor compiles it, which takes a minute on a small CPU.
"""

import tempfile
import warnings

import torch
from data import Sentences, furthest, small_bert
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

import mkor_fx
from mkor_fx.integrations.lightning import MKORLightningCallback


class Classifier(LightningModule):
    def __init__(self, backend, manual=False):
        super().__init__()
        self.bert = mkor_fx.compile(small_bert(), backend=backend)
        self.automatic_optimization = not manual

    def training_step(self, batch, index):
        loss = self.bert(**batch).loss
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(backend, epochs, path=None, manual=False, **options):
    module = Classifier(backend, manual)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[MKORLightningCallback()], **quiet, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, DataLoader(Sentences(), batch_size=8), ckpt_path=path)
    return trainer, module.bert


def main(backend="eager", **options):
    if not options.get("manual"):
        options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, **options}
    whole = train(backend, 2, **options)[1]
    with tempfile.TemporaryDirectory() as folder:
        train(backend, 1, **options)[0].save_checkpoint(f"{folder}/half.ckpt")
        resumed = train(backend, 2, f"{folder}/half.ckpt", **options)[1]
    print(f"{whole.mkor}; resumed after an epoch, parameters differ by {furthest(whole, resumed):g}")
    return whole, resumed


if __name__ == "__main__":
    main()
