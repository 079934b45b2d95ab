"""MKOR-H: streams of losses that switch or do not, and steps, files, ranks and reports of a run that switches."""

import copy
import io
import math
import re
import warnings
from dataclasses import replace

import processes
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, MKOR, Communication, Hybrid
from mkor_fx.runtime.switch import Switch


def watched(loss, steps, **options):
    """The switch behind ``steps`` losses ``loss(step, first_order)``."""
    switch = Switch(Hybrid(MKOR(), **{"cost": 1.0, **options}))
    for step in range(steps):
        switch.observe(torch.tensor(loss(step, switch.first_order), dtype=torch.float64), step, lambda: 0.5)
    return switch


def sloped(first_order_over_second):
    """A slope of -.1 that falls to a fifth at step 1000; in first-order steps that times the ratio."""
    now = [100.0]

    def loss(step, first_order):
        slope = 0.1 if step < 1000 else 0.02
        now[0] -= slope * first_order_over_second if first_order else slope
        return now[0]

    return loss


def test_a_constant_or_a_straight_line_never_leaves():
    assert watched(lambda step, first: 1.0, 3000).history == []
    assert watched(lambda step, first: 1000 - 0.1 * step, 3000).history == []


def test_a_plateau_leaves_where_the_equations_say():
    """Flat from window 21 on: low for P = 2 windows, a trial of 3, accepted since 0 >= 0."""
    switch = watched(lambda step, first: 1000 - 0.1 * min(step, 1000), 3000)
    assert switch.first_order
    assert switch.history == [(23 * 50, "tries first order"), (26 * 50, "stays with first order")]


def test_what_is_better_stays_and_what_is_worse_doubles_the_patience():
    better = watched(sloped(2.0), 1300)
    assert better.history[-1][1] == "stays with first order" and better.trend.wait == 2
    worse = watched(sloped(0.5), 1300)
    assert worse.history == [(1150, "tries first order"), (1300, "goes back to second order")]
    assert not worse.first_order and worse.trend.wait == 4


def test_equal_ways_are_told_apart_by_their_cost_alone():
    power = lambda step, first: 100 / (1 + step) ** 0.5
    equal = watched(power, 2000)
    assert equal.history and not any("stays" in what for _, what in equal.history)
    assert watched(power, 2000, cost=0.25).first_order
    assert watched(power, 2000, cost=None).history == watched(power, 2000, cost=0.5).history


def test_it_comes_back_unless_told_not_to():
    """First-order steps stop paying at step 2000, second-order ones would."""
    def make():
        now = [100.0]

        def loss(step, first):
            second = 0.1 if step < 500 else 0.0 if step < 2000 else 0.05
            now[0] -= (0.05 if step < 2000 else 0.0) if first else second
            return now[0]

        return loss

    reversible = watched(make(), 4000)
    assert not reversible.first_order and reversible.history[-1][1] == "stays with second order"
    one_way = watched(make(), 4000, one_way=True)
    assert one_way.first_order and [what for _, what in one_way.history] == ["tries first order", "stays with first order"]


