"""derive="spread": what is derived once a window, over its steps (PipeFisher); the same results, each when it is there."""

from collections import Counter

import processes
import pytest
import torch
from test_distributed import assert_bitwise
from test_rotation import stepper
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import EKFAC, KFAC, KLDWRM, MKOR, SOAP, Shampoo, ThermodynamicKFAC
from mkor_fx.doors.states import slots_of
from mkor_fx.options import Options
from mkor_fx.passes.write.derive import in_the_way, moving_state
from mkor_fx.rules import Shape
from mkor_fx.runtime.rotation import Rotation

EVERY, STEPS = 4, 13
RULE = KFAC(damping=0.1, decay=0.7, derive_every=EVERY)
EACH_DOOR = pytest.mark.parametrize("door", ["compile_step", "compile"])
WEIGHTS = ("0.weight", "2.weight", "4.weight")


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return model, [(torch.randn(8, 5).double(), torch.randn(8, 2).double()) for _ in range(STEPS)]


def opened(door, model, rate=0.0, **options):
    options = {"refresh_every": 1, "refresh_phases": 1, **options}
    return stepper(door, model, options.pop("rule", RULE), torch.optim.SGD(model.parameters(), lr=rate), **options)


def inverses(holder):
    return {key: t.clone() for key, t in holder.mkor.tensors().items() if "_inverse" in key}


def run(door, rate=0.0, **options):
    """The inverses behind each step, and the parameters at the end."""
    model, batches = build()
    holder, step = opened(door, model, rate, **options)
    seen = []
    for batch in batches:
        step(*batch)
        seen.append(inverses(holder))
    return seen, model.state_dict(), holder


def place(name, step, options):
    """How many steps of its window a weight has behind it, by hand."""
    if options.get("refresh_phases", 1) == 1:
        return step % EVERY
    phase = {"2.weight": 0, "0.weight": 1, "4.weight": 2}[name]
    return (step + phase * options["refresh_every"] // options["refresh_phases"]) % EVERY


@EACH_DOOR
@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}, {"refresh_every": 4, "refresh_phases": 3}], ids=str)
def test_results_are_those_of_all_at_once_each_when_its_slot_comes(door, options):
    """Without moving, factors are the same in both, so every inverse can be compared at every step."""
    together, _, _ = run(door, **options)
    spread, _, holder = run(door, derive="spread", **options)
    slots = holder.mkor.slots
    assert set(slots) == set(WEIGHTS) and any(slots.values())
    late = 0
    for name in WEIGHTS:
        for step in range(STEPS):
            at = place(name, step, options)
            begins = step - at if step - at >= 0 else 0
            arrived = begins if at >= slots[name] or begins == 0 else max(0, begins - EVERY)
            for key in (f"{name}.L_inverse", f"{name}.R_inverse"):
                assert torch.equal(spread[step][key], together[arrived][key]), (key, step)
            late += arrived < begins and not torch.equal(together[arrived][key], together[begins][key])
    assert late > 3


@EACH_DOOR
@pytest.mark.parametrize("options", [{}, {"refresh_every": 4, "refresh_phases": 3}], ids=str)
def test_a_step_derives_about_as_much_as_any_other(door, options):
    done = []
    derive = lambda self, state: done.append(1) or KFAC.derive(self, state)
    rule = type("Counted", (KFAC,), {"derive": derive})(damping=0.1, derive_every=3)
    model, batches = build()
    _, step = opened(door, model, rule=rule, derive="spread", **options)
    counts = []
    for batch in batches:
        done.clear()
        step(*batch)
        counts.append(len(done))
    assert counts[0] == 3 and counts[3:] == [1] * (STEPS - 3)  # three weights, three steps a window


@EACH_DOOR
@pytest.mark.parametrize("at", [5, 6, 7, 8])
def test_a_run_goes_on_in_the_middle_of_a_window(door, at):
    _, expected, _ = run(door, rate=0.05, derive="spread")
    model, batches = build()
    holder, step = opened(door, model, 0.05, derive="spread")
    for batch in batches[:at]:
        step(*batch)
    state, weights = holder.mkor.state_dict(), {key: t.clone() for key, t in model.state_dict().items()}
    waiting = {key.removeprefix("put_by:").rpartition(".")[0] for key in state if key.startswith("put_by:")}
    assert waiting == {name for name, slot in holder.mkor.slots.items() if at - 1 >= EVERY and (at - 1) % EVERY < slot}
    fresh, _ = build()
    fresh.load_state_dict(weights)
    holder, step = opened(door, fresh, 0.05, derive="spread")
    holder.mkor.load_state_dict(state)
    for batch in batches[at:]:
        step(*batch)
    assert_bitwise([expected, fresh.state_dict()])


@EACH_DOOR
def test_what_waits_is_finished_by_a_run_that_does_not_spread(door):
    model, batches = build()
    holder, step = opened(door, model, derive="spread")
    for batch in batches[:5]:
        step(*batch)
    state = holder.mkor.state_dict()
    together, _, _ = run(door)
    fresh, _ = build()
    other, step = opened(door, fresh)
    other.mkor.load_state_dict(state)
    step(*batches[5])
    assert not other.mkor.put_by
    for key, tensor in inverses(other).items():
        assert torch.equal(tensor, together[4][key])


