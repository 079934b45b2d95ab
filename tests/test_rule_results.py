"""What rules return is held to the contract while a program is written, and what they are given is theirs to read alone."""

from dataclasses import dataclass, field
from typing import Any

import processes
import pytest
import torch
from test_rule_choice import opened
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, MKOR, Rule
from mkor_fx.kinds import Kind
from mkor_fx.rules import Gradient, Hyper, Normalized, Sides

DOORS = pytest.mark.parametrize("door", ["compile_step", "compile"])


@dataclass(frozen=True)
class Told(Rule):
    """A rule whose functions do what a test says, by name."""

    does: Any = None

    def told(self, name, *given):
        does = dict(self.does or ())
        return does[name](*given) if name in does else None

    def init(self, shape, device):
        return self.told("init", shape, device) or {
            "L": torch.eye(shape.O, device=device), "n": torch.zeros((), device=device)}  # fmt: skip

    def summarize(self, shape, a, g):
        return (g.sum(0),) if "summarize" not in dict(self.does or ()) else self.told("summarize", a, g)

    def unscale(self, summary, scale):
        return tuple(part / scale for part in summary)

    def update(self, state, uses, grad, step):
        return self.told("update", state) if "update" in dict(self.does or ()) else {**state, "n": state["n"] + 1}

    def precondition(self, state, grad):
        return self.told("precondition", grad, state) if "precondition" in dict(self.does or ()) else grad


class Deriving(Told):
    def derive(self, state):
        return self.told("derive", state)


class Advancing(Told):
    def advance(self, state, grad, step):
        return self.told("advance", state, grad)


class Sided(Told):
    precondition = Rule.precondition

    def sides(self, state):
        return self.told("sides", state)


class Normalizing(Sided):
    def sides(self, state):
        return Sides(state["L"], None)

    def normalize(self, state, product, moment):
        return self.told("normalize", state, product)


def told(cls=Told, **does):
    return cls(tuple(does.items()))


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def batch():
    return torch.randn(8, 6), torch.randn(8, 4)


WRONG = {
    "a vector for a matrix": (told(update=lambda s: {**s, "L": s["L"].diagonal()}),
                              r"Told\.update returned 'L' as a tensor \[4\] in the place of a tensor \[4, 4\]"),
    "a misspelt entry": (told(update=lambda s: {**s, "l": s["L"]}), r"update returned 'l', which init has not made"),
    "a missing entry": (told(update=lambda s: {"L": s["L"]}), r"update returned no 'n': must be the whole state"),
    "nothing": (told(update=lambda s: None), r"update returned NoneType None: must be the whole state, a dict with L, n"),
    "a number": (told(update=lambda s: {**s, "n": 1.0}), r"'n' as float 1\.0 in the place of a tensor \[\]"),
    "moments": (told(Advancing, advance=lambda s, g: {**s, "n": g.weight}), r"advance returned 'n' as a tensor \[4, 6\]"),
    "a transposed direction": (told(precondition=lambda g, s: Gradient(g.weight.mT, g.bias)),
                               r"returned a weight of a tensor \[6, 4\], where the gradient has a tensor \[4, 6\]"),
    "no bias": (told(precondition=lambda g, s: Gradient(g.weight)), r"returned a bias of NoneType None, where the gradient"),
    "no direction": (told(precondition=lambda g, s: None), r"precondition returned NoneType None: must be a Gradient"),
    "rows": (told(summarize=lambda a, g: (g,)), r"summarize returned a tensor \[8, 4\], and of one row a tensor \[1, 4\]"),
    "no tuple": (told(summarize=lambda a, g: g.sum(0)), r"summarize returned a tensor \[4\]: must be a tuple of tensors"),
    "a side that does not fit": (told(Sided, sides=lambda s: Sides(None, s["L"])),
                                 r"sides returned a right side of a tensor \[4, 4\]: must be \[6, 6\] here, or None"),
    "no sides": (told(Sided, sides=lambda s: None), r"sides returned NoneType None: must be Sides\(left, right\)"),
    "half a normalization": (told(Normalizing, normalize=lambda s, D: (D, s)),
                             r"normalize returned tuple .*: must be Normalized\(direction, state\)"),
    "a vector of sizes": (told(Normalizing, normalize=lambda s, D: Normalized(D, s, D.mean(1))),
                          r"normalize returned a tensor \[4\] as the root mean square: must be a 0-dim tensor, or None"),
    "a vector of gains": (told(Normalizing, normalize=lambda s, D: Normalized(D, s, None, D.mean(1))),
                          r"normalize returned a tensor \[4\] as the gain: must be a 0-dim tensor, or None"),
    "normalized away": (told(Normalizing, normalize=lambda s, D: Normalized(D[0], s)),
                        r"normalize returned a tensor \[6\] in the place of a tensor \[4, 6\]: must be alike"),
    "a moment of rows": (told(Normalizing, normalize=lambda s, D: Normalized(D, {**s, "n": D.mean(1)})),
                         r"normalize returned 'n' as a tensor \[4\]"),
    "state in place": (told(update=lambda s: {**s, "n": s["n"].add_(1)}), r"changes what it is given in place \(aten\.add_"),
    "a view of it": (told(update=lambda s: {**s, "L": s["L"].mT.mul_(2).mT}), r"in place \(aten\.mul_.*compute a new"),
    "rows in place": (told(summarize=lambda a, g: (g.mul_(0).sum(0),)), r"changes what it is given in place"),
    "the gradient in place": (told(precondition=lambda g, s: Gradient(g.weight.mul_(0), g.bias)), r"in place"),
    "random numbers": (told(update=lambda s: {**s, "n": torch.rand_like(s["n"])}),
                       r"draws random numbers \(aten\.rand_like.*mkor_fx\.prims\.rademacher"),
}  # fmt: skip