def noisy(loss, size, seed=0):
    """The same, in noise of standard deviation ``size``."""
    generator = torch.Generator().manual_seed(seed)
    return lambda step, first: loss(step, first) + size * float(torch.randn((), generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_noise_decides_nothing(seed):
    """Slopes in noise of 20 windows' worth of them: what is worse is found out, what is better stays, a plateau is left."""
    assert watched(noisy(lambda step, first: 1000 - 0.1 * min(step, 1000), 0.5, seed), 3000).first_order
    assert not watched(noisy(sloped(0.5), 0.2, seed), 1300).first_order
    assert watched(noisy(sloped(2.0), 0.2, seed), 1300).first_order
    steady = watched(noisy(lambda step, first: 1000 - (0.05 if first else 0.1) * step, 2.0, seed), 3000)
    assert steady.history == []


def test_a_trial_in_which_the_loss_rises_ends_at_once():
    now = [100.0]

    def loss(step, first):
        now[0] -= -0.5 if first else 0.1 if step < 1000 else 0.02
        return now[0]

    switch = watched(loss, 1300)
    assert switch.history == [(1150, "tries first order"), (1200, "goes back to second order")]


def test_steps_grow_over_the_window_that_is_passed_over():
    switch, seen = Switch(Hybrid(MKOR(), window=4, cost=1.0)), []
    for step in range(60):
        if switch.first_order:
            seen.append(switch.warmth)
        switch.observe(torch.tensor(10.0 - min(step, 20), dtype=torch.float64), step, lambda: 0.5)
    assert seen[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] and set(seen[6:]) == {1.0}


def test_where_the_loss_rises_in_first_order_the_rule_is_tried_without_patience():
    now = [100.0]

    def loss(step, first):
        now[0] += (-0.02 if step < 2000 else 0.3) if first else (-0.1 if step < 500 else 0.0 if step < 1900 else -0.1)
        return now[0]

    history = watched(loss, 2300, patience=4).history
    assert history[-2:] == [(2050, "tries second order"), (2200, "stays with second order")]


def test_losses_that_are_not_finite_do_not_count():
    spoilt = lambda step, first: math.nan if step % 7 == 3 else 1000 - 0.1 * min(step, 1000)
    assert watched(spoilt, 3000).first_order
    assert watched(lambda step, first: math.inf, 300).history == []


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    return [data] * count


#: leaves soon: falling faster than ever is rare
EAGER = Hybrid(MKOR(), window=3, patience=1, threshold=0.99, cost=0.1)


def step_for(model, optimizer, rule=EAGER):
    return mkor_fx.compile_step(model, mse_loss, optimizer, rule, backend="eager")


def test_without_the_rule_a_step_is_the_base_optimizers():
    model, optimizer = build()
    step, data = step_for(model, optimizer, replace(EAGER, rate=1.0)), batches(60)
    while not step.mkor.switch.first_order:
        step(*data.pop())
    factors = step.mkor.state_dict()
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain = step_for(twin, other, None)
    for _ in range(3):  # no window may end in the second order again: a trial lasts three of them
        assert torch.equal(step(*data[0]), plain(*data[0])) and step.fallback
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(factors[key], t) for key, t in step.mkor.state_dict().items() if "." in key)
    assert {"refresh", "fallback"} == set(step.variants)
    assert step.metrics()["second_order"] == 0.0
    for told in (str(step.mkor.switch), str(step.coverage), step.coverage.to_dict()["switch"]):
        assert re.search(r"first order \(step \d+: tries first order\)", told)


@pytest.mark.parametrize(
    ("rule", "make", "share"),
    [
        (MKOR(), torch.optim.AdamW, 0.25),
        (MKOR(), lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), 1.0),
        (MKOR.published(), torch.optim.AdamW, 1.0),
    ],
    ids=["sized as Adam's", "as SGD's", "published"],
)
@pytest.mark.parametrize("chosen", [None, 0.5])
def test_its_rate_is_a_share_of_the_groups(rule, make, share, chosen):
    """On the rule's weights: other parameters of the group keep theirs."""
    share = share if chosen is None else chosen
    model, _ = build()
    optimizer = make(model.parameters(), lr=1e-2)
    step = step_for(model, optimizer, replace(EAGER, rule=rule, rate=chosen))
    (batch,) = batches(1)
    while not step.mkor.switch.first_order or step.mkor.switch.warmth < 1:
        step(*batch)
    twin = copy.deepcopy(model)
    ruled = [name for name, p in twin.named_parameters() if step.coverage[name].declined is None]
    assert {"0.weight", "2.weight"} <= set(ruled)
    groups = [{"params": [p], "lr": 1e-2 * (share if name in ruled else 1.0)} for name, p in twin.named_parameters()]
    other = make(groups, 1e-2)
    saved = optimizer.state_dict()
    other.load_state_dict({"state": copy.deepcopy(saved["state"]), "param_groups": other.state_dict()["param_groups"]})
    step(*batch)
    mse_loss(twin(batch[0]), batch[1]).backward()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("done", [4, 9, *(pytest.param(n, marks=pytest.mark.nightly) for n in (2, 16))])
