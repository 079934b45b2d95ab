"""A step's whole state by torch.distributed.checkpoint: a run goes on bit for bit, whatever the step is made of."""

import copy
import warnings
from itertools import pairwise

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, MKOR, Communication, Hybrid

STEPS = 7
COMBINATIONS = {
    "MKOR": {},
    "everything": {"accumulate": 2, "clip_norm": 0.5, "ema": 0.9, "refresh_every": 2, "several": True},
    "no rule": {"rule": None, "ema": 0.9},
    "stale": {"rule": MKOR.published(), "stale": 1, "refresh_every": 2, "ema": 0.9},
    "kfac": {"rule": KFAC(derive_every=2), "clip_norm": 0.5},
    "hybrid": {"rule": Hybrid(MKOR(), window=2), "ema": 0.9},
    "bf16": {"dtype": torch.bfloat16, "ema": 0.9},
    "nothing to keep": {"rule": None, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    "schedule in a tensor": {"optimizer": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01))},
}


def build(rule=MKOR(), several=False, optimizer=None, dtype=torch.float32, **options):  # noqa: B008
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    params = [*model.parameters()]
    make = optimizer or (lambda p: torch.optim.AdamW(p, lr=0.01))
    optimizers = [torch.optim.Muon([params[0], params[2]]), make([params[1], params[3]])] if several else make(params)
    return mkor_fx.compile_step(model, mse_loss, optimizers, rule, backend="eager", **options)


def train(step, numbers, rank=0, size=1):
    dtype = next(step.model.parameters()).dtype
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)
        step(x.chunk(size)[rank], y.chunk(size)[rank])
    found = torch.utils._pytree.tree_leaves_with_path(step.state_dict(full=True))
    return {str(path): tensor.clone() for path, tensor in found if isinstance(tensor, torch.Tensor)}


def same(one, other):
    """Bit for bit; what is not known yet is NaN."""
    assert one.keys() == other.keys() and len(one) >= 5
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=0, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")


def strangers(step):
    """Weights that are not those of the checkpoint."""
    with torch.no_grad():
        for p in step.model.parameters():
            p.add_(1.0)
    return step


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "dcp") for name in COMBINATIONS if name not in ("kfac", "bf16")),
        ("hybrid", "torch.save"),
        *(pytest.param(n, "dcp", marks=pytest.mark.nightly) for n in ("kfac", "bf16")),
        *(pytest.param("everything", way, marks=pytest.mark.nightly) for way in ("torch.save", "dict")),
    ],
)
def test_a_run_goes_on_bit_for_bit(name, way, tmp_path):
    step, again = build(**COMBINATIONS[name]), strangers(build(**COMBINATIONS[name]))
    train(step, range(3))
    if way == "dcp":
        dcp.save(step.state_dict(), checkpoint_id=tmp_path)
    elif way == "torch.save":
        torch.save(step.state_dict(), tmp_path / "state.pt")
    saved = copy.deepcopy(step.state_dict())
    whole = train(step, range(3, STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way == "dcp":
            again.load_checkpoint(tmp_path)
        else:
            again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True) if way == "torch.save" else saved)
        resumed = train(again, range(3, STEPS))
    same(whole, resumed)


def on_a_rank(rank, size, folder, placement, first, *stops):
    """From the checkpoint of step ``first`` to each of the ``stops``, with a checkpoint there; what there is at the last."""
    options = {"placement": placement, "communication": Communication(padding=9.0), "ema": 0.9, "clip_norm": 0.5}
    step = build(**options) if first == 0 else strangers(build(**options))
    if first:
        step.load_checkpoint(folder / str(first))
    found = {}
    for start, stop in pairwise((first, *stops)):
        found = train(step, range(start, stop), rank, size)
        dcp.save(step.state_dict(), checkpoint_id=folder / str(stop))
    return found


@pytest.mark.parametrize("placement", ["owner", pytest.param("replicated", marks=pytest.mark.nightly)])
def test_ranks_go_on_bit_for_bit(placement, tmp_path):
    whole = processes.values(on_a_rank, 2, tmp_path, placement, 0, 3, 5)
    resumed = processes.values(on_a_rank, 2, tmp_path, placement, 3, 5)
    for one, other in zip(whole, resumed, strict=True):
        same(one, other)
    (alone,) = processes.values(on_a_rank, 1, tmp_path, placement, 5, 6)  # on another number of them
    assert alone.keys() == whole[0].keys()


def test_a_checkpoint_without_factors_starts_them_afresh(tmp_path):
    step = build()
    train(step, range(2))
    state = step.state_dict()
    del state["mkor"]
    dcp.save(state, checkpoint_id=tmp_path)
    again = build()
    with pytest.warns(UserWarning, match="the checkpoint has no factors: they start afresh"):
        again.load_checkpoint(tmp_path)
    assert again.mkor.step == 0 and all(map(torch.equal, again.model.parameters(), step.model.parameters()))