@DOORS
@pytest.mark.parametrize("case", WRONG)
def test_wrong_results_are_named_with_weight_and_function(case, door):
    rule, message = WRONG[case]
    model = linear()
    done, train = opened(door, model, rule)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as failure:
        train(*batch())
    assert "weight" in str(failure.value) or "sides" in str(failure.value)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) and done.mkor.step == 0


DERIVES = {
    "a shape": (lambda s: {**s, "L": s["L"][0]}, r"weight: Deriving\.derive returned 'L' as a tensor \[4\]"),
    "an entry": (lambda s: {**s, "x": s["L"]}, r"derive returned 'x', which init has not made"),
    "in place": (lambda s: {**s, "L": s["L"].mul_(2)}, r"derive changes its state in place: must return a new one"),
}


@DOORS
@pytest.mark.parametrize("case", DERIVES)
def test_wrong_derivations_leave_the_state(case, door):
    derive, message = DERIVES[case]
    done, train = opened(door, linear(), told(Deriving, derive=derive))
    with pytest.raises(ValueError, match=message):
        train(*batch())
    state = done.mkor.state_dict()
    assert torch.equal(state["weight.L"], torch.eye(4)) and int(state["step"]) == 1


@DOORS
def test_what_is_made_inside_may_be_changed_in_place(door):
    twice = lambda g, s: Gradient((g.weight * 1).mul_(2), g.bias)
    rule = told(update=lambda s: {**s, "n": (s["n"] * 1).add_(1)}, precondition=twice)
    done, train = opened(door, linear(), rule)
    train(*batch()), train(*batch())
    assert float(done.mkor.state_dict()["weight.n"]) == 2


@DOORS
@pytest.mark.parametrize("mode", ["step", "backward"])
def test_state_keeps_its_dtypes_whatever_is_returned(door, mode):
    """Half, integer and boolean entries, of any number of dimensions, as init has made them."""
    entries = {"half": torch.bfloat16, "count": torch.int64, "seen": torch.bool, "cube": torch.float32}
    size = lambda name: (2, 3, 4) if name == "cube" else ()
    rule = told(
        init=lambda shape, device: {k: torch.zeros(size(k), dtype=dtype, device=device) for k, dtype in entries.items()},
        update=lambda s: {key: t.float() + 1 for key, t in s.items()},
    )
    if (door, mode) == ("compile_step", "backward"):
        return
    done, train = opened(door, linear(), rule, **({} if door == "compile_step" else {"precondition": mode}))
    for _ in range(3):
        train(*batch())
    state = done.mkor.state_dict()
    assert {name: state[f"weight.{name}"].dtype for name in entries} == entries
    assert int(state["weight.count"]) == 3 and bool(state["weight.seen"]) and float(state["weight.half"]) == 3
    assert torch.equal(state["weight.cube"], torch.full((2, 3, 4), 3.0))


@DOORS
def test_derivation_of_integers_and_swaps_waits_for_a_step_that_counts(door):
    if door == "compile":
        return
    entries = {"n": 0, "A": 1, "B": 2}
    rule = told(
        Deriving,
        init=lambda shape, device: {k: torch.full((), v, dtype=torch.int64, device=device) for k, v in entries.items()},
        update=lambda s: s,
        derive=lambda s: {"n": s["n"] + 1, "A": s["B"], "B": s["A"]},
    )
    step, _ = opened(door, linear(), rule)
    step(torch.full((8, 6), float("nan")), torch.randn(8, 4))
    assert step.skipped == 1 and [int(step.mkor.state_dict()[f"weight.{k}"]) for k in entries] == [0, 1, 2]
    step(*batch())
    assert [int(step.mkor.state_dict()[f"weight.{k}"]) for k in entries] == [1, 2, 1]


