"""The drop-in door at run time: carriers of statistics, and the update at the optimizer's step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .amp import loss_scales
from .carriers import Carriers, before_backward
from .ranks import Ranks, Replicas
from .state import FactorState, state_of

#: every live preconditioner; the two hooks below serve them all
_live: weakref.WeakSet[Preconditioner] = weakref.WeakSet()


class Known:
    """What the graphs so far say about one parameter: its layout and bias, or that it is declined."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param
        self.layout: Any = None
        self.bias: nn.Parameter | None = None
        self.declined = False


class Preconditioner:
    """Statistics and updates of one compiled model, resolved from the parameters of each call."""

    def __init__(
        self,
        model: nn.Module,
        rule: Any,
        refresh_every: int,
        build_update: Callable[..., Callable],
        job: Callable[..., Any],
        merge: Callable[[Any, Any], Any],
        ranks: Ranks | None = None,
        check_replicas_every: int = 0,
    ) -> None:
        self.rule, self.refresh_every, self.ranks = rule, refresh_every, ranks
        self.mkor = FactorState(model, refresh_every)
        self._replicas = Replicas(ranks, self.mkor, check_replicas_every, lambda: state_of(model, self.mkor))
        self.carriers = Carriers()
        self.known: dict[int, Known] = {}
        self._build_update, self._job, self._merge = build_update, job, merge
        self._programs: dict[tuple, Callable[..., list[Tensor]]] = {}
        self._raw: list[tuple[nn.Parameter, Tensor]] = []
        self._iteration = 0
        self._stepped: set[str] = set()
        self._windows: dict[str, int] = {}
        self._generation = 0
        _install_hooks()
        _live.add(self)

    # ---- the forward's side -------------------------------------------------------------------------------------------

    def register(self, param: nn.Parameter, layout: Any, bias: nn.Parameter | None) -> bool:
        """``param`` is a site (``layout``) or declined (None) in a graph. Declined in one graph is declined.

        Returns whether this graph sees it as the others do; if not, it is declined.
        """
        known = self.known.get(id(param))
        if known is None or known.param is not param:
            known = self.known[id(param)] = Known(param)
            if layout is not None:
                known.layout, known.bias = layout, bias
        elif layout is not None and known.layout is not None:
            known.layout = self._merge(known.layout, layout)
            known.bias = bias if known.bias is bias else None
        agrees = layout is None or known.layout is not None
        known.declined |= layout is None or not agrees
        return agrees

    def watch_backward(self, outputs: Any, params: Sequence[nn.Parameter]) -> None:
        """Start the statistics of ``params`` afresh when a backward begins that finds no accumulated gradient."""
        before_backward(outputs, lambda: self._restart(params))

    def _restart(self, params: Sequence[nn.Parameter]) -> None:
        for param in params:
            if param.grad is None:
                self.carriers.clear(param)

    # ---- the optimizer's side -----------------------------------------------------------------------------------------

    def precondition(self, optimizer: Optimizer) -> None:
        """Replace ``.grad`` of the optimizer's sites by their directions, until ``restore``.

        Only sites with fresh statistics: a gradient that did not come out of the compiled backward stays raw. On several
        ranks every site with a gradient takes part once one has fresh statistics: another rank may have seen it.
        """
        self.restore()
        held = {
            self.mkor.name(p): known
            for group in optimizer.param_groups
            for p in group["params"]
            if (known := self.known.get(id(p))) is not None and known.param is p and known.layout is not None
            if not known.declined and p.grad is not None
        }
        fresh = {name: known for name, known in held.items() if self.carriers.gradient(known.param) is not None}
        if not fresh:
            return
        sites = fresh if self.ranks is None else held
        if self._generation != self.mkor.generation:
            self._generation, self._stepped, self._windows = self.mkor.generation, set(), {}
        begins = not self._stepped or bool(sites.keys() & self._stepped)
        if begins:
            self._replicas.check()
        iteration = self.mkor.step if begins else self._iteration
        window = iteration // self.refresh_every
        refreshed = {name for name in sites if window > self._windows.get(name, self._loaded_window)}
        jobs, examples = [], []
        for name, known in sites.items():
            jobs.append(self._job(name, known.layout, name in refreshed))
            bias = known.bias.grad if known.bias is not None and known.layout.bias else None
            state = self.mkor.create(known.param, known.layout.fresh_state(self.rule))
            carrier = {"carrier": self.carriers.total(known.param)} if name in refreshed else {}
            examples.append({"grad": known.param.grad, "bias": bias, "state": state, **carrier})
        self._run(optimizer, iteration, jobs, examples, list(sites.values()))
        if begins:  # one step for all optimizers of an iteration: it ends when statistics come for a site it has used
            self._iteration, self._stepped = iteration, set()
            self.mkor.advance()
        self._stepped |= sites.keys()
        self._windows.update(dict.fromkeys(refreshed, window))

    @property
    def _loaded_window(self) -> int:
        """The last window of ``refresh_every`` steps in which factors of unknown history were refreshed."""
        return (self.mkor.loaded_step - 1) // self.refresh_every

    def _run(self, optimizer: Optimizer, iteration: int, jobs: list, examples: list[dict], sites: list[Known]) -> None:
        device = sites[0].param.device
        scales = loss_scales(optimizer, device)
        tensors: list[Tensor] = [torch.full((), iteration, dtype=torch.int64, device=device), *scales]
        for example in examples:
            state = example.pop("state")
            tensors += [t for t in example.values() if t is not None] + list(state.values())
            example["state"] = state
        key = (tuple(jobs), tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        if key not in self._programs:
            self._programs[key] = self._build_update(jobs, examples, tensors[0], scales)
        with torch.no_grad(), torch._C._DisableAutocast():
            directions = iter(self._programs[key](*tensors))
        for known, example in zip(sites, examples):
            self._swap(known.param, next(directions))
            if example["bias"] is not None:
                assert known.bias is not None
                self._swap(known.bias, next(directions))
            self.carriers.clear(known.param)

    def _swap(self, param: nn.Parameter, direction: Tensor) -> None:
        assert param.grad is not None
        self._raw.append((param, param.grad))
        param.grad = direction

    def restore(self) -> None:
        """Give the user's raw gradients back."""
        for param, raw in self._raw:
            param.grad = raw
        self._raw.clear()


# ---- hooks on torch optimizers --------------------------------------------------------------------------------------

_handles: list[Any] = []


def _install_hooks() -> None:
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Precondition what live models own; behind the closure where the user passes one."""
    owners = [p for p in list(_live) if any(id(q) in p.known for g in optimizer.param_groups for q in g["params"])]
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        for owner in owners:
            owner.precondition(optimizer)
        return None

    def wrapped() -> Any:
        for owner in list(_live):
            owner.restore()
        with torch.enable_grad():
            loss = closure()
        for owner in list(_live):
            owner.precondition(optimizer)
        return loss

    return (args[0], wrapped, *args[2:]) if "closure" not in kwargs else args, (
        {**kwargs, "closure": wrapped} if "closure" in kwargs else kwargs
    )


def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for owner in list(_live):
        owner.restore()
