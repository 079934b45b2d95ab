"""State from state, outside of any program."""

from __future__ import annotations

import torch
from torch import Tensor

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