def test_another_models_is_refused_whole(tmp_path):
    dcp.save({"model": nn.Linear(2, 2).state_dict()}, checkpoint_id=tmp_path)
    step = build()
    before = train(step, range(1))
    with pytest.raises(ValueError, match=r"must be a dict with model, optimizer and mkor.*; this one has model"):
        step.load_checkpoint(tmp_path)
    same(before, train(step, ()))


@pytest.mark.parametrize("name", ["MKOR", "kfac", "hybrid"])
def test_factors_are_a_flat_dict_that_safetensors_takes(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    options = {**COMBINATIONS[name], "ema": None}
    step, again = build(**options), build(**options)
    train(step, range(3))
    safetensors.save_file(step.mkor.state_dict(), tmp_path / "factors.safetensors")
    again.mkor.load_state_dict(safetensors.load_file(tmp_path / "factors.safetensors"))
    again.model.load_state_dict(step.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    same(train(step, range(3, 5)), train(again, range(3, 5)))


# ---- what cannot be loaded, and what is left alone ------------------------------------------------------------------------


def broken(folder, how):
    """A checkpoint, and what has become of it."""
    step = build()
    train(step, range(1))
    if how == "a file":
        torch.save(step.state_dict(), folder / "state.pt")
        return folder / "state.pt"
    if how == "by names":
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(step.model, step.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        return folder
    dcp.save(step.state_dict(), checkpoint_id=folder)
    if how == "cut":
        for part in folder.glob("*.distcp"):
            part.write_bytes(part.read_bytes()[:50])
    if how == "no metadata":
        (folder / ".metadata").unlink()
    if how == "other metadata":
        (folder / ".metadata").write_bytes(b"none")
    return folder / "nowhere" if how == "no folder" else folder


@pytest.mark.parametrize("how", ["a file", "cut", "no metadata", "other metadata", "no folder", "by names"])
def test_what_cannot_be_read_is_said_and_changes_nothing(how, tmp_path):
    path, step = broken(tmp_path, how), build()
    before = train(step, range(1))
    said = "by parameter names .*set_state_dict" if how == "by names" else "is no folder that torch.distributed.checkpoint"
    with pytest.raises(ValueError, match=said):
        step.load_checkpoint(path)
    same(before, train(step, ()))


def test_it_may_be_an_entry_of_a_checkpoint(tmp_path):
    step, again = build(), build()
    before = train(step, range(2))
    dcp.save({"run": step.state_dict(), "epoch": 3}, checkpoint_id=tmp_path)
    again.load_checkpoint(tmp_path, "run")
    same(before, train(again, ()))
    with pytest.raises(ValueError, match=r"holds no 'app'; it has epoch, run"):
        again.load_checkpoint(tmp_path, "app")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda s: torch.optim.SGD(nn.Linear(6, 5).parameters(), lr=0.1).state_dict(), r"groups of \[2\] parameters, AdamW"),
        (lambda s: None, r"the state of AdamW must be a dict with state and param_groups"),
        (lambda s: [1], r"the state of AdamW must be a dict"),
        (lambda s: s["param_groups"][0].pop("betas") and s, r"its groups have no betas, which AdamW has"),
    ],
)
def test_another_optimizers_state_changes_nothing(state, message):
    step = build()
    saved = copy.deepcopy((train(step, range(1)), step.state_dict()))[1]
    before = train(step, range(1, 2))
    saved["optimizer"] = state(saved["optimizer"])
    with pytest.raises(ValueError, match=message):
        step.load_state_dict(saved)
    same(before, train(step, ()))


def test_what_is_loaded_stays_the_callers():
    step = build()
    train(step, range(2))
    best = copy.deepcopy(step.state_dict())
    found = []
    for _ in range(2):
        step.load_state_dict(best)
        found.append(train(step, range(2, 4)))
    same(*found)


def test_without_strict_a_weight_of_another_shape_is_left_out():
    step = build()
    train(step, range(2))
    saved = copy.deepcopy(step.state_dict())
    saved["model"]["2.weight"] = torch.ones(2, 2)
    kept = step.model[2].weight.detach().clone()
    train(step, range(2, 3))
    moved = step.model[2].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"of the loaded model 2\.weight is \[2, 2\], here \[3, 5\]: left out"):
        step.load_state_dict(saved, strict=False)
    assert torch.equal(step.model[2].weight, moved) and not torch.equal(moved, kept)
    assert torch.equal(step.model[0].weight, saved["model"]["0.weight"])
