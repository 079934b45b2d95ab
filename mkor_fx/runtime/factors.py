"""State of a model's preconditioned weights, by parameter name."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Group, Recipe, Saved, flat, same_shapes, some, unlike
from .measures import measure
from .rotation import Rotation
from .switch import Switch


class FactorState(Saved):
    """The factors of one model: ``state_dict()`` / ``load_state_dict()``, ``reset()``, ``step``.

    Looked up by parameter identity at every call, so that nothing depends on what a graph was compiled for; the tensors
    follow their parameter's device, and no cast of the model touches them.

    ``expect(name, param)`` are the states that a weight could have, before it is known how it is used: each a group of
    tensors without memory.
    """

    def __init__(
        self,
        model: nn.Module,
        refresh_every: int = 1,
        expect: Callable[[str, nn.Parameter], list[Group]] = lambda name, param: [],
    ) -> None:
        self._model, self.rotation = model, Rotation(refresh_every)
        self._expect = expect
        self._names: dict[int, tuple[str, weakref.ref[nn.Parameter]]] = {}
        self._factors: dict[str, Group] = {}
        self._recipes: dict[str, Recipe] = {}
        self._pending: dict[str, Group] = {}
        #: how many steps behind the first of its window a weight's state is derived, by name (0 of others), and states
        #: that wait
        self.slots: Mapping[str, int] = {}
        self.put_by: dict[str, Group] = {}
        self._strict = True
        self._afresh: dict[str, str] = {}
        self._step_tensors: dict[torch.device, Tensor] = {}
        #: the rank that keeps a weight's factors, by name; None: every rank. Factors of others, as meta tensors.
        self.owners: dict[str, int | None] = {}
        self._elsewhere: dict[str, Group] = {}
        self.ranks: Any = None
        #: between the rule and the base optimizer alone, None: always the rule
        self.switch: Switch | None = None
        #: what factors will be once everything on its way has arrived, by key
        self.newer: Callable[[], dict[str, Tensor]] = dict
        #: whether the factors of the last step are still to be refreshed
        self.waits: Callable[[], bool] = lambda: False
        self._step = 0
        self.learn_names()
        #: how often the state was replaced from outside, and the step it was then at
        self.generation, self.loaded_step = 0, 0

    def __repr__(self) -> str:
        """Without waiting for the device."""
        held = sum(t.numel() * t.element_size() for t in self.tensors().values()) / 2**20
        return f"FactorState(step {self.step}, {len(self._factors)} weights, {held:.1f} MiB, {self.rotation})"

    # ---- steps ------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps taken with fresh statistics."""
        return self._step + self.waits()

    @property
    def clock(self) -> int:
        """The step that factors are of, as they are."""
        return self._step

    def advance(self) -> None:
        self._step += 1
        for tensor in self._step_tensors.values():
            tensor.add_(1)
        if self._afresh:
            told = some([f"{name} ({why})" for name, why in self._afresh.items()])
            self._afresh = {}
            warnings.warn(f"mkor_fx: weights that start with fresh factors: {told}", stacklevel=2)

    def step_tensor(self, device: torch.device) -> Tensor:
        """The step count as a 0-dim int64 tensor on ``device``, kept in place."""
        if device not in self._step_tensors:
            self._step_tensors[device] = torch.tensor(self._step, device=device)
        return self._step_tensors[device]

    @property
    def first_order(self) -> bool:
        """Whether a ``Hybrid`` has left the rule to the base optimizer for now."""
        return self.switch is not None and self.switch.first_order

    def observe(self, loss: Tensor) -> None:
        """With ``mkor_fx.compile(model, Hybrid(rule))``: the loss of the step that an optimizer has just taken, the
        mean over its micro-batches, a scalar. Once for every step, on every rank; the device is waited for once a window.

        Raises:
            ValueError: there is no ``Hybrid`` to tell, or it is a compiled step's, which knows its own loss.
        """
        if self.switch is None:
            raise ValueError("mkor.observe(loss): this rule is no Hybrid, which alone goes by losses")
        self.switch.tell(loss, self.step - 1)

    # ---- factors ----------------------------------------------------------------------------------------------------

    def name(self, param: nn.Parameter) -> str:
        """First name of ``param`` in the model, now or before: sharding wrappers swap parameters in and out.

        Raises:
            ValueError: the model does not own it.
        """
        if self.known(param) is None:
            self.learn_names()
        name = self.known(param)
        if name is None:
            raise ValueError(f"a parameter of shape {tuple(param.shape)} is not one of the compiled model's")
        return name

    def known(self, param: nn.Parameter) -> str | None:
        """As ``name``, of the parameters that have been looked at; None for others."""
        entry = self._names.get(id(param))
        return entry[0] if entry is not None and entry[1]() is param else None

    def learn_names(self) -> None:
        """Look at the parameters that the model has now."""
        self._names = {key: known for key, known in self._names.items() if known[1]() is not None}
        self._names |= {id(p): (name, weakref.ref(p)) for name, p in self._model.named_parameters()}

    def forget_gone(self) -> None:
        """Drop the factors of weights that the model does not have any more."""
        self.learn_names()
        there = {name for name, _ in self._model.named_parameters()}
        for held in (self._factors, self._recipes, self._pending, self.put_by, self._elsewhere, self._afresh, self.owners):
            for name in [name for name in held if name not in there]:
                del held[name]

    def of(self, param: nn.Parameter) -> Group:
        """The factors of ``param``, on its device."""
        factors = self._factors[self.name(param)]
        for key, tensor in factors.items():
            if tensor.device != param.device:
                factors[key] = tensor.to(param.device)
        return factors

    def create(self, param: nn.Parameter, recipe: Recipe) -> Group:
        """The factors of ``param``: those it has, those that were loaded for it, or fresh ones. Where it is used or shaped
        otherwise than before, fresh ones.

        Raises:
            ValueError: loaded factors do not fit.
        """
        name = self.name(param)
        known = self._recipes.get(name)
        if known is not recipe and known != recipe:
            self._take(name, self.prepare(name, recipe, param.device), recipe)
        return self.of(param)

    def prepare(self, name: str, recipe: Recipe, device: torch.device) -> Group | None:
        """The factors that a weight is to begin with; None: it keeps those that it has. Changes nothing.

        Raises:
            ValueError: loaded factors do not fit, or a name in the state is none.
        """
        fresh = recipe.fresh_state(device)
        odd = [key for key in fresh if not key or "." in key]
        if odd:
            raise ValueError(f"{recipe}: {some(odd)} cannot name a tensor of a state: names have no dots")
        loaded = self._pending.get(name)
        if name in self._factors and same_shapes(fresh, self._factors[name]):
            return None
        if loaded is None:
            return fresh
        if not same_shapes(fresh, loaded):
            if self._strict:
                raise ValueError(f"the state is another model's: {unlike(name, loaded, fresh)}")
            return fresh
        for key, tensor in fresh.items():
            tensor.copy_(loaded[key])
        return fresh

    def _take(self, name: str, factors: Group | None, recipe: Recipe) -> None:
        if factors is not None:
            loaded = self._pending.pop(name, None)
            fits = loaded is not None and same_shapes(loaded, factors)
            if name in self._factors:
                self._afresh[name] = "it is another weight than before"
                self.put_by.pop(name, None)
            elif self.generation > 0 and self._step == self.loaded_step > 0 and not fits:
                self._afresh[name] = "the loaded state has none that fit"
            self._factors[name] = factors
        self._recipes[name] = recipe

    def place(self, owners: Mapping[str, int | None], recipes: Mapping[nn.Parameter, Recipe], at: int) -> None:
        """Create, on the rank that is ``at`` in its row, the factors of those parameters that it owns, or that have no
        owner. All or none.

        Raises:
            ValueError: loaded factors do not fit.
        """
        named = {self.name(param): (param, recipe) for param, recipe in recipes.items()}
        here = {name: entry for name, entry in named.items() if owners.get(name) in (None, at)}
        others = {name: entry[1].fresh_state(torch.device("meta")) for name, entry in named.items() if name not in here}
        for name, group in others.items():
            if name in self._pending and not same_shapes(group, self._pending[name]):
                raise ValueError(f"the state is another model's: {unlike(name, self._pending[name], group)}")
        new = {
            name: self.prepare(name, recipe, param.device)
            for name, (param, recipe) in here.items()
            if self._recipes.get(name) != recipe
        }
        for name, factors in new.items():
            self._take(name, factors, here[name][1])
        for name in others:
            self._pending.pop(name, None)
            self.put_by.pop(name, None)
        self._elsewhere |= others
        self.owners |= {name: owners.get(name) for name in named}

    def holds(self, param: nn.Parameter) -> bool:
        """Whether this rank keeps the factors of ``param``."""
        return self.name(param) in self._factors

    def tensors(self) -> dict[str, Tensor]:
        """``{"<parameter>.<factor>": tensor}``, the live tensors of this rank."""
        return flat(self._factors)

    def replicated(self) -> dict[str, Tensor]:
        """Those of ``tensors()`` that every rank keeps."""
        return flat({name: group for name, group in self._factors.items() if self.owners.get(name) is None})

    def reset(self) -> None:
        """Forget everything: fresh factors, step 0."""
        self._pending.clear()
        self.put_by.clear()
        self._afresh.clear()
        if self.switch is not None:
            self.switch.reset()
        for name in self._factors:
            self._start_afresh(name)
        self._set_step(0)

    def _start_afresh(self, name: str) -> None:
        device = next(iter(self._factors[name].values())).device
        for key, tensor in self._recipes[name].fresh_state(device).items():
            self._factors[name][key].copy_(tensor)

    def derived(self, name: str, derive: Callable[[Recipe, Group], Group], state: Group | None = None) -> Group:
        """What ``derive(recipe, state)`` makes of a weight's state. A decomposition that fails keeps what there is."""
        state = self._factors[name] if state is None else state
        try:
            with torch.no_grad():
                return derive(self._recipes[name], state)
        except torch.linalg.LinAlgError as error:
            warnings.warn(f"mkor_fx: {name} keeps what it has derived before: {error}", stacklevel=2)
            return state
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def recipe(self, name: str) -> Recipe:
        """What makes the state of a weight."""
        return self._recipes[name]

    def state(self, name: str) -> Group:
        """The factors of a weight that are here."""
        return self._factors[name]

    def names(self) -> list[str]:
        """Of the weights whose factors are here."""
        return list(self._factors)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model is a plain one."""

    def __reduce__(self) -> tuple:
        return type(None), ()

    def metrics(self, per_factor: bool = False) -> dict[str, float]:
        """What can be said of the factors now, as plain numbers. Changes nothing; waits for the device, once.

        ``steps`` and ``refreshes`` that they are of (of a ``Hybrid`` whether steps are ``second_order`` now); and what their
        rules say that tensors are: of positive definite matrices ``factor_min`` and ``factor_max``, the extreme diagonal
        entries (the largest entry lies there; a ``factor_min`` that is not positive says that one is not); of orthogonal
        ones ``orthogonality``, the largest entry of ``|Q^T Q - I|``; of moments ``moment``, the largest root mean square.
        ``per_factor`` adds those of each, ``"<parameter>.<factor>.min"`` and so on.
        """
        kinds = {f"{name}.{key}": self._recipes[name].kind(key) for name, group in self._factors.items() for key in group}
        found: dict[str, float] = {"steps": self.clock}
        if self.switch is None:
            found |= self.rotation.metrics(self.clock)
        else:
            found["second_order"] = float(not self.switch.first_order)
        return found | measure(self.tensors(), kinds, per_factor)
