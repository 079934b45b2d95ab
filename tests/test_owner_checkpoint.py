"""Factors saved by any number of ranks are loaded by any other, in either placement, and training goes on alike."""

import io

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_distributed import assert_bitwise, assert_close, batches_of, even, everything, share

import mkor_fx
from mkor_fx import Communication

STEPS = 6


def new_step(placement, **options):
    model, loss_fn, batches = batches_of("mlp", 8, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"communication": Communication(padding=9.0), "refresh_every": 2, "backend": "eager", **options}
    options = {"rule": mkor_fx.MKOR.published(), **options}
    return mkor_fx.compile_step(model, loss_fn, optimizer, placement=placement, **options), batches


def go_on(rank, size, placement, options, first, last, folder):
    """Steps `first` to `last` from the checkpoint of step `first`; saves that of step `last`."""
    step, batches = new_step(placement, **options)
    if first:
        plain = torch.load(f"{folder}/{first}.pt", weights_only=True)
        step.model.load_state_dict(plain["model"])
        step.optimizer.load_state_dict(plain["optimizer"])
        step.mkor.load_checkpoint(f"{folder}/{first}")
    for batch in batches[first:last]:
        step(*share(batch, even(8, size), rank))
    dcp.save({"mkor": step.mkor.state_dict()}, checkpoint_id=f"{folder}/{last}")
    if rank == 0:
        plain = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict()}
        torch.save(plain, f"{folder}/{last}.pt")
    own = step.mkor.tensors()
    for tensor in own.values():
        tensor.zero_()
    step.mkor.load_checkpoint(f"{folder}/{last}")  # behind the first step: each rank its own
    full = step.mkor.state_dict(full=True)
    return everything(step.model, step.optimizer, step) | {f"factor {k}": t for k, t in full.items()}, set(own)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"stale": 1}, marks=pytest.mark.nightly)], ids=["prompt", "stale"]
)
def test_two_then_one_then_four_processes(tmp_path, options):
    step, batches = new_step("replicated", **options)
    for batch in batches:
        step(*batch)
    whole = everything(step.model, step.optimizer, step)
    processes.values(go_on, 2, "owner", options, 0, 1, tmp_path)
    processes.values(go_on, 1, "replicated", options, 1, 3, tmp_path)
    parts = processes.values(go_on, 4, "owner", options, 3, STEPS, tmp_path)
    assert_bitwise([state for state, _ in parts])
    assert_close(parts[0][0], whole, 1e-5)
    keys = [key for _, own in parts for key in own]
    assert len(keys) == len(set(keys)) == len([key for key in whole if key.endswith((".L", ".R"))])


def through_torch_save(rank, size):
    step, batches = new_step("owner")
    for batch in batches[:3]:
        step(*share(batch, even(8, size), rank))
    buffer = io.BytesIO()
    full = step.mkor.state_dict(full=True)
    torch.save(full, buffer)
    buffer.seek(0)
    for tensor in step.mkor.tensors().values():
        tensor.zero_()
    step.mkor.load_state_dict(torch.load(buffer, weights_only=True))
    assert_bitwise([step.mkor.state_dict(full=True), full])
    part = step.mkor.state_dict()
    step.mkor.load_state_dict(part)  # its own part is enough
    other, _ = new_step("owner")
    other.mkor.load_state_dict(full)
    other(*share(batches[3], even(8, size), rank))
    kept = {key.rpartition(".")[0] for key in other.mkor.state_dict()} - {""}
    assert kept == {name for name, owner in other.mkor.owners.items() if owner == rank}
    complaints = []
    for target in (step, new_step("replicated")[0]):
        try:
            target.mkor.load_state_dict({key: t for key, t in part.items() if not key.endswith(".R")})
            target(*share(batches[3], even(8, size), rank))
        except Exception as error:
            complaints.append(str(error))
    return full, complaints


def test_a_full_state_through_torch_save():
    ranks = processes.values(through_torch_save, 2)
    assert_bitwise([full for full, _ in ranks])
    for _, complaints in ranks:
        assert len(complaints) == 2 and "missing" in complaints[0]
        assert any("missing" in complaint or "failed first" in complaint for complaint in complaints[1:])