@DOORS
def test_entries_of_a_fresh_state_have_memory_of_their_own(door):
    def init(shape, device):
        zero = torch.zeros(shape.O, device=device)
        return {"a": zero, "b": zero, "c": torch.zeros(1, device=device).expand(shape.O)}

    rule = told(init=init, update=lambda s: {key: t + i + 1 for i, (key, t) in enumerate(s.items())})
    done, train = opened(door, linear(), rule)
    train(*batch())
    assert [done.mkor.state_dict()[f"weight.{k}"].tolist() for k in "abc"] == [[1.0] * 4, [2.0] * 4, [3.0] * 4]


@DOORS
def test_a_state_may_be_called_scale(door):
    one = lambda shape, device: {"scale": torch.ones((), device=device)}
    rule = told(init=one, update=lambda s: {"scale": s["scale"] / 2})
    done, train = opened(door, linear(), rule)
    train(*batch())
    assert float(done.mkor.state_dict()["weight.scale"]) == 0.5


def test_but_not_where_the_library_has_one_of_that_name():
    rule = told(init=lambda shape, device: {"scale": torch.ones((), device=device)}, update=lambda s: s)
    _, train = opened("compile", linear(), rule, precondition="backward")
    with pytest.raises(ValueError, match=r"has a state named 'scale', which is the library's own name with precondition="):
        train(*batch())


