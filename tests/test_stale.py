"""Statistics one step late: the same on all ranks, the same as a reference that refreshes one step late."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import reference
import torch
from test_distributed import assert_bitwise, assert_close, batches_of, even, everything, share
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR, Communication
from mkor_fx.passes.order.collectives import describe, is_start, is_wait

PUBLISHED = mkor_fx.MKOR.published()


class LateReference(reference.Reference):
    """Refreshes from the rows of the step before."""

    def step(self):
        self.rows, self.rows_before = vars(self).get("rows_before", {}), self.rows
        self.steps -= 1
        super().step()
        self.steps += 1


RULE = MKOR.published()


def new_step(model, loss_fn, rule=RULE, refresh_every=1, backend="eager", **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return mkor_fx.compile_step(
        model, loss_fn, optimizer, rule, refresh_every=refresh_every, backend=backend, stale=1, **options
    )


def run(rank, size, name, steps, looks=(), **options):
    model, loss_fn, batches = batches_of(name, 8, steps)
    step = new_step(model, loss_fn, **options)
    states = []
    for i, batch in enumerate(batches):
        step(*share(batch, even(8, size), rank))
        if i in looks:
            states.append(step.mkor.state_dict())
    return everything(model, step.optimizer, step), states


def expected(name, steps, refresh_every):
    """Parameters and factors of the reference, before what its last step would have sent."""
    model, loss_fn, batches = batches_of(name, 8, steps)
    options = dataclasses.asdict(RULE) | {"epsilon": float("inf"), "zeta": 0.0, "refresh_every": refresh_every}
    for name in ("rank", "momentum", "nesterov", "beta2", "product_dtype"):
        del options[name]
    late = LateReference(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **options)
    for x, y in batches:
        loss_fn(model(x), y).backward()
        late.step()
    return model.state_dict(), late.state


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("name", ["mlp", pytest.param("gpt", marks=pytest.mark.nightly)])
def test_one_process_is_the_reference(name, refresh_every):
    steps = 6
    weights, factors = expected(name, steps, refresh_every)
    state, _ = run(0, 1, name, steps, refresh_every=refresh_every)
    assert_close({key: state[key] for key in weights}, weights, 1e-4)
    if refresh_every == 3:  # nothing is on its way behind step 5
        assert_close({key: state[f"factor {key}"] for key in factors}, factors, 1e-4)


def test_a_looked_at_state_is_what_the_next_step_refreshes_to():
    """Behind step n the factors hold n statistics: those of a synchronous run over the same parameters."""
    model, loss_fn, (batch, *_) = batches_of("mlp", 8, 1)
    twin, _, _ = batches_of("mlp", 8, 0)
    late = new_step(model, loss_fn)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    prompt = mkor_fx.compile_step(twin, loss_fn, optimizer, PUBLISHED, backend="eager")
    late(*batch)
    prompt(*batch)
    first, second = late.mkor.state_dict(), late.mkor.state_dict()
    assert_close(first, prompt.mkor.state_dict(), 1e-6)
    assert_bitwise([first, second])
    assert all(torch.equal(t, torch.eye(len(t))) for t in late.mkor.tensors().values())  # looking changes nothing
    late(*batch)
    live = late.mkor.tensors()
    assert_close({key: live[key] for key in live}, {key: first[key] for key in live}, 1e-6)


def look_on_one(rank, size, options):
    return run(rank, size, "mlp", 6, [2, 4] if rank == 0 else [5], **options)[0]


PLACES = {"replicated": {}, "every 2": {"refresh_every": 2},
          "owner": {"placement": "owner", "communication": Communication(padding=9.0)}}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_ranks_are_one_process(place):
    whole, _ = run(0, 1, "mlp", 6, **{"refresh_every": PLACES[place].get("refresh_every", 1)})
    parts = processes.values(look_on_one, 2, PLACES[place])
    weights = [{key: t for key, t in part.items() if not key.startswith("factor")} for part in parts]
    assert_bitwise(weights)
    together = parts[0] | parts[1]
    if place != "owner":
        assert_bitwise(parts)
    assert_close(together, whole, 1e-5)


def compiled(rank, size):
    return run(rank, size, "mlp", 4, rule=MKOR.published(max_factor=14, bias="off"), backend="inductor")[0]


@pytest.mark.nightly
def test_compiled_ranks_are_one_process():
    whole, _ = run(0, 1, "mlp", 4, rule=MKOR.published(max_factor=14, bias="off"))
    parts = processes.values(compiled, 2)
    assert_bitwise(parts)
    assert_close(parts[0], whole, 1e-5)


def resume(rank, size, stop):
    model, loss_fn, batches = batches_of("mlp", 8, 6)
    step = new_step(model, loss_fn, refresh_every=2)
    for batch in batches[:stop]:
        step(*share(batch, even(8, size), rank))
    saved = copy.deepcopy((model.state_dict(), step.optimizer.state_dict(), step.mkor.state_dict()))
    other, _, _ = batches_of("mlp", 8, 0)
    resumed = new_step(other, loss_fn, refresh_every=2)
    for target, state in zip((other, resumed.optimizer, resumed.mkor), saved, strict=True):
        target.load_state_dict(state)
    for batch in batches[stop:]:
        for one in (step, resumed):
            one(*share(batch, even(8, size), rank))
    return everything(model, step.optimizer, step), everything(other, resumed.optimizer, resumed)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_goes_on_alike(stop):
    for straight, resumed in processes.values(resume, 2, stop):
        assert_close(resumed, straight, 1e-6)


def test_loaded_factors_are_not_refreshed_from_what_was_on_its_way():
    model, loss_fn, batches = batches_of("mlp", 8, 2)
    step = new_step(model, loss_fn)
    step(*batches[0])
    loaded = {key: t * 0.5 if key != "step" else t for key, t in step.mkor.state_dict().items()}
    step.mkor.load_state_dict(loaded)
    assert_bitwise([step.mkor.state_dict(), loaded])


def graph_of(rank, size):
    model, loss_fn, batches = batches_of("mlp", 8, 1)
    step = new_step(model, loss_fn)
    step(*share(batches[0], even(8, size), rank))
    nodes = list(step.graphs["schedule"].graph.nodes)
    tensors = [t.dtype for t in step.late.take(step.late._layout, list)]
    output = [start.name for start in filter(is_start, nodes) if [*start.users] == [nodes[-1]]]
    inputs = [n for n in nodes if is_wait(n) and n.args[0].op == "placeholder"]
    later = [n for n in nodes[nodes.index(inputs[0]) :] if n.op == "call_function"]
    backward = [n for n in nodes if n.meta.get("partitioner_tag") == "is_backward"]
    lines, behind = describe(step.graphs["schedule"].graph), set(backward) & set(later)
    return output, lines, len(inputs), len(backward), len(behind), tensors


def test_nothing_waits_in_the_step_that_sends():
    for output, lines, waits, backward, backward_behind, dtypes in processes.values(graph_of, 2):
        assert len(output) == waits == 1 and sum("statistics" in line for line in lines) == 1
        assert backward > 0 == backward_behind  # the last step's statistics have the whole backward to arrive
        assert dtypes == [torch.bool, torch.float32]


def poison(rank, size):
    model, loss_fn, batches = batches_of("mlp", 8, 5)
    step = new_step(model, loss_fn)
    seen = []
    for i, batch in enumerate(batches):
        x, y = share(batch, even(8, size), rank)
        if i == 2 and rank == 1:
            x = x.clone()
            x[0, 0, 0] = float("nan")
        step(x, y)
        seen.append({**model.state_dict(), **step.mkor.state_dict()})
        del seen[-1]["step"]
        seen[-1] = {key: t.clone() for key, t in seen[-1].items()}
    return step.skipped, seen


def test_a_skipped_step_sends_nothing():
    ranks = processes.values(poison, 2)
    for skipped, seen in ranks:
        assert skipped == 1
        assert_bitwise([seen[1], seen[2]])
        assert all(torch.isfinite(t).all() for t in seen[4].values())
        assert any(not torch.equal(seen[3][key], t) for key, t in seen[2].items() if key.endswith(".L"))
    for i in range(5):
        assert_bitwise([seen[i] for _, seen in ranks])


class Alternating(nn.Module):
    """Heads that take turns."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, x, task):
        return self.heads[task](x)


