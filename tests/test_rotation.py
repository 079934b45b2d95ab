"""Weights that refresh in turns: each as if it were refreshed alone, at steps of its own."""

import copy
from collections import Counter
from itertools import pairwise

import processes
import pytest
import torch
from contract import Contract
from held_rules import RULES
from test_distributed import assert_bitwise, assert_close, even, share
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, MKOR
from mkor_fx.rules import Shape
from mkor_fx.runtime.rotation import Rotation
from mkor_fx.show.costs import refresh_flops

EVERY, PHASES, STEPS = 4, 3, 11
#: of the model below: the largest weight first
PHASE = {"2.weight": 0, "0.weight": 1, "4.weight": 2}
KFAC_EVERY = KFAC(derive_every=EVERY, damping=1e-2)
NIGHTLY = pytest.mark.nightly
EACH_DOOR = pytest.mark.parametrize("door", ["compile_step", "compile"])


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return model, [(torch.randn(8, 5).double(), torch.randn(8, 2).double()) for _ in range(STEPS)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def stepper(door, model, rule, optimizer=None, **options):
    """``(what has the factors, step(x, y))``."""
    options = {"refresh_every": EVERY, "refresh_phases": PHASES, "backend": "eager", **options}
    optimizer = optimizer or sgd(model)
    if door == "compile_step":
        step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, rule, **options)
        return step, step
    handle = mkor_fx.compile(model, rule, **options)

    def step(x, y):
        optimizer.zero_grad()
        functional.mse_loss(handle(x), y).backward()
        optimizer.step()

    return handle, step


