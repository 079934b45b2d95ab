"""The step of torch optimizers as a graph: traced from the live objects, with their numbers as inputs.

Every number of ``param_groups`` (learning rate, betas, momentum, weight decay, ...) becomes an entry of one packed
tensor, so that schedulers compile nothing again. Comparisons such as ``weight_decay != 0`` are answered from the value at
trace time and remembered in ``Update.branches``; only a change of their answer asks for another trace. Numbers that the step
itself changes are state, like its tensors (``runtime/counters.py``). What cannot be followed exactly is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...runtime.counters import as_tensor, counters_of, places
from ...runtime.optimizer_state import Number, initialise_state, numbers_of, read_number, tensor_state
from ...runtime.optimizers import Optimizers
from ..torch_api.backend import new_fake_mode
from ..torch_api.dynamo import compiling, outside_dynamo
from ..torch_api.tracing import Outline, forget_values, shaped_like, trace
from .python_numbers import PythonNumber, PythonNumbers
from .traced_member import Findings, Member, stand_in
from .watched_branches import Branch
from .what_a_step_changes import changed, kept_numbers, snapshot
from .without_host import Refused

OTHERWISE = "Use mkor_fx.compile(model) with your own loop: it works with every torch optimizer."


@dataclass(frozen=True)
class Update:
    """The traced step: inputs ``params, grads, state tensors, counters, packed numbers``; outputs ``new params, new state,
    new counters``, and the numbers as they were.

    ``states`` are examples of each parameter's state tensors, by name; ``counters`` of what groups hold, by group and key.
    ``counts`` is what the counters become, as far as that is computed from numbers alone.
    """

    module: fx.GraphModule
    states: list[dict[str, Tensor]]
    counters: dict[tuple[int, str], Tensor]
    branches: tuple[Branch, ...]
    counts: dict[Number, Any]

    def fits(self, optimizers: Optimizers, params: Sequence[nn.Parameter]) -> bool:
        """Whether branches are answered as when it was traced, and the state of ``params``, as far as there is any, looks as
        it did then."""
        if not all(branch.holds(optimizers) for branch in self.branches):
            return False
        found = [tensor_state(optimizers, param) for param in params]
        return all(not own or _look(own) == _look(state) for own, state in zip(found, self.states, strict=True))


def planned(optimizers: Optimizers, params: Sequence[nn.Parameter]) -> tuple[Optimizers, list[Tensor]]:
    """Copies of the optimizers over stand-ins for ``params``, with the state that their first step would begin from: fake
    tensors, so that nothing is allocated, and nothing of the user's is changed."""
    with torch.no_grad(), outside_dynamo(), new_fake_mode():
        stands_for = {id(p): shaped_like(p) for p in params}
        clones = Optimizers([stand_in(member, params, stands_for) for member in optimizers.members])
        initialise_state(clones, list(stands_for.values()))  # type: ignore[arg-type]
    return clones, list(stands_for.values())


def trace_update(optimizers: Optimizers, params: Sequence[nn.Parameter]) -> Update:
    """Trace one step of every optimizer over ``params``, those with a gradient. Allocates nothing, changes nothing.

    Raises:
        ValueError: an optimizer cannot be traced, or does what a program would not; says what.
    """
    update, found = attempt(optimizers, params)
    for name, keys in found.late.items():
        raise ValueError(
            f"{name} creates its state ({', '.join(sorted(set(keys)))}) inside step(), where it cannot be compiled. Call "
            "optimizer.step() once before compile_step, or use mkor_fx.compile(model) with your own loop."
        )
    refuse_hidden(found)
    return update


def known_update(
    known: dict[tuple[int, ...], Update], optimizers: Optimizers, params: Sequence[nn.Parameter]
) -> Update:
    """``trace_update``, or what it gave to another program, which may have failed since, if that still fits."""
    key = tuple(id(p) for p in params)
    if key not in known or not known[key].fits(optimizers, params):
        known[key] = trace_update(optimizers, params)
    return known[key]


def refuse_idle(found: Findings) -> None:
    """Raises ValueError for a step that changes nothing."""
    for name in found.idle:
        raise ValueError(f"{name}.step() changes no weight when it is called without a closure\n{OTHERWISE}")


def refuse_hidden(found: Findings) -> None:
    """Raises ValueError for what a step changes and no program would."""
    for name, hidden in found.hidden.items():
        raise ValueError(
            f"{name}.step() changes {', '.join(dict.fromkeys(hidden))}, which a compiled step would never see change: "
            "keep it as a tensor in optimizer.state, or use mkor_fx.compile(model) with your own loop."
        )