def test_a_run_goes_on_from_the_middle_of_a_window(done):
    model, optimizer = build()
    step, data = step_for(model, optimizer), batches(40)
    for batch in data[:done]:
        step(*batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), step.mkor.state_dict()))
    again, other = build()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed = step_for(again, other)
    resumed.mkor.load_state_dict(saved[2])
    for batch in data[done:]:
        assert torch.equal(step(*batch), resumed(*batch))
    torch.testing.assert_close(step.mkor.switch.state(), resumed.mkor.switch.state(), rtol=0, atol=0, equal_nan=True)
    assert {what for _, what in step.mkor.switch.history} >= {"tries first order"}


def test_a_file_of_a_plain_run_starts_the_windows_afresh_and_the_other_way_round():
    model, optimizer = build()
    hybrid, plain = step_for(model, optimizer), step_for(*build(), MKOR())
    for batch in batches(5):
        hybrid(*batch)
        plain(*batch)
    plain.mkor.load_state_dict(hybrid.mkor.state_dict())
    assert "switch" not in plain.mkor.state_dict()
    hybrid.mkor.load_state_dict(plain.mkor.state_dict())
    assert not hybrid.mkor.switch.state()[-4:].any() and hybrid.mkor.switch.history == []
    with pytest.raises(ValueError, match=r"'switch' has shape \(2,\): it is none of a Hybrid with windows of 3"):
        hybrid.mkor.load_state_dict({**hybrid.mkor.state_dict(), "switch": torch.ones(2)})


def on_a_rank(rank, size):
    """Ranks whose batches differ in size, and with them what a rule costs beside the model."""
    model, optimizer = build()
    rule, communication = Hybrid(MKOR(), window=3, patience=1, threshold=0.99), Communication(average="rows")
    step = mkor_fx.compile_step(model, mse_loss, optimizer, rule, backend="eager", communication=communication)
    for x, y in batches(40):
        part = slice(0, 2) if rank == 0 else slice(2, None)
        step(x[part], y[part])
    return step.mkor.switch.history, step.mkor.switch.state(), [p.detach() for p in model.parameters()]


def test_ranks_decide_alike():
    (history, trend, weights), (other, its_trend, its_weights) = processes.values(on_a_rank, 2)
    assert history == other and len(history) >= 2 and torch.equal(trend, its_trend)
    assert all(torch.equal(p, q) for p, q in zip(weights, its_weights, strict=True))


def test_the_device_is_read_once_a_window(monkeypatch):
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(len(self)) or tolist(self))
    watched(lambda step, first: float(step), 500)
    assert read == 10 * [50]


def test_progress_says_which_way():
    model, optimizer = build()
    step, out = step_for(model, optimizer, Hybrid(KFAC())), io.StringIO()
    for batch in mkor_fx.progress(batches(2), step, file=out):
        step(*batch)
    assert "second order" in out.getvalue()