def is_due(name, step, every=EVERY, phase=PHASE):
    return step == 0 or (step + phase[name] * EVERY // PHASES) % every == 0


# ---- who is in which phase ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "phases"), [(1, 1), (2, 2), (4, 3), (5, 5), (10, 4), (10, 10)])
def test_each_weight_has_one_turn_a_window_and_turns_are_spread(every, phases):
    costs = {f"{i}": 100 - i for i in range(3 * phases)}
    rotation = Rotation.of(every, phases, costs)
    assert Counter(rotation.phase.values()) == dict.fromkeys(range(phases), 3)
    if phases == 1:
        assert [rotation.turn(step) for step in range(5)] == [None] * 5
        return
    turns = [rotation.turn(step) for step in range(1, 4 * every + 1)]
    for window in range(4):
        taken = [name for _, names in turns[window * every : (window + 1) * every] for name in names]
        assert sorted(taken) == sorted(costs)
    busy = [i for i, (_, names) in enumerate(turns) if names]
    gaps = {after - before for before, after in pairwise(busy)}
    assert gaps <= {every // phases, -(-every // phases)}
    for step, (_, names) in enumerate(turns, 1):
        assert all((step + rotation.offset(name)) % every == 0 for name in names)


def test_phases_cost_about_the_same():
    """Of a transformer's weights, and of those that are left when every second one is frozen."""
    sizes = [(192, 64), (64, 64), (256, 64), (64, 256)]
    rule = MKOR().at_first_step
    costs = {f"{block}.{i}": refresh_flops(rule, Shape(*size)) for block in range(8) for i, size in enumerate(sizes)}
    rotation = Rotation.of(10, 4, costs)
    for names in (list(costs), list(costs)[::2], list(costs)[1::2]):
        total = [sum(costs[name] for name in names if rotation.phase[name] == phase) for phase in range(4)]
        assert max(total) < 1.1 * sum(total) / 4


def test_what_a_refresh_is_counted_for():
    """K-FAC: moments of 1024 rows, averages, two inverses; more for what is larger; nothing for what keeps no state."""
    rows, (outputs, inputs) = 1024, (30, 50)
    counted = refresh_flops(KFAC(derive_every=2), Shape(outputs, inputs))
    moments, inverses = 2 * rows * (outputs**2 + inputs**2), 2 * (outputs**3 + inputs**3)  # averages and inverses are kept
    assert moments + inverses < counted < 1.1 * (moments + inverses)
    assert refresh_flops(KFAC(max_factor=8), Shape(outputs, inputs)) == 0


# ---- states ------------------------------------------------------------------------------------------------------------


class InTurns(Contract):
    phase = PHASE

    def due(self, name, every):
        return is_due(name, self.count, every, self.phase)


@EACH_DOOR
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("mkor", "kfac") else NIGHTLY) for n in RULES])
def test_each_weight_is_as_if_its_own_steps_were_those_that_refresh(door, name):
    model, batches = build()
    twin, rule = copy.deepcopy(model), RULES[name]
    done, step = stepper(door, model, rule)
    reference = InTurns(twin, sgd(twin), rule, refresh_every=EVERY)
    reference.phase = done.mkor.rotation.phase
    for x, y in batches:
        step(x, y)
        functional.mse_loss(twin(x), y).backward()
        reference.step()
    assert reference.phase == PHASE or name == "soap"
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    state = done.mkor.state_dict()
    del state["step"]
    for key, tensor in state.items():
        weight, _, entry = key.rpartition(".")
        torch.testing.assert_close(tensor, reference.state[f"{weight}:0"][entry], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(("door", "options"), [
    ("compile_step", {}), ("compile", {}), ("compile", {"precondition": "backward"}),
    ("compile_step", {"accumulate": 2}),
], ids=["compile_step", "compile", "backward", "parts"])  # fmt: skip
def test_nothing_else_changes_in_a_weight_s_turn(door, options):
    """Factors of K-FAC and its inverses, which are derived as seldom, change at their weight's own steps alone."""
    model, batches = build()
    rule = KFAC_EVERY if "precondition" not in options else KFAC(derive_every=EVERY, graft=None, damping=1e-2)
    done, step = stepper(door, model, rule, **options)
    before = None
    for count, batch in enumerate(batches):
        step(*batch)
        state = done.mkor.state_dict()
        assert int(state["step"]) == count + 1
        for name in PHASE if before else ():
            for key in ("L", "R", "L_inverse", "R_inverse"):
                same = torch.equal(state[f"{name}.{key}"], before[f"{name}.{key}"])
                assert same != is_due(name, count), (count, name, key)
        before = state
    if door == "compile_step":
        phases = {f"refresh of phase {phase}" for phase in range(PHASES)}
        parts = {"part", "part without statistics", *(f"part: {p}" for p in phases)} if options else set()
        assert set(step.variants) == {"refresh", "reuse", *phases, *parts}


@EACH_DOOR
@pytest.mark.parametrize("stop", [pytest.param(1, marks=NIGHTLY), 2, pytest.param(7, marks=NIGHTLY)])
def test_a_run_goes_on_within_a_window(door, stop):
    model, batches = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    done, step = stepper(door, model, KFAC_EVERY, optimizer)
    for number, batch in enumerate(batches):
        if number == stop:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), done.mkor.state_dict()))
        step(*batch)
    other = build()[0]
    adamw = torch.optim.AdamW(other.parameters(), lr=0.02)
    resumed, step = stepper(door, other, KFAC_EVERY, adamw)
    for part, state in zip((other, adamw, resumed.mkor), saved, strict=True):
        part.load_state_dict(state)
    for batch in batches[stop:]:
        step(*batch)
    assert_bitwise([{**m.state_dict(), **d.mkor.state_dict()} for m, d in ((model, done), (other, resumed))])
    assert door == "compile" or "refresh" not in step.variants