def take_turns(rank, size):
    torch.manual_seed(0)
    model, x, y = Alternating(), torch.randn(8, 6), torch.randn(8, 4)
    step = new_step(model, functional.mse_loss, refresh_every=5, communication=Communication(check_replicas_every=1))
    for task in (0, 0, 1, 1):  # the second head comes where nothing is collected
        step(*share((x,), even(8, size), rank), task, *share((y,), even(8, size), rank))
    return everything(model, step.optimizer, step)


def test_what_a_late_weight_refreshes_from_is_of_all_ranks():
    two = processes.values(take_turns, 2)
    assert_bitwise(two)
    assert_close(two[0], take_turns(0, 1), 1e-5)


def test_options_that_do_not_go_together():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, word in [
        ({"stale": 2}, "stale=2: must be 0"),
        ({"stale": 1, "rule": MKOR.published(statistic="gradient")}, "stale=1 delays what crosses the network"),
        ({"stale": 1, "communication": Communication(statistics_dtype=torch.bfloat16)}, "leave .* at None"),
    ]:
        with pytest.raises(ValueError, match=word):
            mkor_fx.compile_step(model, functional.mse_loss, optimizer, **options)


SCRIPT = """
import sys, torch, torch.distributed as dist, mkor_fx
store, rank, destroy = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.set_num_threads(1)
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step = mkor_fx.compile_step(model, torch.nn.functional.mse_loss, optimizer, stale=1, backend="eager")
for _ in range(2):
    step(torch.randn(5, 4), torch.randn(5, 3))
if destroy:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("destroy", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_process_ends_with_nothing_on_its_way(tmp_path, destroy):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen([*command, str(rank), str(destroy)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=100)
            assert rank.returncode == 0, said
            assert "wait" not in said
    finally:
        for rank in ranks:
            rank.kill()
