"""Behind ``compile``: the Dynamo backend that adds statistics to each graph, and the handle that the user gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import reasons
from .config import Options
from .coverage import Coverage
from .distributed import Communication, check_sharding, check_still_alone, group_of, plan_of_update
from .graphs import Graphs
from .ir import Decline
from .passes.backend import compile_joint, facing_user
from .passes.backward import BackwardPass, build_refresh
from .passes.capture import (
    Naming,
    data_inputs,
    decompositions,
    dynamo_parameters,
    own_code,
    trace_artifact,
    with_inputs,
)
from .passes.drop_in import Job, StatisticsPass, build_update, find_layouts
from .passes.rewrite import merge_layouts
from .prims import accumulation_dtype
from .rules import Rule
from .runtime.backward import BackwardPreconditioner
from .runtime.module import Preconditioner
from .runtime.ranks import Ranks

#: trainable parameters of one graph: input position -> (name, parameter)
Params = dict[int, tuple[str, nn.Parameter]]
#: the compiled graph, the pass that has rewritten it, and what to pass behind Dynamo's inputs
Program = tuple[Callable[..., Any], StatisticsPass, Callable[[dict[int, Any]], list[Tensor]]]


#: of a weight that two graphs see as different matrices, or that one looks up and another multiplies
DISAGREE = Decline(reasons.DISAGREE)


def _tensors(params: Params) -> dict[int, Tensor]:
    return {index: param for index, (_, param) in params.items()}


class DropIn:
    """One compiled model: captures its graphs, keeps their stages, owns the preconditioner. ``handle`` is the user's."""

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        options: Options,
        precondition: str,
        ranks: Ranks | None,
        communication: Communication,
    ) -> None:
        self.model, self.rule, self.options = model, rule, options
        self.ranks, self.group = ranks, group_of(ranks, communication)
        self.naming = Naming.of(model, options.skip)
        self.coverage = Coverage(model, rule)
        self.runtime: Preconditioner | BackwardPreconditioner
        if precondition == "backward":
            if rule.reads_gradient:
                raise ValueError(
                    "a rule that reads the gradient at its refresh (statistic='gradient') cannot precondition in "
                    "the backward, where the refresh comes later: use precondition='step'"
                )
            make: Callable[..., Any] = partial(BackwardPreconditioner, build_refresh=self._build_refresh)
        else:
            make = partial(Preconditioner, build_update=self._build_update, merge=merge_layouts)
        every = communication.check_replicas_every
        self.runtime = make(model, rule, options.refresh_every, job=Job, ranks=ranks, check_replicas_every=every)
        self._ran = False
        self.handle = self._make_handle()

    def _make_handle(self) -> nn.Module:
        """Another instance of the model's class over the same parameters, buffers and submodules, that runs compiled."""
        handle = object.__new__(type(self.model))
        handle.__dict__.update(self.model.__dict__)
        call = own_code(_call_of(handle))
        fullgraph, dynamic = self.options.fullgraph, self.options.dynamic
        compiled = facing_user(torch.compile(call, backend=self._backend, fullgraph=fullgraph, dynamic=dynamic))

        def run(*args: Any, **kwargs: Any) -> Any:
            result = compiled(*args, **kwargs)
            if not self._ran:
                raise RuntimeError(
                    f"no graph was captured from {type(self.model).__name__}: its forward runs outside of "
                    "what torch.compile can see (torch._dynamo.explain tells why)"
                )
            return result

        handle.__dict__.update(
            _compiled_call_impl=run, mkor=self.runtime.mkor, graphs=self.coverage.graphs, coverage=self.coverage
        )
        return handle

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's backend: carriers in, statistics pass on the joint graph, roles resolved at each call."""
        self._ran = True
        if self.naming.names.keys() != {id(p) for p in self.model.parameters()}:
            check_sharding(self.model, "backward" if isinstance(self.runtime, BackwardPreconditioner) else "step")
            self.naming = Naming.of(self.model, self.options.skip)
        params = dynamo_parameters(gm, self.naming)
        if not params or not torch.is_grad_enabled():
            return compile_joint(gm, inputs, None, {}, self.options.backend, self.options.inductor, [])
        captured = self.coverage.graphs.captured
        graphs = self._graphs(f"graph {len(captured)}, forward and backward")
        compiled, statistics, added = self._program(gm, inputs, params, graphs)
        captured.append(graphs)
        if statistics.capture.step is not None:
            seen_here = Coverage(self.model, self.rule)
            seen_here.add(statistics.capture.step)
            trace_artifact("mkor_fx_coverage", seen_here.to_json)
        seen: set[tuple[int, ...]] = set()

        def run(*args: Any) -> Any:
            own = {index: args[index] for index in params}
            key = tuple(map(id, own.values()))
            if key not in seen:
                seen.add(key)
                self._register(statistics, own)
            outputs = compiled(*args, *added(own))
            if torch.is_grad_enabled():
                self.runtime.watch_backward(outputs, list(own.values()))
            return outputs

        return run

    def _program(self, gm: fx.GraphModule, inputs: Sequence[Any], params: Params, graphs: Graphs) -> Program:
        """Forward and backward with the carrier of every site, and in the other mode its state, as further inputs.

        The sites are found beforehand, on a graph that is thrown away.
        """
        runtime, in_backward = self.runtime, isinstance(self.runtime, BackwardPreconditioner)
        layouts = find_layouts(gm, inputs, self.naming, self.rule)
        shapes = {}
        for index, layout in layouts.items():
            size = layout.statistics_size(self.rule)
            rows = (3, max(4 * (layout.members or 1), size)) if in_backward else (2, size)
            shapes[index] = (rows, accumulation_dtype(params[index][1].dtype))

        def added(own: dict[int, Any]) -> list[Tensor]:
            if not isinstance(runtime, BackwardPreconditioner):
                return [runtime.carriers.of(own[index], *shape) for index, shape in shapes.items()]
            runtime.begin(list(own.values()))
            return [t for index, layout in layouts.items() for t in runtime.inputs(own[index], layout, *shapes[index])]

        carriers, states, position = {}, {}, len(inputs)
        for index, layout in layouts.items():
            carriers[index], position = position, position + 1
            if in_backward:
                fresh = layout.fresh_state_with_scale(self.rule, shapes[index][1])
                states[index] = list(fresh(torch.device("meta")))
                position += len(states[index])
        named = {index: name for index, (name, _) in params.items()}
        data, inductor = data_inputs(gm, self.naming), self.options.backend == "inductor"
        about = self.rule, self.naming, named, data, carriers, graphs, inductor
        statistics = BackwardPass(*about, states=states) if in_backward else StatisticsPass(*about)
        return self._compile(gm, inputs, added(_tensors(params)), statistics), statistics, added

    def _compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], added: list[Tensor], statistics: StatisticsPass
    ) -> Callable:
        extended, extended_inputs = with_inputs(gm, inputs, added)
        backend, options = self.options.backend, self.options.inductor
        code = statistics.graphs.code
        return compile_joint(extended, extended_inputs, statistics, decompositions(), backend, options, code)

    def _graphs(self, what: str) -> Graphs:
        return Graphs(f"{type(self.model).__name__}: {what}", self.coverage)

    def _register(self, statistics: StatisticsPass, params: dict[int, nn.Parameter]) -> None:
        """Tell the runtime and the coverage what this graph says of the parameters it is called with."""
        capture = statistics.capture
        if capture.step is None:
            return
        self.coverage.add(capture.step, {index: self.runtime.mkor.name(param) for index, param in params.items()})
        biases = set(capture.biases.values())
        for index, param in params.items():
            if index not in biases and isinstance(self.runtime, Preconditioner):
                bias = capture.biases.get(index)
                layout = capture.layouts.get(index)
                if not self.runtime.register(param, layout, None if bias is None else params[bias]):
                    self.coverage.decline(self.runtime.mkor.name(param), DISAGREE)

    def _build_refresh(self, jobs: list[Job], carriers: list[Tensor], states: list[dict], step: Tensor) -> Callable:
        about = self.rule, jobs, carriers, states, step
        return self._built(build_refresh, about, jobs, self._graphs(f"refresh of {len(jobs)} weights"))

    def _build_update(
        self, jobs: list[Job], examples: list[dict], step: Tensor, scales: tuple[Tensor, ...]
    ) -> Callable:
        about = self.rule, jobs, examples, step, scales
        return self._built(build_update, about, jobs, self._graphs(f"update of {len(jobs)} weights"))

    def _built(self, build: Callable[..., Callable], about: tuple, jobs: list[Job], graphs: Graphs) -> Callable:
        """A program for the optimizer's step, on which all ranks agree before it runs."""
        try:
            program = build(*about, self.options.backend, self.options.inductor, graphs, self.group)
            self.coverage.graphs.updates.append(graphs)
        except Exception as error:
            if self.ranks is not None:
                self.ranks.failed(error)
            raise
        if self.ranks is None:
            check_still_alone()
        else:
            self.ranks.agree(plan_of_update(self.rule, jobs, self.options, graphs))
        return program


def _call_of(handle: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return handle._call_impl(*args, **kwargs)

    return call
