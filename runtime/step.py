"""The compiled training step as a callable: which variant runs, and what is passed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .late import Late
from .optimizer import PackedNumbers, initialise_state, structure_of, tensor_state
from .ranks import Ranks, Replicas
from .state import FactorState, state_of


class Phase(NamedTuple):
    """What a step does beside training: sum statistics, and refresh the factors from them or from the last step's."""

    collect: bool
    refresh: bool

    @property
    def name(self) -> str:
        return "refresh" if self.refresh else "collect" if self.collect else "reuse"


class CompiledStep:
    """``step(*args, **kwargs) -> loss``: one training step as one compiled program.

    Attributes:
        mkor: the factors, ``mkor.state_dict()`` and ``mkor.load_state_dict()``.
        graphs: every stage of the pipeline for the variant compiled last; ``variants`` has both.
        coverage: what is preconditioned and why not, known after the first step.
        compilations: programs compiled so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        build: Callable[[CompiledStep, Phase], Callable[..., Any]],
        refresh_every: int,
        ranks: Ranks | None = None,
        check_replicas_every: int = 0,
        stale: int = 0,
    ) -> None:
        self.model, self.optimizer, self.refresh_every, self.stale = model, optimizer, refresh_every, stale
        self.ranks = ranks
        self.mkor = FactorState(model, refresh_every)
        self.mkor.ranks = ranks
        self.late = Late(self.mkor)
        self.variants: dict[str, Any] = {}
        self.coverage: Any = None
        self.compilations = 0
        self._build = build
        self._programs: dict[Phase, Callable[..., Any]] = {}
        self._structure: tuple = ()
        self._branches: tuple = ()
        self._numbers: PackedNumbers | None = None
        self._fresh_groups: set[int] = set()
        self._skipped: Tensor | None = None
        self._arguments: tuple[tuple, dict] = ((), {})
        self._plans: dict[str, str] = {}
        own = lambda: [*model.parameters(), *model.buffers()]
        self._replicas = Replicas(ranks, self.mkor, check_replicas_every, self.state_tensors, own)
        self._loss: Tensor | None = None

    @property
    def graphs(self) -> Any:
        if not self.variants:
            raise RuntimeError("nothing is compiled yet: call the step once")
        return self.variants["refresh" if "refresh" in self.variants else next(iter(self.variants))]

    @property
    def skipped(self) -> int:
        """Steps skipped because the loss or a gradient was not finite. Reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def metrics(self, per_factor: bool = False) -> dict[str, float]:
        """The last ``loss``, steps ``skipped`` so far, and ``mkor.metrics()``, as plain numbers. Waits for the device."""
        last = {} if self._loss is None else {"loss": float(self._loss)}
        return {**last, "skipped": self.skipped, **self.mkor.metrics(per_factor)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "a compiled step trains: call it with gradients enabled, outside torch.no_grad() and "
                "torch.inference_mode(); to evaluate, call the model itself"
            )
        self._follow_optimizer()
        step, every = self.mkor.step, self.refresh_every
        phase = Phase(step % every == 0, (step - self.stale) % every == 0)
        if phase not in self._programs:
            self._programs[phase] = self._build(self, phase)
        self._arguments = (args, kwargs)
        try:
            result = self._programs[phase](*args, **kwargs)
        except Exception as error:
            if self.ranks is not None:
                self.ranks.failed(error)
            raise
        self._loss = result[0] if isinstance(result, tuple) else result
        self.mkor.advance()
        self._fresh_groups.clear()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        return result

    def _follow_optimizer(self) -> None:
        """Groups, flags or branches of the optimizer that have changed ask for another compilation; numbers do not."""
        structure = structure_of(self.optimizer)
        if structure != self._structure or not all(branch.holds(self.optimizer) for branch in self._branches):
            self._structure, self._branches, self._numbers = structure, (), None
            self._programs.clear()

    # ---- several ranks ------------------------------------------------------------------------------------------------

    def begin(self, variant: str, plan: str, present: Callable[[Optimizer], str]) -> None:
        """What ranks have to settle before a program runs: the first time, that they run the same from the same state.

        A program that is compiled again for another batch, perhaps on this rank alone, has the plan that was agreed upon.
        """
        if self.ranks is None:
            return
        if self._plans.get(variant) != plan:
            self.ranks.agree(f"{plan}\nsteps taken {self.mkor.step}\n{present(self.optimizer)}")
            self._plans[variant] = plan
        self._replicas.check()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a step changes, by name."""
        tensors = state_of(self.model, self.mkor)
        for name, param in self.model.named_parameters():
            state = tensor_state(self.optimizer, param)
            tensors |= {f"optimizer state {key} of {name}": tensor for key, tensor in state.items()}
        return tensors

    def rows(self, device: torch.device) -> Tensor:
        """The first dimension of the step's last tensor argument, 0-dim float."""
        tensors = [leaf for leaf in tree_leaves(self._arguments) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise ValueError("average='rows' needs a tensor among the step's arguments, whose first dimension counts")
        return torch.full((), tensors[-1].shape[0], dtype=torch.float32, device=device)

    # ---- what programs ask for while they are built and run -----------------------------------------------------------

    def prepare_optimizer(self, params: Sequence[nn.Parameter]) -> None:
        """Create missing optimizer state of ``params``."""
        missing = {id(p) for p in params if not self.optimizer.state.get(p)}
        for index, group in enumerate(self.optimizer.param_groups):
            if any(id(p) in missing for p in group["params"]):
                self._fresh_groups.add(index)
        initialise_state(self.optimizer, list(params))

    def follow_branches(self, branches: tuple) -> None:
        self._branches = branches

    def numbers(self, device: torch.device) -> Tensor:
        if self._numbers is None:
            self._numbers = PackedNumbers(self.optimizer, device)
        return self._numbers.update(self._fresh_groups)

    def skip_counter(self, device: torch.device) -> Tensor:
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped

    def tensor(self, slot: Any, args: Sequence[Any], device: torch.device, late: Sequence[Tensor] = ()) -> Tensor:
        """The tensor that belongs to an input which the pipeline has added (see ``passes.whole_step.Slot``)."""
        match slot.kind:
            case "factor":
                return self.mkor.of(args[slot.index])[slot.key]
            case "optimizer":
                param = args[slot.index]
                held = self.optimizer.state[param].get(slot.key)
                if held is None or held.device != param.device:  # emptied or put on the host by load_state_dict, say
                    self.prepare_optimizer([param])
                return self.optimizer.state[param][slot.key]
            case "numbers":
                return self.numbers(device)
            case "rows":
                return self.rows(device)
            case "step":
                return self.mkor.step_tensor(device)
            case "late":
                return late[slot.index]
            case "skipped":
                return self.skip_counter(device)
        raise AssertionError(f"no such input: {slot}")
