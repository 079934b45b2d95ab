"""How often things compile: exactly as often as expected, and never for a number that changes."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import zoo
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import mkor_fx
from mkor_fx import MKOR
from mkor_fx.passes.write import traced_optimizer

SCHEDULERS = {
    "cosine": lambda o, n: lr_scheduler.CosineAnnealingLR(o, n),
    "one cycle": lambda o, n: lr_scheduler.OneCycleLR(o, 0.1, total_steps=n),
    "lambda": lambda o, n: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))


def loader(rows=44, batch=8):
    """Five whole batches and a partial one."""
    data = TensorDataset(torch.randn(rows, 6), torch.randint(0, 4, (rows,)))
    return DataLoader(data, batch_size=batch)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("refresh_every", "expected"), [(1, 2), (10, 3), (5, 4)])
def test_schedule_and_partial_batch(scheduler, optimizer, refresh_every, expected):
    """Two variants, each at most once more for the partial batch; with 10 every partial batch falls on reuse steps."""
    model, data, epochs = mlp(), loader(), 4
    options = {"momentum": 0.9, "nesterov": True} if optimizer is torch.optim.SGD else {}
    optimizer = optimizer(model.parameters(), lr=1e-2, **options)
    step = mkor_fx.compile_step(
        model, torch.nn.functional.cross_entropy, optimizer, backend="eager", refresh_every=refresh_every
    )
    schedule = SCHEDULERS[scheduler](optimizer, epochs * len(data))
    rates = set()
    for _ in range(epochs):
        for x, y in data:
            step(x, y)
            schedule.step()
            rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 5
    assert step.compilations == expected


def test_the_optimizer_is_traced_for_the_first_program_and_for_another_state(monkeypatch):
    traced, original = [], traced_optimizer.trace_update
    monkeypatch.setattr(
        traced_optimizer, "trace_update", lambda *given: traced.append(len(given[1])) or original(*given)
    )
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = list(loader())
    step = mkor_fx.compile_step(
        model, torch.nn.functional.cross_entropy, optimizer, rule=MKOR.published(), backend="eager", refresh_every=2
    )
    for batch in batches[:2]:
        step(*batch)
    assert step.compilations == 2 and traced == [4]
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].double()
    for batch in batches[-2:]:  # the last one is partial, and so compiled
        step(*batch)
    assert step.compilations == 3 and traced == [4, 4]


def test_the_trace_of_a_program_that_failed_is_not_that_of_other_branches(monkeypatch):
    def step_of(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, mkor_fx.compile_step(
            model, torch.nn.functional.cross_entropy, optimizer, rule=None, backend="eager"
        )

    model, (batch, *_) = mlp(), loader()
    expected = copy.deepcopy(model)
    optimizer, step = step_of(model)
    with monkeypatch.context() as patch:
        patch.setattr("mkor_fx.doors.whole_step.compile_graph", fail)
        with pytest.raises(Exception, match="no compiler"):
            step(*batch)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    step(*batch)
    other, plain = step_of(expected)
    other.param_groups[0]["weight_decay"] = 0.5
    plain(*batch)
    for found, right in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, right)


def fail(*given):
    raise RuntimeError("no compiler")


def test_dynamic_needs_no_second_compilation():
    model, data = mlp(), loader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(model, torch.nn.functional.cross_entropy, optimizer, backend="eager", dynamic=True)
    for x, y in data:
        step(x, y)
    assert step.compilations == 1


def test_drop_in_compiles_each_graph_and_each_update_once():
    model, data = mlp(), loader()
    compiled = mkor_fx.compile(model, backend="eager", refresh_every=2, rule=mkor_fx.MKOR.published())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=18)
    for _ in range(3):
        for x, y in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
            schedule.step()
    assert len(compiled.graphs.captured) == 2  # whole batches, and any size
    assert len(compiled.graphs.updates) == 2  # refresh and reuse, whatever the batch


def test_a_changed_structure_compiles_again_and_is_right():
    """Weight decay switched on, a group frozen out: numbers become branches, and the update follows."""
    model = mlp()
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    own, other = (torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0) for m in (model, twin))
    step = mkor_fx.compile_step(model, torch.nn.functional.cross_entropy, own, None, backend="eager")
    for number, (x, y) in enumerate(loader(32)):
        if number == 2:
            for optimizer in (own, other):
                optimizer.param_groups[0]["weight_decay"] = 0.3
        step(x, y)
        other.zero_grad()
        torch.nn.functional.cross_entropy(twin(x), y).backward()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    assert step.compilations == 2


def test_two_models_of_one_class_do_not_share_programs():
    steps = []
    for seed in (0, 1):
        model, loss_fn, batches = zoo.build("mlp", seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        steps.append((mkor_fx.compile_step(model, loss_fn, optimizer, backend="eager"), batches))
    for step, batches in steps * 2:
        step(*batches[0])
    assert [step.compilations for step, _ in steps] == [1, 1]


CHILD = """
import sys, torch, mkor_fx
from torch._dynamo.utils import counters
torch.manual_seed(0)
model, loss_fn = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)), torch.nn.MSELoss()
batches = [(torch.randn(8, 6), torch.randn(8, 4)) for _ in range(4)]
if sys.argv[1] == "step":
    step = mkor_fx.compile_step(model, loss_fn, torch.optim.AdamW(model.parameters(), lr=1e-3), refresh_every=2)
    mkor = step.mkor
else:
    compiled, optimizer = mkor_fx.compile(model, refresh_every=2), torch.optim.AdamW(model.parameters(), lr=1e-3)
    mkor = compiled.mkor
    def step(x, y):
        optimizer.zero_grad(); loss_fn(compiled(x), y).backward(); optimizer.step()
for x, y in batches:
    step(x, y)
torch.save({"mkor": mkor.state_dict(), "model": model.state_dict(),
            "miss": counters["inductor"]["fxgraph_cache_miss"], "hit": counters["inductor"]["fxgraph_cache_hit"],
            "bypass": counters["inductor"]["fxgraph_cache_bypass"]}, sys.argv[2])
"""


@pytest.mark.nightly
@pytest.mark.parametrize("door", ["step", "drop-in"])
def test_second_process_with_a_warm_cache_compiles_nothing(door, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    results = []
    for run in ("cold", "warm"):
        target = tmp_path / f"{run}.pt"
        subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD, door, str(target)], check=True, env=environment)
        results.append(torch.load(target, weights_only=True))
    cold, warm = results
    assert cold["miss"] > 0 and cold["bypass"] == 0
    assert warm["miss"] == 0 and warm["bypass"] == 0 and warm["hit"] == cold["miss"] + cold["hit"]
    for part in ("mkor", "model"):
        assert all(torch.equal(cold[part][key], warm[part][key]) for key in cold[part])


def test_no_host_read_in_the_compiled_step():
    """Nothing in the lowered program waits for a value, and Inductor compiles it whole."""
    model, loss_fn, batches = zoo.build("mlp")
    counters.clear()
    step = mkor_fx.compile_step(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), MKOR.published())
    step(*batches[0])
    names = step.graphs.op_counts("lower")
    assert not [name for name in names if "_local_scalar_dense" in name or "nonzero" in name]
    assert not counters["graph_break"]
