"""The compiled training step as a callable: which variant runs, and what is passed to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .census import Census
from .factors import FactorState, state_of
from .in_flight import Late
from .optimizer_state import OptimizerNumbers, initialise_state, structure_of, tensor_state
from .ranks import Ranks, Replicas


@dataclass(frozen=True)
class StepMaker:
    """What the runtime is handed, which knows neither rules nor graphs.

    ``choose(step, fallback)`` names the variant of a step, ``build(compiled step, variant)`` makes its program.
    ``check()`` holds model and optimizer to what a step takes. ``derive(step, name, layout, state, taken)`` makes state of
    state, ``derives(step)`` says whether any does; ``numbers(step, device)`` are those of the rules.
    """

    choose: Callable[[int, bool], Any]
    build: Callable[[CompiledStep, Any], Callable[..., Any]]
    check: Callable[[], None]
    derive: Callable[..., dict[str, Tensor]]
    derives: Callable[[int], bool]
    numbers: Callable[[int, torch.device], Tensor | None]


class CompiledStep:
    """``step(*args, **kwargs) -> loss``: one training step as one compiled program.

    Attributes:
        mkor: the factors, ``mkor.state_dict()`` and ``mkor.load_state_dict()``.
        graphs: every stage of the pipeline for the variant that refreshes; ``variants`` has all.
        coverage: what is preconditioned and why not, known after the first step.
        compilations: programs compiled so far.
        fallback: whether steps leave the rule out, its state included, and are the base optimizer's alone.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, mkor: FactorState, maker: StepMaker, ranks: Ranks | None = None,
        check_replicas_every: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.mkor, self.ranks = model, optimizer, mkor, ranks
        self.mkor.ranks = ranks
        self.late = Late(self.mkor)
        self.variants: dict[str, Any] = {}
        self.coverage: Any = None
        self.compilations = 0
        self.fallback = False
        self._maker = maker
        self._census = Census(model)
        self._programs: dict[str, Callable[..., Any]] = {}
        self._ran = False
        self._structure: tuple = ()
        self._branches: tuple = ()
        self._numbers: OptimizerNumbers | None = None
        self._fresh_groups: set[int] = set()
        self._skipped: Tensor | None = None
        self._arguments: tuple[tuple, dict] = ((), {})
        self._plans: dict[str, str] = {}
        self._replicas = Replicas(ranks, mkor, check_replicas_every, self.state_tensors, self._own_tensors)
        self._loss: Tensor | None = None

    def _own_tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @property
    def graphs(self) -> Any:
        if not self.variants:
            raise RuntimeError("nothing is compiled yet: call the step once")
        return next((graphs for graphs in self.variants.values() if graphs.refreshes), next(iter(self.variants.values())))

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
        self._follow_model()
        self._follow_optimizer()
        step = self.mkor.step
        variant = self._maker.choose(step, self.fallback)
        if variant.name not in self._programs:
            self._programs[variant.name] = self._maker.build(self, variant)
        derives = self._maker.derives(step) and not self.fallback
        skipped = None if not derives or self._skipped is None else self._skipped.clone()
        self._ran, self._arguments = False, (args, kwargs)
        try:
            result = self._programs[variant.name](*args, **kwargs)
        except Exception as error:
            if self.ranks is not None:
                self.ranks.failed(error)
            raise
        finally:
            self._arguments = ((), {})
        if not self._ran:
            raise RuntimeError(
                "the step's program did not run, and nothing was trained: torch.compile is switched off or has given up "
                "(torch.compiler.set_stance, TORCH_COMPILE_DISABLE, a recompile limit)"
            )
        self._loss = result[0] if isinstance(result, tuple) else result
        if derives:
            taken = None if self._skipped is None else self._skipped == (0 if skipped is None else skipped)
            self.mkor.derive(self.mkor.names(), lambda name, *rest: self._maker.derive(step, name, *rest, taken))
        self.mkor.advance()
        self._fresh_groups.clear()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        return result

    def _follow_model(self) -> None:
        """Another model in the same place, parameters and modules replaced or tied, is planned for anew, or refused."""
        if not self._census.changed():
            return
        self._maker.check()
        warnings.warn(
            f"mkor_fx: {type(self.model).__name__} has changed since its step was compiled ({self._census.changes()}): "
            "it is compiled again",
            stacklevel=3,
        )
        self._census = Census(self.model)
        self.mkor.learn_names()
        self._programs.clear()

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

    # ---- what programs ask for while they are built and run -----------------------------------------------------------

    def runs(self) -> None:
        """A program is about to run."""
        self._ran = True

    def prepare_optimizer(self, params: Sequence[nn.Parameter]) -> None:
        """Create missing optimizer state of ``params``."""
        missing = {id(p) for p in params if not self.optimizer.state.get(p)}
        for index, group in enumerate(self.optimizer.param_groups):
            if any(id(p) in missing for p in group["params"]):
                self._fresh_groups.add(index)
        initialise_state(self.optimizer, list(params))

    def follow_branches(self, branches: tuple) -> None:
        self._branches = (*self._branches, *branches)

    def rows(self, device: torch.device) -> Tensor:
        """The first dimension of the step's last tensor argument, 0-dim float."""
        tensors = [leaf for leaf in tree_leaves(self._arguments) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise ValueError("average='rows' needs a tensor among the step's arguments, whose first dimension counts")
        return torch.full((), tensors[-1].shape[0], dtype=torch.float32, device=device)

    def numbers(self, device: torch.device) -> Tensor:
        if self._numbers is None:
            self._numbers = OptimizerNumbers(self.optimizer, device)
        return self._numbers.update(self._fresh_groups)

    def rule_numbers(self, device: torch.device) -> Tensor:
        numbers = self._maker.numbers(self.mkor.step, device)
        assert numbers is not None
        return numbers

    def skip_counter(self, device: torch.device) -> Tensor:
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped
