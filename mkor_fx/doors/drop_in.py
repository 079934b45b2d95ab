"""Behind ``compile``: the Dynamo backend that adds statistics to each graph, and the handle that the user gets."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from .. import reasons
from ..ir import Decline
from ..options import Options
from ..passes.joint_pass import Capture, Matching
from ..passes.match.layout import merge_layouts
from ..passes.naming import Naming
from ..passes.torch_api.backend import compile_joint
from ..passes.torch_api.capture import trace_artifact
from ..passes.torch_api.dynamo import (
    data_inputs,
    dynamo_compile,
    dynamo_parameters,
    held_weakly,
    recurrence,
    told_to_stay_out,
    under_transform,
)
from ..passes.update_program import build_program
from ..passes.write.placement import assign
from ..passes.write.update_draft import Job
from ..runtime.census import Census
from ..runtime.compilations import Compilations
from ..runtime.factors import FactorState
from ..runtime.followed import Followed, Maker
from ..runtime.given import Given
from ..runtime.ranks import Ranks
from ..runtime.switch import Switch
from ..show.coverage import Coverage
from ..show.graphs import Graphs
from ..show.waiting import shown
from .agreement import group_of, load_of, plan_of_update
from .checks import check_sharding, check_still_alone
from .compiled_graph import CompiledGraph, PlainGraph
from .handle import compiled_handle
from .modes import MODES
from .rule_clock import RuleClock
from .states import possible_states, rotation_of, slots_of

#: of a weight that two graphs see as different matrices, or that one looks up and another multiplies
DISAGREE = Decline(reasons.DISAGREE)


class DropIn:
    """One compiled model: captures its graphs, keeps their stages, owns what acts at its steps. ``handle`` is the user's."""

    def __init__(self, model: nn.Module, options: Options, ranks: Ranks | None) -> None:
        self.model, self.options, self.ranks = model, options, ranks
        self.rules, self.mode, self.group = options.rules, MODES[options.precondition], group_of(ranks, options)
        self.naming = Naming.of(model, options.skip, self.rules)
        self.coverage, self.clock = Coverage(model), RuleClock(self.rules)
        self.runtime = self._make_runtime()
        self._census, self._compilations = Census(model), Compilations()
        self._graphs_seen = 0
        self._owned: list[Callable[..., Any]] = []
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._plain = _call_of(model)
        self._compiled, self._first_order = self._make_compiled()
        mkor = self.runtime.mkor
        self.handle = compiled_handle(model, self.run, mkor=mkor, graphs=self.coverage.graphs, coverage=self.coverage)

    def _make_runtime(self) -> Followed:
        every = self.options.refresh_every
        mkor = FactorState(self.model, every, possible_states(self.rules, self.mode.sizes_later))
        self.coverage.rotation = mkor.rotation = rotation_of(self.model, self.options)
        mkor.slots = slots_of(self.model, self.options)
        if self.options.hybrid is not None:
            self.coverage.switch = mkor.switch = Switch(self.options.hybrid)
            mkor.switch.listens = self._cost_of_base, self._mean_over_ranks
        mkor.ranks, self.coverage.owners = self.ranks, mkor.owners
        self.coverage.local = self.options.placement == "local" and self.ranks is not None and self.ranks.size > 1
        clock = self.clock
        maker = Maker(
            self._build, Job, merge_layouts, clock.derive, clock.derive_every, clock.moving, clock.numbers, self._left_alone,
            self._part, self._is_stepped_by, self.options.communication.speeds,
            self._owners if self.coverage.local else None,
        )  # fmt: skip
        checked = self.options.communication.check_replicas_every
        return self.mode.runtime(self.model, mkor, every, maker, self.ranks, checked)

    def _owners(self, weights: Mapping[str, tuple], known: Mapping[str, int | None]) -> dict[str, int | None]:
        """The rank that keeps the factors of each weight, of which layout, parameter and bias are given. Known owners
        stay."""
        assert self.ranks is not None
        return assign({name: load_of(*about) for name, about in weights.items()}, self.ranks.size, math.inf, known)

    def _left_alone(self, name: str) -> bool:
        return self.naming.excluded(name) is not None or self.rules.match(name) is None

    def _part(self, bias: str, weight: str) -> None:
        """A bias that is not stepped together with its weight keeps its raw gradient: said once."""
        if self.coverage[bias].declined is None:
            decline = Decline(reasons.STEPPED_APART.format(weight=weight))
            self.coverage.decline(bias, decline)
            warnings.warn(
                f"mkor_fx does not precondition {bias}: {decline}. Put it into the optimizer of its weight, or leave it out "
                f"with skip=[{bias!r}]",
                stacklevel=2,
            )

    def _is_stepped_by(self, optimizer: Optimizer) -> None:
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            self.coverage.trained_by(optimizer, self.model.named_parameters())

    def _cost_of_base(self) -> float:
        """Of a step without the rules, over one with them: as the first rank has counted it."""
        cost = self.coverage.cost_of_base(self.options.refresh_every)
        return cost if self.ranks is None else self.ranks.number_of_first(cost, next(self.model.parameters()).device)

    def _mean_over_ranks(self, losses: Tensor) -> Tensor:
        return losses if self.ranks is None else self.ranks.mean(losses)

    # ---- calls --------------------------------------------------------------------------------------------------------

    def _make_compiled(self) -> list[Callable[..., Any]]:
        """What runs the model compiled: with its rules, and while a Hybrid has left them."""
        options: dict[str, Any] = {"fullgraph": self.options.fullgraph, "dynamic": self.options.dynamic}
        backends = (self._backend, self._plain_backend)
        return [dynamo_compile(_call_of(self.model), backend, **options) for backend in backends]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The handle's call. Under a transform of ``torch.func`` it is the model's own: Dynamo would give up for ever."""
        if under_transform():
            return self._plain(*args, **kwargs)
        if torch.is_grad_enabled() and self._census.changed():
            if self._census.lent():  # as by torch.func.functional_call: for this call alone
                return self._plain(*args, **kwargs)
            self._plan_anew()
        self.runtime.seen.forget_failed()
        if torch.is_grad_enabled():
            self.runtime.leaves = self.runtime.mkor.first_order
        result = (self._first_order if self.runtime.leaves else self._compiled)(*args, **kwargs)
        self.runtime.seen.called |= torch.is_grad_enabled()
        if not self._graphs_seen and not told_to_stay_out():
            raise RuntimeError(
                f"no graph was captured from {type(self.model).__name__}: its forward runs outside of "
                "what torch.compile can see (torch._dynamo.explain tells why)"
            )
        return result

    def _plan_anew(self) -> None:
        """Parameters or modules were replaced, added, removed or tied."""
        check_sharding(self.model, self.options.precondition)
        naming = Naming.of(self.model, self.options.skip, self.rules)
        if self._graphs_seen:
            warnings.warn(
                f"mkor_fx: {type(self.model).__name__} has changed since it was compiled ({self._census.changes()}): it is "
                "compiled again",
                stacklevel=3,
            )
            self._owned.clear()
            self._compiled, self._first_order = self._make_compiled()
        self.naming, self._census, self._compilations = naming, Census(self.model), Compilations()
        self.coverage.forget(self.model)
        self.coverage.rotation = self.runtime.mkor.rotation = rotation_of(self.model, self.options)
        self.runtime.mkor.slots = slots_of(self.model, self.options)
        self._optimizers.clear()
        self.runtime.forget_plan()
        self.runtime.mkor.forget_gone()

    # ---- graphs -------------------------------------------------------------------------------------------------------

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's backend."""
        with shown(f"compiling graph {self._graphs_seen} of {type(self.model).__name__}"):
            self._owned.append(self._compile(gm, inputs))
        return held_weakly(self._owned[-1])

    def _plain_backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """As torch.compile's own, while a Hybrid has left the rule."""
        with shown(f"compiling {type(self.model).__name__} without its rule"):
            self._owned.append(self._compile(gm, inputs, plain=True))
        return held_weakly(self._owned[-1])

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any], plain: bool = False) -> Callable[..., Any]:
        """Carriers in, statistics pass on the joint graph, roles resolved at each call; ``plain``: roles alone."""
        self._graphs_seen += 1
        if not torch.is_grad_enabled():
            return compile_joint(gm, inputs, None, self.options.compiler, [])
        self._compilations.note(self.model, *recurrence(gm))
        if self.naming.names.keys() != {id(p) for p in self.model.parameters()}:  # swapped by a sharding wrapper
            check_sharding(self.model, self.options.precondition)
            self.naming = Naming.of(self.model, self.options.skip, self.rules)
        named = dynamo_parameters(gm, self.naming)
        if not named:
            return compile_joint(gm, inputs, None, self.options.compiler, [])
        names, data = {index: name for index, (name, _) in named.items()}, data_inputs(gm, self.naming)
        params = {index: param for index, (_, param) in named.items()}
        matching = Matching(self.naming, names, data, self.rules)
        if plain:
            return PlainGraph(self, gm, inputs, params, matching)
        captured = self.coverage.graphs.captured
        graphs = self._graphs(f"graph {len(captured)}, forward and backward")
        graph = CompiledGraph(self, gm, inputs, params, matching, graphs)
        captured.append(graphs)
        if graph.statistics.capture.step is not None:
            seen_here = Coverage(self.model)
            seen_here.add(graph.statistics.capture.step)
            trace_artifact("mkor_fx_coverage", seen_here.to_json)
        return graph

    def _graphs(self, what: str) -> Graphs:
        return Graphs(f"{type(self.model).__name__}: {what}", self.coverage)

    def register(self, capture: Capture, params: Mapping[int, nn.Parameter]) -> None:
        """Tell the runtime and the coverage what a graph says of the parameters it is called with."""
        if capture.step is None:
            return
        self._optimizers.clear()
        self.coverage.add(capture.step, {index: self.runtime.mkor.name(param) for index, param in params.items()})
        biases = set(capture.biases.values())
        frozen = frozenset(id(p) for p in self.model.parameters() if not p.requires_grad)
        for index, param in params.items():
            if index not in biases:
                bias = capture.biases.get(index)
                layout = capture.layouts.get(index)
                if not self.runtime.register(param, layout, None if bias is None else params[bias], frozen):
                    self.coverage.decline(self.runtime.mkor.name(param), DISAGREE)

    # ---- programs outside of the graphs -------------------------------------------------------------------------------

    def _build(self, kind: str, jobs: Sequence[Job], given: Given) -> Callable[[Given], list[Tensor]]:
        """A program for the optimizer's step, on which all ranks agree before it runs."""
        graphs = self._graphs(f"{kind} of {len(jobs)} weights")
        rules, group = list(self.rules), None if kind == "apply" else self.group
        try:
            rewrite = self.mode.programs[kind]
            with shown(f"compiling the {kind} of {len(jobs)} weights of {type(self.model).__name__}"):
                program = build_program(
                    jobs, rules, given, rewrite, self.options.compiler, graphs, group, self.options.without
                )
            self.coverage.graphs.updates.append(graphs)
        except Exception as error:
            if self.ranks is not None:
                self.ranks.failed(error)
            raise
        if self.ranks is None:
            check_still_alone()
        else:
            self.ranks.agree(plan_of_update(kind, jobs, self.options, graphs))
        return program


def _call_of(model: nn.Module) -> Callable[..., Any]:
    """What is traced: the call of the model itself, hooks and all."""
    base = type(model)
    own = base.__call__ if base.__call__ is not nn.Module.__call__ else base._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return own(model, *args, **kwargs)

    return call
