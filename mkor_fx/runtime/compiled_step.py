"""The compiled training step as a callable: which variant runs, and what is passed to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .averages import Averages
from .census import Census
from .compilations import Compilations
from .derivations import Derivations
from .factors import FactorState
from .gauges import Gauges
from .in_flight import Late
from .optimizer_state import OptimizerNumbers, counted, initialise_state, structure_of, tensor_state
from .optimizers import Optimizers
from .parts import BatchPart, Sums, cut
from .programs import Programs
from .ranks import Ranks, Replicas, state_of
from .step_maker import StepMaker
from .whole_state import WholeState
from .windows import Due, Windows


class CompiledStep(WholeState):
    """``step(*args, **kwargs) -> loss``: one training step as one compiled program.

    Attributes:
        mkor: the factors, ``mkor.state_dict()`` and ``mkor.load_state_dict()``.
        graphs: every stage of the pipeline for the variant that refreshes; ``variants`` has all.
        coverage: what is preconditioned and why not, known after the first step.
        ema: the averages of the weights, where ``compile_step(ema=...)`` asks for them.
        compilations: programs compiled so far.
        fallback: whether steps leave the rule out, its state included, and are the base optimizer's alone; with a ``Hybrid``
            it follows ``mkor.switch``.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], mkor: FactorState, maker: StepMaker,
        ranks: Ranks | None = None, check_replicas_every: int = 0,
    ) -> None:  # fmt: skip
        self._model, self._optimizer, self.mkor, self.ranks = model, optimizer, mkor, ranks
        self.optimizers = Optimizers.of(optimizer)
        self.mkor.ranks = ranks
        self.late = Late(self.mkor)
        self.variants: dict[str, Any] = {}
        self.coverage: Any = None
        self.compilations = 0
        self.fallback = False
        self._maker = maker
        self._census, self.noted = Census(model), Compilations()
        self._refreshes = Windows(mkor)
        self._derivations = Derivations(mkor, maker.derive, maker.derive_every, maker.moving, maker.keepers, maker.speeds)
        self._took_part: Set[str] = frozenset()  # weights, in the last step
        self._used: list[str] = []  # of these the ones whose state is here
        self._programs = Programs()
        self._ran = False
        self._structure: tuple = ()
        self._numbers: OptimizerNumbers | None = None
        self._fresh_groups: set[int] = set()
        self.gauges, self.sums, self.part = Gauges(), Sums(), BatchPart()
        self.ema = None if maker.ema is None else Averages(model, maker.ema)
        self.arguments: tuple[tuple, dict] = ((), {})
        self._plans: dict[str, str] = {}
        self._replicas = Replicas(ranks, mkor, check_replicas_every, self.state_tensors, self._own_tensors)
        self._loss: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self._model

    @property
    def optimizer(self) -> Optimizer | Sequence[Optimizer]:
        """The user's own, live; as it was passed, where there are several."""
        return self._optimizer

    def __deepcopy__(self, memo: dict) -> CompiledStep:
        raise TypeError(
            "a compiled step belongs to its model and optimizer and cannot be copied or pickled: make another one with "
            "compile_step, and take over step.mkor.state_dict()"
        )

    def __reduce__(self) -> Any:
        return self.__deepcopy__({})

    def __repr__(self) -> str:
        programs = ", ".join(self.variants) or "none yet"
        return f"CompiledStep({type(self.model).__name__}, {self.optimizers.names}, programs: {programs}, {self.mkor!r})"

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
        return int(self.gauges.of("skipped") or 0)

    def metrics(self, per_factor: bool = False) -> dict[str, float]:
        """The last ``loss`` and, with ``clip_norm``, ``gradient_norm``, steps ``skipped`` so far, and
        ``mkor.metrics()``, as plain numbers. Waits for the device."""
        known = {"loss": self._loss, "gradient_norm": self.gauges.of("gradient_norm")}
        last = {name: float(value) for name, value in known.items() if value is not None}
        return {**last, "skipped": self.skipped, **self.mkor.metrics(per_factor)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "a compiled step trains: call it with gradients enabled, outside torch.no_grad() and "
                "torch.inference_mode(); to evaluate, call the model itself"
            )
        if self.ema is not None:
            self.ema.check_not_applied()
        self._follow_model()
        self._follow_optimizer()
        if self.mkor.switch is not None:
            self.fallback = self.mkor.switch.first_order
        step, skipped = self.mkor.step, self.gauges.of("skipped")
        counted = 0 if skipped is None else skipped.clone()
        self._ran, self.arguments = False, (args, kwargs)
        try:
            result = self._run_parts(self._maker.choose(step, self.fallback), args, kwargs)
        finally:
            self.arguments = ((), {})
        if not self._ran:
            raise RuntimeError(
                "the step's program did not run, and nothing was trained: torch.compile is switched off or has given up "
                "(torch.compiler.set_stance, TORCH_COMPILE_DISABLE, a recompile limit)"
            )
        self._loss = loss = result[0] if isinstance(result, tuple) else result
        if self.mkor.switch is not None:
            self.mkor.switch.observe(loss, step, self._cost_of_base)
        self.mkor.advance()
        self._fresh_groups.clear()
        for optimizer in self.optimizers.members:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        if not self.fallback:
            skipped = self.gauges.of("skipped")
            self._derivations.run(self._used, step, None if skipped is None else skipped == counted)
        self.gauges.tell_of_skips()
        return result

    def _cost_of_base(self) -> float:
        """Of a step without the rules, over one with them: what the first rank has counted, whose batch may be another
        one."""
        cost = self.coverage.cost_of_base(self.mkor.rotation.every)
        return cost if self.ranks is None else self.ranks.number_of_first(cost, next(self.model.parameters()).device)

    def _run_parts(self, variant: Any, args: tuple, kwargs: dict) -> Any:
        """Of a batch in parts the last one takes the step."""
        if self._maker.parts == 1:
            return self._run(variant, args, kwargs)
        self._maker.check_call(args, kwargs)
        self.sums.clear()
        if due := self._overdue(variant, self._took_part):  # behind steps in first order, whose parts had to know it
            variant = self._refresh_of(due, self._took_part)
        *before, last = cut(args, kwargs, self._maker.parts)
        for number, (own, named, share) in enumerate(before):
            self.part = BatchPart(number, share)
            self._run(self._maker.part_of(variant), own, named)
        self.part = BatchPart(len(before), last[2])
        return self._run(variant, *last[:2])

    def _run(self, variant: Any, args: tuple, kwargs: dict) -> Any:
        programs = self._programs.now.by_variant
        if variant.name not in programs:
            self._maker.check_call(args, kwargs)
            programs[variant.name] = self._maker.build(self, variant)
        try:
            return programs[variant.name](*args, **kwargs)
        except Due as due:
            if self._maker.parts > 1:
                raise RuntimeError(
                    f"accumulate: {', '.join(sorted(due.names))} took part in no step of this window before, so that "
                    "the parts of this batch had no statistics of it: use refresh_every=1, or accumulate=1"
                ) from None
            variant = due.variant
        except Exception as error:
            if self.ranks is not None:
                self.ranks.failed(error)
            raise
        return self._run(variant, args, kwargs)

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
        self._census, self.noted = Census(self.model), Compilations()
        self.mkor.forget_gone()
        if self.ema is not None:
            self.ema.forget_gone()
        self._programs.clear()

    def _follow_optimizer(self) -> None:
        """Groups or flags of the optimizer that have changed ask for another compilation, branches for the program that has
        answered them as they are now; numbers for nothing."""
        structure = structure_of(self.optimizers)
        if structure != self._structure:
            self._structure, self._numbers = structure, None
            self._programs.clear()
        self._programs.choose(self.optimizers)

    # ---- several ranks ------------------------------------------------------------------------------------------------

    def begin(self, variant: str, plan: str, present: Callable[[Optimizers], str]) -> None:
        """What ranks have to settle before a program runs: the first time, that they run the same from the same state.

        A program that is compiled again for another batch, perhaps on this rank alone, has the plan that was agreed upon.
        """
        if self.ranks is None:
            return
        if self._plans.get(variant) != plan:
            self.ranks.agree(f"{plan}\nsteps taken {self.mkor.step}\n{present(self.optimizers)}")
            self._plans[variant] = plan
        self._replicas.check()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a step changes, by name."""
        tensors = state_of(self.model, self.mkor)
        if self.ema is not None:
            tensors |= {f"average of {name}": tensor for name, tensor in self.ema.weights().items()}
        for name, param in self.model.named_parameters():
            state = tensor_state(self.optimizers, param)
            tensors |= {f"optimizer state {key} of {name}": tensor for key, tensor in state.items()}
        return tensors | counted(self.optimizers)

    # ---- what programs ask for while they are built and run -----------------------------------------------------------

    def uses(self, variant: Any, names: Mapping[str, bool]) -> None:
        """A program is about to run that preconditions weights by ``names``, whose state is here or on another rank.

        Raises:
            Due: it would reuse state that is due, as of weights that have not taken part in earlier steps of the window.
        """
        if due := self._overdue(variant, names.keys()):
            raise Due(due, self._refresh_of(due, names.keys()))
        self._refreshes.done(_refreshed(variant, names.keys()), self.mkor.step, self.mkor.rotation.every)
        self._took_part = names.keys()
        self._used = [name for name, here in names.items() if here]
        self._ran = True

    def _overdue(self, variant: Any, names: Set[str]) -> set[str]:
        """Those of ``names`` whose state is due, where ``variant`` would reuse that of one of them."""
        if not variant.has("precondition") or variant.has("send"):
            return set()
        due = self._refreshes.due(names, self.mkor.step, self.mkor.rotation.every)
        return due if due - _refreshed(variant, names) else set()

    def _refresh_of(self, due: Set[str], names: Set[str]) -> Any:
        return self._maker.choose(self.mkor.step, False, None if due == names else due)

    def prepare_optimizer(self, params: Sequence[nn.Parameter]) -> None:
        """Create missing optimizer state of ``params``."""
        missing = {id(p) for p in params if not self.optimizers.state_of(p)}
        for index, group in enumerate(self.optimizers.param_groups):
            if any(id(p) in missing for p in group["params"]):
                self._fresh_groups.add(index)
        initialise_state(self.optimizers, list(params))
        self._structure = structure_of(self.optimizers)  # some keep notes in their groups that they have done so

    @property
    def updates(self) -> dict[tuple[int, ...], Any]:
        """The traced steps of the optimizers that other programs may have, too, as long as branches are answered as now."""
        return self._programs.now.updates

    def follow_branches(self, branches: tuple) -> None:
        self._programs.now.branches += branches

    def numbers(self, device: torch.device) -> Tensor:
        if self._numbers is None:
            self._numbers = OptimizerNumbers(self.optimizers, device)
        return self._numbers.update(self._fresh_groups)

    def rule_numbers(self, device: torch.device) -> Tensor:
        numbers = self._maker.numbers(self.mkor.step, device)
        assert numbers is not None
        return numbers


def _refreshed(variant: Any, names: Set[str]) -> Set[str]:
    """Those of ``names`` whose state a program of ``variant`` refreshes."""
    named = names if variant.due is None else names & variant.due
    return named if variant.has("refresh") else frozenset()
