"""A trial of optimizers' steps before anything is compiled: which numbers they change, and whether they can be followed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...runtime.counters import counters_of, is_python_number, save_numbers
from ...runtime.optimizer_state import init_group, makes_state
from ...runtime.optimizers import Optimizers
from ..torch_api.dynamo import outside_dynamo
from .traced_member import Findings, stand_in
from .traced_optimizer import OTHERWISE, Update, attempt, counts_of, planned, refuse_hidden, refuse_idle
from .watched_branches import value_of

#: for how many steps it is tried what an optimizer does at its counts, and how many programs they may ask for
AHEAD, MOST = 1000, 8


def try_optimizers(optimizers: Optimizers, ahead: int = AHEAD) -> None:
    """Look at one step over a parameter of each kind. Numbers in the groups that it changes are state from here on; where it
    branches on them, also look at those of the next ``ahead`` steps that take another way. Torch's own optimizers are known
    to have none such. Changes nothing of the user's.

    Raises:
        ValueError: an optimizer cannot be traced, or changes what a program cannot; says what.
    """
    for member in optimizers.members:
        params = _of_each_kind(member)
        if type(member).__module__.partition(".")[0] == "torch" or not params:
            continue
        alone = Optimizers([member])
        _see_what_it_makes(alone, member, params)
        _, found = attempt(alone, params)
        counters_of(member).of_gradient |= member in found.of_gradient
        counters_of(member).groups.update(found.counters[member])
        ways = []
        for found in _ahead(alone, params, ahead):
            ways.append(found)
            if not found.late:  # state that is created in the step may come from a checkpoint
                refuse_hidden(found)
        if ahead > 1 and all(found.idle and not found.late for found in ways):
            refuse_idle(ways[0])
        save_numbers(member)


def _ahead(alone: Optimizers, params: list[nn.Parameter], steps: int) -> Iterator[Findings]:
    """What is found in this step, and in the next ones where they answer a branch in another way."""
    counts, ways = counts_of(alone, planned(alone, params)[0]), list[Update]()
    for _ in range(steps):
        later = SimpleNamespace(param_groups=[dict(group) for group in alone.param_groups])
        for number, value in counts.items():
            later.param_groups[number.group][number.key] = value
        way = next((way for way in ways if all(branch.holds(later) for branch in way.branches)), None)
        if way is None:
            if len(ways) == MOST:
                raise ValueError(
                    f"{alone.names}.step() takes more than {MOST} ways by its own count in the next {steps} steps, each a "
                    f"program of its own\n{OTHERWISE}"
                )
            way, found = attempt(alone, params, counts)
            ways.append(way)
            yield found
        if None in way.counts.values() or not any(branch.depends_on(counts) for way in ways for branch in way.branches):
            return
        counts = {number: float(value_of(way.counts[number], later)) for number in counts}


def _see_what_it_makes(alone: Optimizers, member: Optimizer, params: list[nn.Parameter]) -> None:
    """Note whether state is made of gradients, and the counters that are made in groups as tensors."""
    try:
        if makes_state(member):
            counters_of(member).of_gradient = _makes_state_of_gradients(member, params)
        (begun,) = planned(alone, params)[0].members
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{type(member).__name__} cannot make its state before it steps ({type(error).__name__}: {reason})\n{OTHERWISE}"
        ) from error
    for group, before in zip(begun.param_groups, member.param_groups, strict=True):
        made = {key for key, value in group.items() if isinstance(value, Tensor) and not isinstance(before.get(key), Tensor)}
        counters_of(member).groups.update(dict.fromkeys(made - {"lr", "weight_decay"}, Tensor))


def _of_each_kind(optimizer: Optimizer) -> list[nn.Parameter]:
    """The first parameter of each group, rank and dtype."""
    found = dict[tuple, nn.Parameter]()
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.requires_grad:
                found.setdefault((i, p.dim(), p.dtype), p)
    return list(found.values())


def _makes_state_of_gradients(optimizer: Optimizer, params: list[nn.Parameter]) -> bool:
    """Whether state that is made for copies of ``params`` differs with their gradients."""
    if any(p.device.type == "meta" for p in params):
        return False
    made = list[list[Tensor]]()
    with torch.no_grad(), outside_dynamo(), torch.random.fork_rng(devices=[]):
        for value in (0.0, 1.0):
            torch.manual_seed(0)
            copies = {id(p): nn.Parameter(p.detach().clone()) for p in params}
            clone = stand_in(optimizer, [], copies, Tensor.clone)  # type: ignore[arg-type]
            for group in clone.param_groups:
                if group["params"]:
                    init_group(clone, group, group["params"], [torch.full_like(p, value) for p in group["params"]])
            states = [clone.state[copy] for copy in copies.values()]
            numbers = {key: type(value) for own in states for key, value in own.items() if is_python_number(value)}
            counters_of(optimizer).state.update(numbers)
            made.append([value for state in states for value in state.values() if isinstance(value, Tensor)])
    return any(one.shape != other.shape or not torch.equal(one, other) for one, other in zip(*made, strict=True))