@DOORS
def test_an_override_may_go_on_from_what_it_overrides(door):
    class Clipped(MKOR):
        def precondition(self, state, grad):
            made = super().precondition(state, grad)
            return made._replace(weight=made.weight.clamp(-1e-3, 1e-3))

    model, twin = linear(), linear()
    x, y = batch()
    opened(door, model, Clipped.published(rescale=False))[1](x, y)
    opened(door, twin, MKOR.published(rescale=False))[1](x, y)
    start = linear().weight.detach()
    moved, plain = ((start - m.weight.detach()) / 0.05 for m in (model, twin))
    torch.testing.assert_close(moved, plain.clamp(-1e-3, 1e-3), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("graft", [None, "gradient", "rms"])
def test_a_joint_bias_is_sized_with_its_weight_also_where_the_direction_is_the_rules_own(graft):
    @dataclass(frozen=True)
    class Joint(Told):
        joint_bias = True

        def precondition(self, state, grad):
            return Gradient(2 * grad.weight, 7 * grad.bias)

    rule = type("Sized", (Joint,), {"graft": graft})()
    model = linear()
    x, y = batch()
    raw = torch.autograd.grad(functional.mse_loss(model(x), y), list(model.parameters()))
    start = [p.detach().clone() for p in model.parameters()]
    opened("compile_step", model, rule)[1](x, y)
    made = torch.cat([2 * raw[0], 7 * raw[1][:, None]], 1)
    size = {None: made.norm(), "gradient": torch.cat([raw[0], raw[1][:, None]], 1).norm(), "rms": 0.2 * made.numel() ** 0.5}
    expected = made * (size[graft] / made.norm())
    for p, old, D in zip(model.parameters(), start, (expected[:, :-1], expected[:, -1]), strict=True):
        torch.testing.assert_close((old - p.detach()) / 0.05, D, rtol=1e-4, atol=1e-5)


@DOORS
def test_a_rule_with_a_right_side_alone_leaves_the_bias_to_the_base_optimizer_and_says_so(door):
    rule = told(Sided, init=lambda shape, device: {"R": torch.eye(shape.I, device=device) * 2}, update=lambda s: s,
                sides=lambda s: Sides(None, s["R"]))  # fmt: skip
    model = linear()
    x, y = batch()
    raw = torch.autograd.grad(functional.mse_loss(model(x), y), model.bias)[0]
    start = model.bias.detach().clone()
    done, train = opened(door, model, rule)
    train(x, y)
    torch.testing.assert_close((start - model.bias.detach()) / 0.05, raw, rtol=1e-4, atol=1e-5)
    assert done.coverage["bias"].declined.reason == "Sided leaves the bias of weight alone"


@DOORS
def test_schedules_may_be_read_anywhere(door):
    @dataclass(frozen=True)
    class Damped(Sided):
        c: Hyper = 1.0

        def sides(self, state):
            return Sides(state["L"] * self.c, None)

    rule = Damped(c=lambda step: 0.5 + step)
    assert len(mkor_fx.explain(linear(), batch()[0], rule=rule).covered) == 2
    model = linear()
    x, y = batch()
    raw = torch.autograd.grad(functional.mse_loss(model(x), y), model.weight)[0]
    start = model.weight.detach().clone()
    opened(door, model, rule)[1](x, y)
    torch.testing.assert_close((start - model.weight.detach()) / 0.05, 0.5 * raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_direction_that_is_not_linear_sees_no_loss_scale(fused):
    rule = told(precondition=lambda g, s: Gradient(g.weight.sign(), g.bias.sign()))
    model = linear()
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    handle, scaler = mkor_fx.compile(model, rule, backend="eager"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    scaler.scale(functional.mse_loss(handle(x), y)).backward()
    scaler.step(optimizer)
    torch.testing.assert_close((model.weight.detach() - start).abs(), torch.full((4, 6), 0.1))


# ---- what is kept by rule -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times(Told):
    factor: float = 1.0

    def update(self, state, uses, grad, step):
        return {**state, "n": state["n"] + (10.0 if self.factor is True else self.factor)}


def test_rules_that_are_equal_to_python_are_traced_apart_where_their_types_differ():
    found = []
    for factor in (1, True, 1.0):
        done, train = opened("compile_step", linear(), Times(factor=factor))
        train(*batch())
        found.append(float(done.mkor.state_dict()["weight.n"]))
    assert found == [1.0, 10.0, 1.0]


def test_a_field_that_does_not_take_part_in_comparison_is_refused():
    @dataclass(frozen=True)
    class Loose(Told):
        factor: float = field(default=1.0, compare=False)

    with pytest.raises(ValueError, match=r"Loose\.factor: programs are kept by rule.*without compare=False"):
        opened("compile_step", linear(), Loose())


def test_kinds_are_kinds():
    with pytest.raises(ValueError, match=r"Odd\.kinds\['L'\]='positive': must be a mkor_fx\.kinds\.Kind"):
        opened("compile_step", linear(), type("Odd", (Told,), {"kinds": {"L": "positive"}})())


def test_metrics_of_vectors_and_numbers():
    rule = type("Kinds", (Told,), {"kinds": {"n": Kind.POSITIVE}})()
    done, train = opened("compile_step", linear(), rule)
    train(*batch())
    assert done.mkor.metrics()["factor_min"] == 1.0


def test_slots_are_fine():
    @dataclass(frozen=True, slots=True)
    class Slotted(Times):
        damping: Hyper = 1.0

        def update(self, state, uses, grad, step):
            return {**state, "n": state["n"] + self.damping}

    done, train = opened("compile_step", linear(), Slotted(damping=lambda step: 2.0 + step))
    train(*batch()), train(*batch())
    assert float(done.mkor.state_dict()["weight.n"]) == 5.0


def test_statistics_of_nothing_need_no_scale():
    assert told().unscale((), torch.ones(())) == () and KFAC().unscale((torch.ones(1), torch.ones(1)), torch.ones(()))
    with pytest.raises(NotImplementedError, match=r"with a gradient scaler, or with mkor_fx\.compile on several ranks"):
        Rule.unscale(told(), (torch.ones(2),), torch.ones(()))


class Random(Told):
    def init(self, shape, device):
        return {"n": torch.rand((), device=device)}

    def update(self, state, uses, grad, step):
        return state

    def precondition(self, state, grad):
        return Gradient(grad.weight * (1 + state["n"]), grad.bias)


def random_state(rank, size):
    model = linear()
    torch.manual_seed(rank)
    done, train = opened("compile_step", model, Random())
    train(*batch())
    return float(done.mkor.state_dict()["weight.n"]), model.weight.detach()


def test_random_numbers_of_a_fresh_state_are_the_same_on_every_rank():
    (one, first), (other, second) = processes.values(random_state, 2)
    assert one == other > 0 and torch.equal(first, second)


def test_and_leave_the_users_generator_alone():
    x, y = batch()
    _, train = opened("compile_step", linear(), Random())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(x, y)
    assert torch.equal(torch.get_rng_state(), before)


@DOORS
@pytest.mark.parametrize("graft", [None, "gradient", "rms"])
@pytest.mark.parametrize("known", [False, True])
def test_a_normalized_product_is_sized_by_its_root_mean_square(door, graft, known):
    """Whether the rule knows it or not, and the state that comes with it is kept."""

    def normalize(state, product):
        made = product * torch.arange(1, 7)
        return Normalized(made, {**state, "n": state["n"] + 10}, made.square().mean().sqrt() if known else None)

    rule = type("Sized", (Normalizing,), {"graft": graft})((("normalize", normalize), ("update", lambda s: s)))
    model, (x, y) = linear(), batch()
    raw = torch.autograd.grad(functional.mse_loss(model(x), y), model.weight)[0]
    start = model.weight.detach().clone()
    done, train = opened(door, model, rule)
    train(x, y)
    made = raw * torch.arange(1, 7)
    size = {None: made.norm(), "gradient": raw.norm(), "rms": 0.2 * made.numel() ** 0.5}[graft]
    torch.testing.assert_close((start - model.weight.detach()) / 0.05, made * size / made.norm(), rtol=1e-4, atol=1e-5)
    assert float(done.mkor.state_dict()["weight.n"]) == 10
