"""Torch's optimizer steps, followed from outside: which is the outermost, and that it ends, even if it raises.

An optimizer may wrap another one (Lookahead, SAM, ZeroRedundancyOptimizer) or call the step of its base class: torch's
hooks then run for each. A weight belongs to the outermost step of an optimizer that holds it; steps inside of that one see
what it has made of the gradients.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from types import CellType, FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Follower(Protocol):
    """A compiled model that acts at the steps of optimizers that hold its parameters."""

    seen: Any

    def holds(self, optimizer: Optimizer) -> bool: ...

    def meet(self, optimizer: Optimizer) -> None: ...

    def act(self, step: Step, others: list[Any]) -> None: ...

    def look(self, step: Step, called: list[Any]) -> None: ...


class Step:
    """One call of an optimizer's step: the gradients that were replaced for it, and what is to be done at its end.

    ``handled`` are the parameters, by identity, that have been seen to, here or in a step around this one.
    """

    def __init__(self, optimizer: Optimizer, frame: FrameType, handled: set[int]) -> None:
        self.optimizer, self.frame, self.handled = optimizer, frame, handled
        self._raw: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        self._others: list[tuple[nn.Parameter, Tensor]] = []
        self._pending: list[Callable[[], None]] = []
        self._clears, self._deaf = False, lambda: None

    def parameters(self) -> list[nn.Parameter]:
        """Those with a gradient that nobody has seen to yet."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p for p in held if p.grad is not None and id(p) not in self.handled]

    def holds(self, param: nn.Parameter) -> bool:
        """Whether the optimizer steps a parameter."""
        return any(param is p for group in self.optimizer.param_groups for p in group["params"])

    def replace(self, param: nn.Parameter, direction: Tensor | None) -> None:
        """Let the optimizer see ``direction`` in place of the gradient; None hides the parameter from it."""
        assert param.grad is not None
        if direction is not None and direction.stride() != param.stride():  # fused optimizers read memory in one run
            direction = torch.empty_like(param, dtype=direction.dtype).copy_(direction)
        self._raw.append((param, param.grad, direction))
        param.grad = direction
        if direction is None:
            self._hear_of_clearing()

    def _hear_of_clearing(self) -> None:
        """An optimizer that clears its gradients leaves no trace on those that are hidden: note that it does."""
        if "zero_grad" in vars(self.optimizer):
            return
        clear = self.optimizer.zero_grad

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            self._clears = True
            clear(*args, **kwargs)

        self.optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        self._deaf = lambda: vars(self.optimizer).pop("zero_grad", None)

    def at_the_end(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the parameters are what they were, and the innermost step is about to change them."""
        self._pending.append(action)

    def take(self) -> None:
        """Do what was to be done."""
        pending, self._pending = self._pending, []
        for action in pending:
            action()

    def note_others(self) -> None:
        """Remember gradients that nobody has replaced: if they are gone at the end, the optimizer has cleared all."""
        replaced = {id(p) for p, _, _ in self._raw}
        held = (p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in replaced)
        self._others = [(p, p.grad) for p in held if p.grad is not None]

    def restore(self) -> None:
        """Give the user's raw gradients back, unless the step has cleared them."""
        shown = [(p, grad) for p, _, grad in self._raw if grad is not None] + self._others
        cleared = self._clears or (bool(shown) and all(p.grad is not grad for p, grad in shown))
        for param, raw, shown_as in self._raw:
            if param.grad is shown_as and not cleared:
                param.grad = raw
        self._deaf()
        self._raw, self._others, self._pending, self._clears = [], [], [], False


class _Running(threading.local):
    """The steps that are under way in a thread, outermost first."""

    def __init__(self) -> None:
        self.steps: list[Step] = []


_running = _Running()
_number = itertools.count()
#: every live follower, in order of creation; the two hooks below serve them all
_live: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_installed: list[Any] = []


def follow(follower: Follower) -> None:
    """Let ``follower`` act at optimizers' steps as long as it lives."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))
        _installed.append(register_optimizer_step_post_hook(_after_step))
    _live[follower] = next(_number)


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Act for the models that the optimizer holds parameters of; behind the closure where the user passes one."""
    followers = [f for f, _ in sorted(_live.items(), key=lambda item: item[1]) if f.holds(optimizer)]
    if not followers:
        return None
    frame = sys._getframe(1)
    around = _steps_around(frame)
    for outer in around:
        outer.take()
    handled = {id(p) for outer in around for group in outer.optimizer.param_groups for p in group["params"]}
    step = Step(optimizer, frame, handled)
    _running.steps.append(step)
    _hear_of_the_end(optimizer, frame)

    def act() -> None:
        step.handled = set(handled)
        for follower in followers:
            follower.meet(optimizer)
        for follower in followers:
            follower.act(step, followers)
        step.note_others()
        called = [follower for follower in followers if follower.seen.called]
        for follower in followers:
            follower.look(step, called)

    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        try:
            act()
        except BaseException:  # torch's wrapper has not come to what hears of the end
            _end(frame, failed=True)
            raise
        return None

    def wrapped() -> Any:
        step.restore()
        with torch.enable_grad():
            loss = closure()
        act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": wrapped}
    return (args[0], wrapped, *args[2:]), kwargs


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    _end(sys._getframe(1), failed=False)


def _steps_around(frame: FrameType) -> list[Step]:
    """The steps that the one of ``frame`` is called in. Any other that is listed did not end as it should: it ends now."""
    calls, above = [], frame.f_back
    while above is not None:
        if above.f_code is frame.f_code:
            calls.append(above)
        above = above.f_back
    for step in [step for step in _running.steps if step.frame not in calls]:
        _running.steps.remove(step)
        step.restore()
    return list(_running.steps)


def _end(frame: FrameType, failed: bool) -> None:
    """The step of ``frame`` has ended: what was pending is done, or left where it has failed; raw gradients come back."""
    for step in [step for step in _running.steps if step.frame is frame]:
        _running.steps.remove(step)
        try:
            if not failed:
                step.take()
        finally:
            step.restore()


def _hear_of_the_end(optimizer: Optimizer, frame: FrameType) -> None:
    """torch runs its post hooks behind a step that returns, not behind one that raises: put a function that hears of both
    between torch's wrapper, whose call ``frame`` is, and the class's own step."""
    cell = _cell_of_step(optimizer, frame)
    if cell is None or getattr(cell.cell_contents, "ends_heard", False):
        return
    own = cell.cell_contents

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        wrapper = sys._getframe(1)
        try:
            result = own(*args, **kwargs)
        except BaseException:
            _end(wrapper, failed=True)
            raise
        _end(wrapper, failed=False)
        return result

    step.ends_heard = True  # type: ignore[attr-defined]
    cell.cell_contents = step


def _cell_of_step(optimizer: Optimizer, frame: FrameType) -> CellType | None:
    """Where the wrapper that ``frame`` is a call of keeps the step that it wraps: a free variable ``func``."""
    called = frame.f_locals.get("func")
    for cls in type(optimizer).__mro__:
        step: Any = vars(cls).get("step")
        names = getattr(getattr(step, "__code__", None), "co_freevars", ())
        if "func" in names:
            cell = step.__closure__[names.index("func")]
            if cell.cell_contents is called:
                return cell
    return None