def test_what_a_step_costs_is_counted():
    model, optimizer = build()
    step = step_for(model, optimizer, MKOR.hybrid(rank=2))
    step(*batches(1)[0])
    often, seldom = (step.coverage.cost_of_base(every) for every in (1, 100))
    assert 0 < often < seldom < 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 1}, r"Hybrid\(window=1\): must be an integer of at least 2"),
        ({"patience": 0}, r"Hybrid\(patience=0\): must be an integer of at least 1"),
        ({"threshold": 1.0}, r"Hybrid\(threshold=1\.0\): must lie in \[0, 1\)"),
        ({"hysteresis": -1.0}, r"Hybrid\(hysteresis=-1\.0\): must not be negative"),
        ({"cost": 2.0}, r"Hybrid\(cost=2\.0\): must lie in \(0, 1\]"),
        ({"rule": None}, r"Hybrid\(rule=None\): must be a rule"),
        ({"rule": "mkor"}, r"Hybrid\(rule='mkor'\): must be a rule"),
        ({"rule": {"*": None}}, r"Hybrid\(rule=\{'\*': None\}\): must be a rule, or a dict of them"),
        ({"one_way": "no"}, r"Hybrid\(one_way='no'\): must be True or False"),
        ({"rate": 0.0}, r"Hybrid\(rate=0\.0\): must be positive"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Hybrid(**{"rule": MKOR(), **options})


def test_one_decides_for_the_whole_model():
    with pytest.raises(ValueError, match=r"rule for '\*' is a Hybrid, which decides for a whole model.*as Hybrid\(\{"):
        step_for(*build(), {"*": MKOR.hybrid()})


# ---- the drop-in door, which is told of losses ----------------------------------------------------------------------------


def loop(rule=EAGER, make=torch.optim.AdamW):
    """A compiled model and what trains it by one batch."""
    model, _ = build()
    compiled = mkor_fx.compile(model, rule, backend="eager")
    optimizer = make(model.parameters(), lr=1e-3)

    def one(batch):
        optimizer.zero_grad()
        loss = mse_loss(compiled(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        compiled.mkor.observe(loss)
        return loss.detach()

    return compiled, optimizer, one


def resumed_from(compiled, optimizer):
    """Another loop, which begins where this one is."""
    saved = copy.deepcopy((compiled.state_dict(), optimizer.state_dict(), compiled.mkor.state_dict()))
    again, other, resumed = loop()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.mkor.load_state_dict(saved[2])
    return again, resumed


@pytest.mark.parametrize("rule", [MKOR(), MKOR.published(), KFAC(derive_every=2)], ids=["mkor", "published", "kfac"])
def test_both_doors_go_the_same_way(rule):
    model, optimizer = build()
    step = step_for(model, optimizer, replace(EAGER, rule=rule))
    compiled, _, one = loop(replace(EAGER, rule=rule))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(40):
            torch.testing.assert_close(one(batch), step(*batch), rtol=1e-5, atol=1e-6)
    assert compiled.mkor.switch.history == step.mkor.switch.history and len(step.mkor.switch.history) >= 2
    assert compiled.mkor.step == step.mkor.step == 40
    for p, q in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert "first order" in str(compiled.coverage) and compiled.mkor.metrics()["second_order"] in (0.0, 1.0)


def test_without_the_rule_the_graphs_are_the_models_own():
    compiled, optimizer, one = loop(replace(EAGER, rate=1.0))
    (batch,) = batches(1)
    while not compiled.mkor.first_order:
        one(batch)
    twin, _ = build()
    twin.load_state_dict(compiled.state_dict())
    other = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    factors, graphs = compiled.mkor.state_dict(), len(compiled.graphs.captured)
    one(batch)
    mse_loss(twin(batch[0]), batch[1]).backward()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(compiled.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(compiled.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(factors[key], t) for key, t in compiled.mkor.state_dict().items() if "." in key)
    assert len(compiled.graphs.captured) == graphs


def test_a_loop_goes_on_from_the_middle_of_a_window():
    compiled, optimizer, one = loop()
    data = batches(40)
    for batch in data[:7]:
        one(batch)
    again, resumed = resumed_from(compiled, optimizer)
    for batch in data[7:]:
        assert torch.equal(one(batch), resumed(batch))
    torch.testing.assert_close(
        compiled.mkor.switch.state(), again.mkor.switch.state(), rtol=0, atol=0, equal_nan=True
    )


def test_a_loop_goes_on_without_its_rule():
    """Resumed, or changed, before any graph with the rule has shown a weight: its share of the rate is the same."""
    compiled, optimizer, one = loop()
    (batch,) = batches(1)
    while not compiled.mkor.first_order or compiled.mkor.switch.warmth < 1:
        one(batch)
    again, resumed = resumed_from(compiled, optimizer)
    for _ in range(3):
        assert torch.equal(one(batch), resumed(batch))
    assert all(map(torch.equal, compiled.parameters(), again.parameters()))
    assert compiled.mkor.step == again.mkor.step


def test_a_layer_that_is_thawed_without_the_rule_takes_its_share():
    compiled, _, one = loop(replace(EAGER, rate=0.5, one_way=True))
    (batch,) = batches(1)
    compiled[0].weight.requires_grad_(False)
    while not compiled.mkor.first_order or compiled.mkor.switch.warmth < 1:
        one(batch)
    compiled[0].weight.requires_grad_(True)
    before = compiled[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"0\.weight is trained now"):
        one(batch)
    moved = float((compiled[0].weight.detach() - before).abs().max())
    assert moved == pytest.approx(0.5e-3, rel=0.05)  # Adam's first step


def test_a_weight_of_two_models_takes_its_share_once():
    torch.manual_seed(0)
    encoder = nn.Linear(5, 8)
    models = [nn.Sequential(encoder, nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    compiled = [mkor_fx.compile(model, replace(EAGER, rate=0.5, one_way=True), backend="eager") for model in models]
    params = {id(p): p for model in models for p in model.parameters()}
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    (x, y), before = batches(1)[0], None
    for _ in range(60):
        before = encoder.weight.detach().clone()
        optimizer.zero_grad()
        loss = sum(mse_loss(one(x), y) for one in compiled)
        loss.backward()
        grad = encoder.weight.grad.clone()
        left = all(one.mkor.first_order and one.mkor.switch.warmth == 1 for one in compiled)
        optimizer.step()
        for one in compiled:
            one.mkor.observe(loss.detach())
        if left:
            break
    assert left
    torch.testing.assert_close(encoder.weight.detach(), before - 0.05 * grad, rtol=1e-5, atol=1e-6)


def test_a_fallback_without_a_hybrid_is_the_base_optimizer():
    model, optimizer = build()
    step = step_for(model, optimizer, MKOR())
    twin, _ = build()
    plain = step_for(twin, torch.optim.AdamW(twin.parameters(), lr=1e-3), None)
    step.fallback = True
    for batch in batches(3):
        assert torch.equal(step(*batch), plain(*batch))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def loop_on_a_rank(rank, size):
    compiled, optimizer, _ = loop(replace(EAGER, cost=None))
    x, y = batches(1)[0]
    part = slice(rank, None, size)
    for _ in range(30):
        optimizer.zero_grad()
        loss = mse_loss(compiled(x[part]), y[part])
        loss.backward()
        for p in compiled.parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad /= size
        optimizer.step()
        compiled.mkor.observe(loss)
    return compiled.mkor.switch.history, [p.detach() for p in compiled.parameters()]


def test_ranks_of_a_loop_decide_alike():
    (history, weights), (other, its_weights) = processes.values(loop_on_a_rank, 2)
    assert history == other and len(history) >= 2
    assert all(torch.equal(p, q) for p, q in zip(weights, its_weights, strict=True))


def test_a_loop_that_tells_of_no_loss_is_told_so_once():
    model, optimizer = build()
    compiled = mkor_fx.compile(model, EAGER, backend="eager")
    (x, y), said = batches(1)[0], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            mse_loss(compiled(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        said = [str(w.message) for w in caught if "mkor_fx" in str(w.message)]
    assert len(said) == 1 and "call model.mkor.observe(loss) behind each optimizer.step()" in said[0]


def test_what_is_told_amiss_is_refused():
    compiled, _, _ = loop()
    with pytest.raises(ValueError, match=r"mkor\.observe\(loss\): must be a tensor with one number, got 0\.5"):
        compiled.mkor.observe(0.5)
    with pytest.raises(ValueError, match=r"must be a tensor with one number"):
        compiled.mkor.observe(torch.ones(2))
    plain = mkor_fx.compile(build()[0], MKOR(), backend="eager")
    with pytest.raises(ValueError, match=r"this rule is no Hybrid"):
        plain.mkor.observe(torch.ones(()))
    with pytest.raises(ValueError, match=r"a compiled step sees its own loss"):
        step_for(*build()).mkor.observe(torch.ones(()))
    with pytest.raises(ValueError, match=r"Hybrid leaves its rule between two steps"):
        mkor_fx.compile(build()[0], Hybrid(MKOR.published()), precondition="backward")
