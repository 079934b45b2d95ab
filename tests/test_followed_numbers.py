"""Optimizers that users write: what a step does to numbers is followed exactly, or refused before anything has changed."""

import copy
import math
import random
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx


class Written(torch.optim.Optimizer):
    """A step along the gradient of size ``size(self, group, state of p)``."""

    def __init__(self, params, size, lr=0.1, **more):
        self.size = size
        super().__init__(params, {"lr": lr, "decay": 0.01, "betas": (0.9, 0.99), **more})

    def _init_group(self, group):
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                self.state[p].update({"calls": 0, "slow": 1.0, "average": torch.zeros_like(p)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self._init_group(group)
            group_size = self.size(self, group, None)
            for p in group["params"]:
                if p.grad is not None:
                    own = self.size(self, group, self.state[p])
                    p.sub_(p.grad * (group["lr"] * (group_size if own is None else own)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def data(count=7):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: (torch.randn(5, 6, generator=generator).double(), torch.randint(4, (5,), generator=generator))
    return [draw() for _ in range(count)]


def compiled(model, optimizer, **options):
    return mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager", **options)


def eager(model, optimizer, x, y):
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def once(change):
    """Of a group, before its parameters."""
    return lambda self, group, state: change(self, group) if state is None else None


def each(change):
    """Of each parameter."""
    return lambda self, group, state: None if state is None else change(self, group, state)


def count_in_group(self, group):
    group["calls"] += 1
    return 1 / group["calls"]


def count_in_a_tensor(self, group):
    group["calls"] += 1
    return 1 / group["calls"].to(torch.float64)


def shrink(self, group):
    group["share"] = group["share"] * (1 - group["decay"])
    return group["share"]


def count_in_state(self, group, state):
    state["calls"] += 1
    state["slow"] *= 1 - group["decay"]
    return state["slow"] * math.sqrt(1 - math.pow(group["betas"][1], state["calls"])) / max(1, state["calls"] - 2)


def to_fraction(self, group):
    group["calls"] = group["calls"] / 2 + 1
    return group["calls"]


def bind(self, group):
    """``size`` is another number than the rate, which stays."""
    size = rate = group["lr"]
    size *= 3
    size += rate
    return size


def read(self, group, state):
    """A number that is read from a tensor is no part of it any more."""
    state["average"] += 1
    now = state["average"].flatten()[0].item()
    before = now
    now += 1
    return min(now / before, 1.5) * math.exp(-before)


FOLLOWED = {
    "a count in the group": (once(count_in_group), {"calls": 0}),
    "a tensor in the group": (once(count_in_a_tensor), {"calls": torch.tensor(0)}),
    "a whole number that becomes a fraction": (once(to_fraction), {"calls": 0}),
    "a float in the group": (once(shrink), {"share": 1.0}),
    "numbers in the state": (each(count_in_state), {}),
    "a number under two names": (once(bind), {}),
    "a number of a tensor": (each(read), {}),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed(name):
    """Through steps that are skipped, a checkpoint in the middle, and on in the optimizer's own loop."""
    size, more = FOLLOWED[name]
    model = network()
    twin = copy.deepcopy(model)
    own, other = (Written(m.parameters(), size, **copy.deepcopy(more)) for m in (model, twin))
    step = compiled(model, own)

    def compare():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)

    for number, (x, y) in enumerate(data()):
        for optimizer in (own, other):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        if number == 2:
            step(x * math.nan, y)
            assert step.skipped == 1
        step(x, y)
        eager(twin, other, x, y)
        compare()
        if number == 4:
            saved = copy.deepcopy(step.state_dict())
            own.load_state_dict(copy.deepcopy(other.state_dict()))  # Python numbers again
    assert step.compilations == 1
    model.load_state_dict(saved["model"])
    own.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for x, y in data()[5:]:
        step(x, y)
    for key, value in other.param_groups[0].items():
        assert key == "params" or type(own.state_dict()["param_groups"][0][key]) is type(value)
    expected = [p.detach().clone() for p in model.parameters()]
    again = network()
    resumed = Written(again.parameters(), size, **copy.deepcopy(more))
    fresh = compiled(again, resumed)
    fresh.load_state_dict(saved)
    for x, y in data()[5:]:
        fresh(x, y)
    for p, q in zip(again.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)
    x, y = data()[0]
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(own.state_dict()))
    eager(model, own, x, y)
    eager(twin, other, x, y)
    compare()


def every(self, group):
    """Another size in the first step, another one in every third."""
    group["calls"] += 1
    if group["calls"] == 1:
        return 0.3
    return 2.0 if group["calls"] % group["period"] == 0 else 1 / group["calls"]


def test_a_branch_on_a_count_is_a_program_for_each_answer():
    """Through a step that is skipped, which does not count, and a checkpoint."""
    model = network()
    twin = copy.deepcopy(model)
    own, other = (Written(m.parameters(), once(every), calls=0, period=3) for m in (model, twin))
    step = compiled(model, own)
    for number, (x, y) in enumerate(data(8)):
        if number == 2:
            step(x * math.nan, y)
        step(x, y)
        eager(twin, other, x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        if number == 4:
            saved = copy.deepcopy(step.state_dict())
    assert step.compilations == 3 and own.state_dict()["param_groups"][0]["calls"] == 8
    again = network()
    fresh = compiled(again, Written(again.parameters(), once(every), calls=0, period=3))
    fresh.load_state_dict(saved)
    for x, y in data(8)[5:]:
        fresh(x, y)
    for p, q in zip(again.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert fresh.compilations == 2


def branch_on_derived(self, group):
    return 2.0 if group["lr"] * group["decay"] > 5e-4 or group["betas"][0] == 1 - group["decay"] else 1.0


def constant_on_the_host(self, group):
    return float(group["decay"] * 2)


@pytest.mark.parametrize(("size", "programs"), [(branch_on_derived, 2), (constant_on_the_host, 1)])
def test_a_branch_on_what_is_computed_from_numbers_is_watched(size, programs):
    model = network()
    twin = copy.deepcopy(model)
    own, other = (Written(m.parameters(), once(size)) for m in (model, twin))
    step = compiled(model, own)
    for rate, (x, y) in zip((0.1, 0.09, 0.01, 0.02), data(4), strict=True):
        for optimizer in (own, other):
            optimizer.param_groups[0]["lr"] = rate
        step(x, y)
        eager(twin, other, x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert step.compilations == programs


def on_itself(change):
    def size(self, group):
        change(self)
        return 1.0

    return once(size)


class Counts:
    """A plain object."""

    def __init__(self):
        self.calls = 0


def setup(**attributes):
    return lambda optimizer: vars(optimizer).update(attributes)


def nothing(optimizer):
    pass


def add_one(counts):
    counts.calls += 1


def looked_up(self, group):
    group["calls"] += 1
    return 0.5 if group["calls"] in {3, 5} else 1.0


def by_chance(self, group):
    return random.random()


def by_curvature(self, group):
    """What it has no graph for in its own loop either."""
    params = [p for p in group["params"] if p.requires_grad]
    torch.autograd.grad([p.grad for p in params], params, [p.grad for p in params])
    return 1.0


class OnItsClass(Written):
    calls = 0


def become_another(optimizer):
    optimizer.__class__ = OnItsClass


def on_its_class(self, group):
    type(self).calls += 1
    return 1.0


def through_a_method(self, group):
    """Kept on the object, bound to it."""
    return self.bound(group)


def keep(optimizer):
    optimizer.calls = 0
    optimizer.bound = types.MethodType(lambda self, group: vars(self).update(calls=self.calls + 1) or 1.0, optimizer)


def in_a_closure():
    calls = 0

    def size(self, group):
        nonlocal calls
        calls += 1
        return 1 / calls

    return size


def in_a_list(seen=[]):  # noqa: B006
    seen.append(1)
    return 1 / len(seen)


CALLS = 0


def in_the_module(self, group):
    global CALLS
    CALLS += 1
    return 1 / CALLS


def on_a_function(self, group):
    on_a_function.calls += 1
    return 1 / on_a_function.calls


on_a_function.calls = 0


def in_many_ways(self, group):
    group["calls"] += 1
    return next(size for size in range(1, 100) if group["calls"] <= size)


def branch_in_state(self, group, state):
    state["calls"] += 1
    return 1.0 if state["calls"] < 3 else 0.5


def later(self, group):
    """Nothing of it shows in the first steps."""
    group["calls"] += 1
    if group["calls"] % 50 == 0:
        return float(group["calls"])
    return 1.0


def to_host(self, group):
    group["calls"] += 1
    return float(group["calls"])


def own_rate(self, group):
    group["lr"] = group["lr"] * 0.5
    return 1.0


def look(self, group, state):
    return 1.0 if state["average"].sum() > 0 else 0.5


REFUSED = {
    "a count on itself": (on_itself(lambda o: vars(o).update(calls=o.calls + 1)), setup(calls=0), r"changes self\.calls"),
    "a list on itself": (on_itself(lambda o: o.seen.append(1)), setup(seen=[]), r"changes self\.seen"),
    "an object of its own": (on_itself(lambda o: add_one(o.own)), setup(own=Counts()), r"changes self\.own"),
    "a namespace": (on_itself(lambda o: add_one(o.own)), setup(own=SimpleNamespace(calls=0)), r"changes self\.own"),
    "an array": (on_itself(lambda o: o.seen.__iadd__(1)), setup(seen=np.zeros(2)), r"changes self\.seen"),
    "a tensor on itself": (
        on_itself(lambda o: o.count.add_(1)),
        setup(count=torch.zeros(())),
        r"a tensor of its own, in add_; it keeps self\.count",
    ),
    "a dict in the group": (once(lambda o, g: g["seen"].update(a=1) or 1.0), nothing, r"changes param_groups\[0\]\['seen"),
    "a flag in the group": (once(lambda o, g: g.update(flag=True) or 1.0), nothing, r"changes param_groups\[0\]\['flag'\]"),
    "its own rate": (once(own_rate), nothing, r"changes param_groups\[0\]\['lr'\]"),
    "a count in a closure": (once(in_a_closure()), nothing, r"changes calls, a variable of self\.size"),
    "a list as a default": (once(lambda o, g: in_a_list()), nothing, r"changes its defaults, a variable of in_a_list"),
    "a count in a module": (once(in_the_module), nothing, r"changes CALLS, a variable of self\.size"),
    "a count on a function": (once(on_a_function), nothing, r"changes calls, a variable of self\.size"),
    "a branch on a count in the state": (each(branch_in_state), nothing, r"branches on its own 'calls', which only the"),
    "a count that asks for many programs": (once(in_many_ways), nothing, r"takes more than 8 ways by its own count"),
    "what is done every so many steps": (once(later), nothing, r"reads its own 'calls' on the host, as float\(\)"),
    "a count in a set": (once(looked_up), nothing, r"looks its own 'calls' up in a set or a dict"),
    "a count on its class": (once(on_its_class), become_another, r"changes OnItsClass\.calls"),
    "a bound method": (once(through_a_method), keep, r"changes self\.calls"),
    "chance": (once(by_chance), nothing, r"changes the state of Python's random numbers"),
    "a count on the host": (once(to_host), nothing, r"reads its own 'calls' on the host, as float\(\)"),
    "a branch on a tensor": (each(look), nothing, r"reads a value of a tensor on the host"),
    "a second derivative": (once(by_curvature), nothing, r"element 0 of tensors does not require grad"),
    "random numbers": (each(lambda o, g, s: torch.rand_like(s["average"]).mean()), nothing, r"draws random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_before_anything_has_changed(name):
    size, prepare, said = REFUSED[name]
    model = network()
    optimizer = Written(model.parameters(), size, calls=0, seen={"a": 0}, flag=False)
    prepare(optimizer)
    weights, attributes = copy.deepcopy(model.state_dict()), str(vars(optimizer))
    with pytest.raises(ValueError, match=said):
        compiled(model, optimizer)
    assert all(torch.equal(p, weights[key]) for key, p in model.state_dict().items())
    assert str(vars(optimizer)) == attributes and all(p.grad is None for p in model.parameters())
    assert getattr(getattr(optimizer, "own", None), "calls", 0) == 0


class FirstGradient(torch.optim.Optimizer):
    """State that begins as the first gradient."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def _init_group(self, group):
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                self.state[p]["average"] = p.grad.clone()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.state[p]["average"].lerp_(p.grad, 0.1))


def test_state_of_the_first_gradient_is_not_made_of_another():
    model = network()
    twin = copy.deepcopy(model)
    own, other = FirstGradient(model.parameters()), FirstGradient(twin.parameters())
    step = compiled(model, own)
    first, *batches = data()
    with pytest.raises(ValueError, match=r"creates its state \(average\) inside step.*Call optimizer\.step\(\) once"):
        step(*first)
    for m, optimizer in ((model, own), (twin, other)):
        eager(m, optimizer, *first)
    for x, y in batches:
        step(x, y)
        eager(twin, other, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


class Around(torch.optim.Optimizer):
    """Steps through another optimizer."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


class Idle(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        pass


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda params: Around(torch.optim.SGD(params, lr=0.1)), r"Around steps through another optimizer \(self\.inner\)"),
        (Idle, r"Idle\.step\(\) changes no weight"),
    ],
)
def test_optimizers_whose_step_is_elsewhere_are_refused(build, said):
    model = network()
    with pytest.raises(ValueError, match=said):
        compiled(model, build(model.parameters()))


def test_dampening_of_others_is_not_sgds():
    """SGD's first step is without it; another optimizer's number of that name is its own."""
    model = network()
    twin = copy.deepcopy(model)
    size = once(lambda self, group: group["dampening"])
    own, other = (Written(m.parameters(), size, dampening=0.5) for m in (model, twin))
    step = compiled(model, own)
    for x, y in data(2):
        step(x, y)
        eager(twin, other, x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_python_is_itself_again_behind_a_trace():
    before = math.sqrt, math.pow, max, min
    model = network()
    compiled(model, Written(model.parameters(), each(count_in_state)))
    assert (math.sqrt, math.pow, max, min) == before
