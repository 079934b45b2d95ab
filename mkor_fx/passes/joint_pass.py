"""Statistics, and in one mode directions, written into the joint graphs of the drop-in door."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..ir import Parameter, StepGraph
from ..rules import Rules
from ..show.recorder import Recording
from .core import GraphPass
from .match.layout import Layout
from .naming import Naming
from .pipeline import analyse, synthesise
from .sources import library_sources
from .torch_api.backend import JointPass, plain_tracing
from .torch_api.capture import capture_joint, has_backward, read_joint
from .write.joint_draft import Added, JointDraft, Shared


@dataclass
class Capture:
    """What the pass learns about one graph: roles by input position, kept for every call of the compiled code."""

    step: StepGraph | None = None
    layouts: dict[int, Layout] = field(default_factory=dict)
    biases: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, step: StepGraph) -> Capture:
        layouts = {index: Layout.of(site) for index, site in step.sites.items()}
        return cls(step, layouts, {index: site.bias.index for index, site in step.sites.items() if site.bias is not None})


@dataclass(frozen=True)
class Matching:
    """What a graph is matched by: names by input position, the positions of data, and the rules."""

    naming: Naming
    named: Mapping[int, str]
    data: frozenset[int]
    rules: Rules


def look_at(gm: fx.GraphModule, inputs: Sequence[Any], matching: Matching) -> Capture:
    """What a graph is before it is compiled: the inputs that it will need beside Dynamo's; all that is known of it
    where it runs without its rules."""
    step = capture_joint(gm, inputs, matching.naming)
    if step is None:
        return Capture()
    with plain_tracing():
        analyse(step, matching.rules, None)
    return Capture.of(step)


class StatisticsPass(JointPass):
    """Runs on the joint graph before Inductor's own passes. ``expected`` are the sites that were found beforehand, ``added``
    their further inputs, ``shared`` those of all sites."""

    def __init__(
        self,
        matching: Matching,
        expected: Mapping[int, Layout],
        added: Mapping[int, Added],
        shared: Shared,
        rewrite: Sequence[GraphPass],
        graphs: Recording,
        inductor: bool,
        without: Sequence[str] = (),
    ) -> None:
        self.matching, self.expected, self.added, self.shared = matching, expected, added, shared
        self.rewrite, self.graphs, self.inductor, self.without = rewrite, graphs, inductor, without
        self.capture = Capture()

    def uuid(self) -> str:
        """Of the compile cache: everything that shapes the program, the library's own source included."""
        matching = self.matching
        passes = [p.name for p in self.rewrite]
        about = (str(matching.rules), matching.naming.skip, sorted(matching.named.items()), sorted(matching.data))
        content = repr((*about, sorted(self.added.items()), self.shared, passes))
        content += repr((self.without, self.inductor))
        return hashlib.sha256(content.encode() + library_sources(matching.rules)).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        if not has_backward(graph):
            return
        assert graph.owning_module is not None
        matching = self.matching
        step = read_joint(graph.owning_module, dict(matching.named), matching.data, matching.naming)
        with plain_tracing():
            analyse(step, matching.rules, self.graphs)
            found = Capture.of(step)
            check_agreement(step.parameters, self.expected, found.layouts)
            draft = JointDraft(step, list(matching.rules), self.added, self.shared)
            synthesise(
                draft, self.rewrite, self.graphs, inductor=self.inductor, partitioned=True, without=self.without
            )
        self.capture = found


def check_agreement(
    parameters: Mapping[int, Parameter], expected: Mapping[int, Layout], found: Mapping[int, Layout]
) -> None:
    """A weight is matched twice: to know the inputs of its graph, and to write into it. Both must see the same.

    Raises:
        AssertionError: a fault of the library; names the weight.
    """
    for index in sorted({*expected, *found}):
        if expected.get(index) != found.get(index):
            name = parameters[index].name if index in parameters else f"input {index}"
            raise AssertionError(
                f"{name} was matched as {expected.get(index)} at first and as {found.get(index)} in the graph that is "
                f"compiled"
            )
