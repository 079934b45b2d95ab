"""torch.distributed.checkpoint: what two ranks have saved one loads, and four what one has saved; the run goes on."""

import processes
import pytest
import test_distributed as whole
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import mkor_fx

PUBLISHED = mkor_fx.MKOR.published()

ROWS, STEPS = 8, 9


def prepare():
    model, loss_fn, batches = whole.batches_of("mlp", ROWS, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(model, loss_fn, optimizer, PUBLISHED, refresh_every=2, backend="eager")
    return model, optimizer, batches, step


def resume(rank, size, first, last, load, save):
    """Steps first .. last-1 on `size` ranks, from the checkpoint `load` and into `save` where these are given."""
    model, optimizer, batches, step = prepare()
    if load:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(parts, checkpoint_id=load)
        states = {"model_state_dict": parts["model"], "optim_state_dict": parts["optimizer"]}
        set_state_dict(model, optimizer, **states)
        step.mkor.load_checkpoint(load)
        assert step.mkor.step == first
    for batch in batches[first:last]:
        step(*whole.share(batch, whole.even(ROWS, size), rank))
    if save:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save({**parts, "mkor": step.mkor.state_dict()}, checkpoint_id=save)
    return whole.everything(model, optimizer, step)


def test_two_to_one_to_four(tmp_path):
    straight = resume(0, 1, 0, STEPS, None, None)
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    processes.values(resume, 2, 0, 3, None, two)
    (single,) = processes.values(resume, 1, 3, 6, two, one)
    last = processes.values(resume, 4, 6, STEPS, one, None)
    whole.assert_bitwise(last)
    whole.assert_close(last[0], straight, 1e-5)
    assert any((last[0][key] - single[key]).abs().max() > 1e-3 for key in last[0] if key.endswith(".R"))


def test_a_checkpoint_without_factors(tmp_path):
    checkpoint.save({"model": nn.Linear(2, 2).state_dict()}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"holds no 'mkor'; it has model"):
        prepare()[-1].mkor.load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model(tmp_path):
    state = {"other.weight.L": torch.eye(2), "step": torch.tensor(3)}
    checkpoint.save({"mkor": state}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"another model's: other\.weight\.L"):
        prepare()[-1].mkor.load_checkpoint(tmp_path)