def attempt(
    optimizers: Optimizers, params: Sequence[nn.Parameter], counts: Mapping[Number, float] | None = None
) -> tuple[Update, Findings]:
    """As ``trace_update``; what the step does besides is returned. ``counts``: what counters are to stand at, if not as
    they do."""
    if len(params) != len({id(p) for p in params}):
        raise AssertionError("a parameter is listed twice")
    numbers, found, name = numbers_of(optimizers), Findings(), optimizers.names
    positions = {id(p): i for i, p in enumerate(params)}
    branches: list[Branch] = []
    after: dict[Number, Any] = {}
    try:
        start, stand_ins = planned(optimizers, params)
        stand = counts_of(optimizers, start) if counts is None else counts
        states = [tensor_state(start, p) for p in stand_ins]  # type: ignore[arg-type]
        with torch.no_grad(), stand_ins[0].fake_mode:  # type: ignore[attr-defined]
            counters = {
                (begin + i, key): as_tensor(group[key], params[0].device)
                for (member, begin), begun in zip(optimizers.begins(), start.members)
                for i, group in enumerate(begun.param_groups)
                for key in places(counters_of(member), group)
            }
            packed = torch.empty(len(numbers), dtype=torch.float64, device=params[0].device)
            gradients = [shaped_like(p) for p in params]

        def run(ps: list[Tensor], gs: list[Tensor], ss: list[dict[str, Tensor]], cs: dict, packed: Tensor) -> tuple:
            nonlocal name
            ps, ss = [p.clone() for p in ps], [{k: v.clone() for k, v in s.items()} for s in ss]
            entries = {number: packed[i] for i, number in enumerate(numbers)}
            new: dict[tuple[int, str], Tensor] = {}
            kept = dict[int, dict[str, Any]]()
            for p, g in zip(ps, gs):
                p.grad = g
            for (member, begin), begun in zip(optimizers.begins(), start.members):
                name = type(member).__name__
                mode = PythonNumbers(ps)
                for n, tensor in entries.items():
                    value = read_number(optimizers, n)
                    mode.add(PythonNumber(tensor, n, float(value), not isinstance(value, Tensor), origin=f"{n.key!r}"))
                one = Member(member, begin, begun, mode, found)
                own = one.own_positions(positions)
                clone = one.clone([[ps[at] for at in members] for members in own], entries, cs, stand)
                for at in (at for members in own for at in members):
                    clone.state[ps[at]] = one.state(begun.state.get(stand_ins[at], {}), ss[at])
                one.watch_init(clone)
                with kept_numbers(member):
                    before, live = snapshot(clone), snapshot(member)
                    with compiling(), mode, mode.hears():
                        inspect.unwrap(type(member).step)(clone)
                    one.note(before, snapshot(clone))
                    if itself := [place.name for place in changed(live, snapshot(member))]:
                        found.hidden[name] += itself
                branches.extend(mode.branches)
                new |= one.new_counters(clone, cs)
                after.update(one.next_counts(clone))
                for at in (at for members in own for at in members):
                    kept[at] = one.new_state(clone.state[ps[at]], ss[at])
            return ps, [kept[at][key] for at, s in enumerate(ss) for key in s], [new[place] for place in cs], packed

        with outside_dynamo():
            # Views stay views: Inductor has no code of its own for most of the operators that make them as copies.
            function = torch.func.functionalize(run, remove="mutations")
            traced = trace(function, (stand_ins, gradients, states, counters, packed)).module
        inputs, outputs = traced.graph.find_nodes(op="placeholder"), traced.graph.output_node().args[0]
        if all(_same_value(new, old) for new, old in zip(outputs[: len(params)], inputs)):
            found.idle.append(optimizers.names)
        if outputs[-1] is not inputs[-1] and not found.hidden:
            found.hidden[name].append("numbers of its groups through views of them")
        _check(traced)
    except Exception as error:
        raise ValueError(
            f"{name}.step() cannot be traced into the compiled step: {_reason(error)}{_suspects(optimizers)}\n{OTHERWISE}"
        ) from error
    forget_values(traced)
    return Update(traced, states, counters, tuple(dict.fromkeys(branches)), after), found


def counts_of(optimizers: Optimizers, start: Optimizers) -> dict[Number, float]:
    """What the counters of Python numbers stand at; before a first step, as in ``start``. Waits for the device."""
    found = {}
    for (member, begin), begun in zip(optimizers.begins(), start.members):
        known = counters_of(member)
        for i, (group, fresh) in enumerate(zip(member.param_groups, begun.param_groups)):
            for key in (key for key in places(known, fresh) if known.groups[key] is not Tensor):
                found[Number(begin + i, key)] = float(group.get(key, fresh[key]))
    return found


def _look(state: Mapping[str, Tensor]) -> dict[str, Outline]:
    return {key: Outline.of(tensor) for key, tensor in state.items()}


def _check(traced: fx.GraphModule) -> None:
    """Raises Refused for what a program cannot do as the optimizer does it."""
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            raise Refused(f"it holds a tensor of its own ({node.target})")
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Refused(f"it draws random numbers ({node.target}), other ones than its own loop and on each rank")


def _same_value(new: fx.Node, old: fx.Node) -> bool:
    return new is old or (new.target is torch.ops.aten.clone.default and new.args[0] is old)


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, KeyError):
        return f"KeyError: {text}"
    if "mutating a non-functional tensor" in text:
        return "it changes a tensor that no program is passed, as one in a list of its state"
    if "non-ATen" in text and (operator := re.search(r"aten::[\w.]+", text)):
        return f"it calls {operator.group()}, which torch cannot trace"
    if "_local_scalar_dense" in text or "data-dependent" in text:
        return "it reads a value of a tensor on the host (an if on a tensor, float(), int())"
    return text


def _suspects(optimizers: Optimizers) -> str:
    """What an optimizer keeps that no program takes, which is why a trace may have failed."""
    found = []
    for member in optimizers.members:
        found += [f"self.{key}" for key, value in vars(member).items() if isinstance(value, Tensor)]
        for i, group in enumerate(member.param_groups):
            large = [key for key, value in group.items() if isinstance(value, Tensor) and value.numel() > 1]
            found += [f"param_groups[{i}][{key!r}]" for key in large]
        kept = [each for state in member.state.values() if isinstance(state, dict) for each in state.items()]
        found += [f"state {key!r}" for key, value in kept if isinstance(value, (dict, list, tuple))]
    return f"; it keeps {', '.join(dict.fromkeys(found))}, which no program takes" if found else ""