def test_what_waits_has_to_fit():
    model, batches = build()
    holder, step = opened("compile_step", model, derive="spread")
    for batch in batches[:5]:
        step(*batch)
    state = holder.mkor.state_dict()
    key = next(key for key in state if key.startswith("put_by:") and key.endswith(".L"))
    before = {k: t.clone() for k, t in holder.mkor.put_by[key.removeprefix("put_by:").rpartition(".")[0]].items()}
    with pytest.raises(ValueError, match=r"put_by:\S+\.L not shaped as its state"):
        holder.mkor.load_state_dict({**state, key: torch.zeros(3, 3)})
    after = holder.mkor.put_by[key.removeprefix("put_by:").rpartition(".")[0]]
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    with pytest.warns(UserWarning, match="left out"):
        left = holder.mkor.load_state_dict({**state, key: torch.zeros(3, 3)}, strict=False)
    assert key in left and key.removeprefix("put_by:").rpartition(".")[0] not in holder.mkor.put_by
    holder.mkor.reset()
    assert not holder.mkor.put_by


def test_a_skipped_step_derives_nothing_whenever_its_slot_comes():
    model, batches = build()
    holder, step = opened("compile_step", model, 0.05, derive="spread")
    seen = []
    for i, (x, y) in enumerate(batches[:9]):
        step(x * (float("nan") if i == 4 else 1.0), y)
        seen.append(inverses(holder))
    assert holder.skipped == 1
    for key, tensor in seen[0].items():
        assert all(torch.equal(seen[i][key], tensor) for i in range(1, 8))
    assert any(not torch.equal(seen[8][key], tensor) for key, tensor in seen[0].items())


def two_ranks(rank, size, placement, resume):
    model, batches = build()
    options = {"derive": "spread", "placement": placement, "communication": mkor_fx.Communication(padding=9.0)}
    holder, step = opened("compile_step", model, 0.05, **options)
    for i, (x, y) in enumerate(batches):
        if resume and i == 6:
            state, weights = holder.mkor.state_dict(full=True), model.state_dict()
            assert any(key.startswith("put_by:") for key in state)
            model, _ = build()
            holder, step = opened("compile_step", model, 0.05, **options)
            model.load_state_dict(weights)
            holder.mkor.load_state_dict(state)
        step(x[rank::size], y[rank::size])
    return {**model.state_dict(), **{k: t for k, t in holder.mkor.state_dict(full=True).items() if "put_by" not in k}}


@pytest.mark.parametrize("placement", ["replicated", "owner"])
def test_ranks_spread_alike(placement):
    assert_bitwise([state for resume in (False, True) for state in processes.values(two_ranks, 2, placement, resume)])


# ---- whose turn it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [lambda name: 0, lambda name: int(name) % 3])
def test_slots_share_out_the_work(offset):
    costs = {str(i): (i % 7 + 1) ** 3 for i in range(40)}
    slots = Rotation.slots(5, costs, offset)
    load = Counter()
    for name, slot in slots.items():
        assert 0 <= slot < 5
        load[(slot - offset(name)) % 5] += costs[name]
    assert max(load.values()) - min(load.values()) <= max(costs.values())
    assert set(Rotation.slots(1, costs, offset).values()) == {0}


def test_slots_follow_from_names_shapes_and_rules():
    model, _ = build()
    rule = {"0.*": KFAC(derive_every=2), "2.*": MKOR.published(), "4.*": KFAC(derive_every=3)}
    assert slots_of(model, Options(rule=rule, derive="spread")) == {"0.weight": 0, "4.weight": 0}
    assert slots_of(model, Options(rule=RULE)) == {}
    slots = slots_of(model, Options(rule=RULE, derive="spread"))
    assert slots == {"2.weight": 0, "0.weight": 1, "4.weight": 2}  # the largest first


# ---- which rules ------------------------------------------------------------------------------------------------------


def test_what_moves_between_steps():
    shape = Shape(4, 3, bias=True)
    assert moving_state(KFAC(), shape) == {"L", "R", "seen"}
    assert in_the_way(EKFAC()) == {"bias_scaling", "scaling"}
    assert {"m", "v"} <= in_the_way(SOAP())
    for rule in (KFAC(), KFAC(inverse="eigen"), KLDWRM(), ThermodynamicKFAC(), Shampoo()):
        assert in_the_way(rule.at_first_step) == frozenset(), rule


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (EKFAC(), "EKFAC also changes bias_scaling, scaling at the steps between"),
        (SOAP(), r"SOAP also changes .*m, v"),
        (MKOR.published(), "no rule here derives anything"),
    ],
)
def test_rules_that_cannot_wait_are_refused(rule, told):
    model, _ = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=told):
        mkor_fx.compile_step(model, functional.mse_loss, optimizer, rule, derive="spread")
    with pytest.raises(ValueError, match=told):
        mkor_fx.compile(model, rule, derive="spread")


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="derive='later': must be 'together'"):
        Options(derive="later")
    model, _ = build()
    with pytest.raises(ValueError, match="derive='spread' needs precondition='step'"):
        mkor_fx.compile(model, KFAC(graft="gradient"), derive="spread", precondition="backward")
