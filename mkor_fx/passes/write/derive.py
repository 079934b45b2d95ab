"""State from state, outside of any program."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...rules import Gradient, Rule, Shape, Use
from ...rules.hyper import bind
from ...rules.results import WrongResult, check_state
from ..match.layout import Layout
from ..torch_api.backend import new_fake_mode, plain_tracing
from .refresh import all_finite, select
from .vectors import Numbers


def derive_one(
    layout: Layout, numbers: Numbers, state: dict[str, Tensor], taken: Tensor | None = None
) -> dict[str, Tensor]:
    """New state of one weight; as it was where something in it is not finite, or the step was not ``taken`` (0-dim)."""
    rule, given = bind(layout.rule, numbers), {name: t.clone() for name, t in state.items()}

    def member(own: dict[str, Tensor]) -> dict[str, Tensor]:
        new = rule.derive(own)
        check_state(rule, "derive", new, own)
        return new

    with plain_tracing():
        new = layout.each(member)(dict(given))
        if any(t._version for t in given.values()):
            raise WrongResult(f"{type(rule).__name__}.derive changes its state in place: must return a new one")
        changed = {name: t for name, t in new.items() if t is not given[name]}
        keep = all_finite([t for t in changed.values() if t.is_floating_point()], next(iter(state.values())))
        return {**state, **select(keep if taken is None else keep & taken, changed, {n: state[n] for n in changed})}


def what_is_derived(layout: Layout) -> dict[str, Tensor]:
    """The tensors of a state, of all members, that ``derive`` makes anew, by name; nothing is computed."""
    rule = layout.rule.at_first_step
    with torch.no_grad(), new_fake_mode(), plain_tracing():
        state = rule.init(layout.shape, torch.device("cpu"))
        new = rule.derive(dict(state))
    made = {name: t for name, t in new.items() if t is not state[name]}
    return made if layout.members is None else {n: t.expand(layout.members, *t.shape) for n, t in made.items()}


@functools.lru_cache(maxsize=1024)
def moving_state(rule: Rule, shape: Shape) -> frozenset[str]:
    """The tensors of a state that a rule as it is at step 0 makes anew at steps, by ``update``, ``advance`` or
    ``normalize``, by name; nothing is computed."""
    with torch.no_grad(), new_fake_mode(), plain_tracing():
        state = rule.init(shape, torch.device("cpu"))
        grad = Gradient(torch.empty(shape.O, shape.I), torch.empty(shape.O) if shape.bias else None)
        step, rows = torch.empty((), dtype=torch.int64), (torch.empty(1, shape.I), torch.empty(1, shape.O))
        read: dict[str, Any] = {"state": state} if rule.reads_state else {}
        read |= {"key": step} if rule.draws else {}
        use = Use(rule.summarize(shape, *rows, **read), torch.empty(()), opposite=False)
        moved = [rule.update(dict(state), [use], grad, step), rule.advance(dict(state), grad, step)]
        if rule.overrides("normalize"):
            moved.append(rule.normalize(dict(state), grad.weight, grad.weight).state)
    return frozenset(name for name in state if any(new[name] is not state[name] for new in moved))


def in_the_way(rule: Rule) -> frozenset[str]:
    """What ``derive`` makes anew of a state that other functions of a rule make anew as well: between a state and what
    is derived of it later no step may lie."""
    shape = Shape(4, 3, bias=True)
    with torch.no_grad(), new_fake_mode(), plain_tracing():
        state = rule.init(shape, torch.device("cpu"))
        new = rule.derive(dict(state)) if state else {}
    return moving_state(rule, shape) & {name for name, t in new.items() if t is not state[name]} if state else frozenset()
