"""The loops of docs/loops.md, by its scripts, with the libraries that they are of."""

import importlib
import sys
from pathlib import Path

import processes
import pytest
import torch

import mkor_fx
from mkor_fx import MKOR

SCRIPTS = Path(__file__).parents[1] / "docs" / "loops"


def script(name):
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return importlib.import_module(name)


def alike(pair, steps):
    whole, resumed = pair
    assert whole.mkor.step == resumed.mkor.step == steps
    one, other = whole.mkor.state_dict(), resumed.mkor.state_dict()
    assert len(one) > 8 and all(torch.equal(one[key], other[key]) for key in one)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.nightly
def test_trainer_in_half_precision_and_micro_batches():
    alike(script("trainer").main(bf16=True, gradient_accumulation_steps=2), 8)


def test_trainer(tmp_path, recwarn):
    from safetensors.torch import load_file

    from mkor_fx.integrations.transformers import FILE

    trainer, folder = script("trainer"), tmp_path / "checkpoint-4"
    whole = trainer.train(tmp_path, "eager")
    alike((whole, trainer.train(tmp_path, "eager", resume=str(folder))), 8)
    assert not [one for one in recwarn if "mkor_fx" in str(one.message)]
    assert set(load_file(folder / "model.safetensors")) == set(script("data").small_bert().state_dict())
    assert torch.load(folder / FILE, weights_only=True)["step"] == 4
    (folder / FILE).unlink()
    assert trainer.train(tmp_path, "eager", resume=str(folder)).mkor.step == 4
    said = [str(one.message) for one in recwarn if "mkor_fx" in str(one.message)]
    assert "goes on from step 4, and there is no mkor_fx.pt in" in said[0]


def test_trainer_of_a_plain_model():
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from mkor_fx.integrations.transformers import MKORTrainerCallback

    given = TrainingArguments(report_to=[], use_cpu=True), TrainerState(), TrainerControl()
    with pytest.raises(ValueError, match=r"Linear is not compiled: pass Trainer\(model=mkor_fx\.compile\(model\), \.\.\.\)"):
        MKORTrainerCallback().on_train_begin(*given, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("options", [{}, pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.nightly)])
def test_accelerate(options):
    alike(script("accelerate_loop").main(**options), 4)


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(o, marks=pytest.mark.nightly) for o in ({"manual": True}, {"precision": "bf16-mixed"}))],
)
def test_lightning(options):
    alike(script("lightning_loop").main(**options), 16 if options.get("manual") else 8)


def test_a_lightning_module_without_a_compiled_part_is_refused():
    from lightning.pytorch import LightningModule, Trainer

    from mkor_fx.integrations.lightning import MKORLightningCallback

    module = LightningModule()
    with pytest.raises(ValueError, match=r"nothing inside of LightningModule is compiled.*self\.net = mkor_fx\.compile"):
        MKORLightningCallback().setup(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module, "fit")


def test_lora():
    model, saved, moved = script("lora").main()
    entries = {entry.name for entry in model.coverage.covered}
    assert len(entries) == 5 and sum("lora_" in name for name in entries) == 4
    assert len(saved) >= 4 and not any("_orig_mod" in key for key in saved) and moved < 1e-6


def on_two_ranks(rank, size):
    return script("fsdp2").main()


@pytest.mark.nightly
def test_fsdp2():
    for losses, steps in processes.values(on_two_ranks, 2):
        assert steps == 10 and losses[-1] < 0.7 * losses[0]


# ---- what they do to a model ----------------------------------------------------------------------------------------------


def test_a_forward_around_the_models_goes_around_the_compiled_call():
    """As accelerate sets it for mixed precision, and takes it away again."""
    torch.manual_seed(0)
    model = mkor_fx.compile(torch.nn.Linear(4, 3), MKOR(), backend="eager")
    optimizer, original = torch.optim.AdamW(model.parameters(), lr=0.01), model.forward
    wrapped = torch.autocast("cpu", dtype=torch.bfloat16)(original.__func__)
    seen = []

    def around(self, *args):
        seen.append(type(self).__name__)
        return wrapped(self, *args).float()

    around.__wrapped__ = wrapped
    model.forward = around.__get__(model)
    for _ in range(2):
        out = model(torch.randn(5, 4))
        out.square().mean().backward()
        optimizer.step()
    assert seen == ["Linear"] * 2 and model.mkor.step == 2 and out.dtype == torch.float32
    assert "forward" not in model.__dict__
    for back in (original, torch.nn.Linear.forward.__get__(model)):
        model.forward = around.__get__(model)
        model.forward = back
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert len(seen) == 2 and model.mkor.step == 4

    hidden = lambda *args: 2 * original(*args)
    model.forward = hidden
    assert torch.equal(model(torch.ones(1, 4)), 2 * original(torch.ones(1, 4))) and model.forward is hidden