class Alternating(nn.Module):
    """Heads that take turns, as of several tasks."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 7), nn.ModuleList(nn.Linear(7, 4) for _ in range(2))

    def forward(self, x, task):
        return self.heads[task](torch.tanh(self.body(x)))


def test_a_weight_that_misses_its_turn_refreshes_when_it_comes():
    torch.manual_seed(0)
    model, every = Alternating(), 3
    optimizer = sgd(model)
    step = mkor_fx.compile_step(
        model, functional.mse_loss, optimizer, MKOR.published(), refresh_every=every, refresh_phases=3, backend="eager"
    )
    task_of, refreshed, before = (lambda n: n // 2 % 2), Counter(), {}
    for number in range(12):
        step(torch.randn(8, 6), task_of(number), torch.randn(8, 4))
        state = {key: t for key, t in step.mkor.state_dict().items() if key.endswith(".R")}
        refreshed.update(key for key, t in state.items() if key not in before or not torch.equal(t, before[key]))
        before = state
    used = {"body": range(12), **{f"heads.{task}": [n for n in range(12) if task_of(n) == task] for task in (0, 1)}}
    assert set(step.mkor.rotation.phase.values()) == {0, 1, 2}
    for name, taken in used.items():
        offset = step.mkor.rotation.offset(f"{name}.weight")
        assert refreshed[f"{name}.weight.R"] == len({(n + offset) // every for n in taken}), name


# ---- several ranks -----------------------------------------------------------------------------------------------------


def train(rank, size, placement):
    model, batches = build()
    step, _ = stepper("compile_step", model, KFAC_EVERY, placement=placement)
    losses = [step(*share(batch, even(8, size), rank)) for batch in batches]
    return {**model.state_dict(), **step.mkor.state_dict(full=True), "losses": torch.stack(losses)}


@pytest.mark.parametrize("placement", [pytest.param("replicated", marks=NIGHTLY), "owner"])
def test_ranks_are_one_process(placement):
    two = processes.values(train, 2, placement)
    assert_bitwise(two)
    assert_close(two[0], train(0, 1, "replicated"), 1e-6)


# ---- what is said ------------------------------------------------------------------------------------------------------


@EACH_DOOR
def test_it_is_said_when_a_weight_refreshes(door):
    model, batches = build()
    done, step = stepper(door, model, KFAC_EVERY)
    for batch in batches[:6]:
        step(*batch)
    metrics = done.mkor.metrics()
    assert (metrics["refreshes"], metrics["refresh_phases"]) == (2, 3)
    assert repr(done.mkor).endswith("refresh every 4 in 3 phases)")
    explained = mkor_fx.explain(done)
    assert str(explained).endswith(
        "\nrefresh every 4 in 3 phases of about the same cost:\n"
        "  phase 0: 2.weight\n  phase 1: 0.weight\n  phase 2: 4.weight"
    )
    by_name = {entry["name"]: entry["refresh_phase"] for entry in explained.to_dict()["parameters"]}
    assert by_name == {**PHASE, "0.bias": None, "2.bias": None, "4.bias": None}


def test_weights_that_are_added_have_a_turn():
    model, batches = build()
    step, _ = stepper("compile_step", model, KFAC_EVERY)
    step(*batches[0])
    model[4] = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 2)).double()
    step.optimizer.add_param_group({"params": list(model[4].parameters())})
    step.optimizer.param_groups[0]["params"] = list(model[:4].parameters())
    with pytest.warns(UserWarning, match="compiled again"):
        step(*batches[1])
    assert set(step.mkor.rotation.phase) == {"0.weight", "2.weight", "4.0.weight", "4.1.weight"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refresh_phases": 0}, r"refresh_phases=0: must be an integer from 1 .* to refresh_every=4"),
        ({"refresh_phases": 5}, r"refresh_phases=5: must be an integer from 1 .* to refresh_every=4"),
        ({"refresh_phases": True}, r"refresh_phases=True: must be an integer"),
        ({"refresh_phases": 2.0}, r"refresh_phases=2\.0: must be an integer"),
        ({"refresh_phases": 2, "stale": 1}, r"refresh_phases=2 with stale=1: .* Leave one of the two out"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        stepper("compile_step", build()[0], KFAC_EVERY, **options)
