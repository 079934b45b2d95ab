"""A trial of optimizers' steps before anything is compiled: which numbers they change, and whether they can be followed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...runtime.counters import counters_of, is_python_number, save_numbers
from ...runtime.optimizer_state import init_group, makes_state
from ...runtime.optimizers import Optimizers
from ..torch_api.dynamo import outside_dynamo
from .traced_member import stand_in
from .traced_optimizer import OTHERWISE, attempt, planned, refuse_hidden


def try_optimizers(optimizers: Optimizers) -> None:
    """Look at one step over a parameter of each kind. Numbers in the groups that it changes are state from here on. Torch's
    own optimizers are known to have none such. Changes nothing of the user's.

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
        if member in found.of_gradient or found.counters[member]:
            counters_of(member).of_gradient |= member in found.of_gradient
            counters_of(member).groups.update(found.counters[member])
            _, found = attempt(alone, params)
        if not found.late:  # state that is created in the step may come from a checkpoint
            refuse_hidden(found)
        save_numbers(member)


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
