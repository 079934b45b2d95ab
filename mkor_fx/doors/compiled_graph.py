"""One graph of a compiled model: with statistics in it, or without while its rule is left alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..passes.joint_pass import Capture, Matching, StatisticsPass, look_at
from ..passes.torch_api.backend import compile_joint
from ..passes.torch_api.dynamo import with_inputs
from ..passes.write.draft import changing_of
from ..passes.write.joint_draft import Added, Shared
from ..runtime.draws import draw_of
from ..show.graphs import Graphs


class Graph:
    """What Dynamo calls in the place of a graph over ``params``, for every instance of a module that it serves."""

    def __init__(self, door: Any, params: Mapping[int, nn.Parameter]) -> None:
        self._door, self._indices, self._seen = weakref.ref(door), list(params), set[tuple[int, ...]]()

    def _called(self, args: Sequence[Any], capture: Capture) -> tuple[Any, dict[int, nn.Parameter]]:
        """The door, and the parameters of this call by position, which it is told of when they are first seen."""
        door = self._door()
        assert door is not None
        own = {index: args[index] for index in self._indices}
        key = tuple(map(id, own.values()))
        if key not in self._seen:
            self._seen.add(key)
            door.register(capture, own)
        return door, own


class CompiledGraph(Graph):
    """With statistics in it."""

    def __init__(
        self,
        door: Any,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        params: Mapping[int, nn.Parameter],
        matching: Matching,
        graphs: Graphs,
    ) -> None:
        super().__init__(door, params)
        self._mode = door.mode
        self._layouts = look_at(gm, inputs, matching).layouts
        self._dtypes = {index: params[index].dtype for index in self._layouts}
        options, changing = door.options, bool(changing_of(list(door.rules)))
        self._draws = any(layout.rule.draws for layout in self._layouts.values())
        self._slots = {index: layout.slots for index, layout in self._layouts.items() if layout.slots is not None}
        added, position = {}, len(inputs) + changing + self._draws
        for index, layout in self._layouts.items():
            state = door.mode.state_in_graph(layout, self._dtypes[index])
            added[index] = Added(position, door.mode.carrier(layout, self._dtypes[index]), state)
            position += 1 + len(state)
        self._added = added
        shared = Shared(len(inputs) if changing else None, len(inputs) + changing if self._draws else None)
        self.statistics = StatisticsPass(
            matching, self._layouts, added, shared, door.mode.in_graphs, graphs, options.backend == "inductor",
            options.without,
        )  # fmt: skip
        extended = with_inputs(gm, inputs, self._further_inputs(door, params))
        self._compiled = compile_joint(*extended, self.statistics, options.compiler, graphs.code)

    def _further_inputs(self, door: Any, own: Mapping[int, nn.Parameter], use: int = 0) -> list[Tensor]:
        """What the graph is passed behind Dynamo's inputs: numbers that change, what signs are drawn by, then for each site
        carrier and state. ``use`` counts the calls of this step."""
        runtime, device = door.runtime, next(iter(own.values())).device
        numbers = door.clock.numbers(runtime.mkor.clock, device)
        found = [] if numbers is None else [numbers]
        if self._draws:
            found.append(draw_of(runtime.mkor.clock, use, door.ranks, device))
        for index, layout in self._layouts.items():
            geometry = self._added[index].geometry
            recipe = self._mode.recipe(layout, self._dtypes[index])
            found += runtime.inputs(own[index], recipe, geometry.shape, geometry.dtype)
        return found

    def __call__(self, *args: Any) -> Any:
        door, own = self._called(args, self.statistics.capture)
        params = list(own.values())
        door.runtime.prepare(params)
        use = 0
        if self._draws and torch.is_grad_enabled():
            use = door.runtime.draws.next((own[index] for index in self._layouts), door.runtime.mkor.clock)
        outputs = self._compiled(*args, *self._further_inputs(door, own, use))
        if torch.is_grad_enabled():
            door.runtime.seen.ran = True
            door.runtime.watch(outputs, params, [(own[index], use % slots) for index, slots in self._slots.items()])
        return outputs


class PlainGraph(Graph):
    """The same while a ``Hybrid`` has left the rule: compiled as it is, and matched, so that its weights are known."""

    def __init__(
        self, door: Any, gm: fx.GraphModule, inputs: Sequence[Any], params: Mapping[int, nn.Parameter], matching: Matching
    ) -> None:
        super().__init__(door, params)
        self._capture = look_at(gm, inputs, matching)
        self._compiled = compile_joint(gm, inputs, None, door.options.compiler, [])

    def __call__(self, *args: Any) -> Any:
        self._called(args, self._capture)
        return self._compiled(*args)
