"""Where the drop-in door preconditions: at the optimizer's step, or inside the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..passes import pipeline
from ..passes.core import GraphPass
from ..passes.match.layout import Layout, SizedLater
from ..passes.write.carrier import Carrier
from ..runtime.at_step import AtStep
from ..runtime.followed import Followed
from ..runtime.in_backward import InBackward


@dataclass(frozen=True)
class Mode:
    """What differs between the two ways: the object that runs, what graphs are passed for a site and what is written into
    them, and the programs that run outside of them, by kind."""

    runtime: ClassVar[Callable[..., Followed]]
    in_graphs: ClassVar[Sequence[GraphPass]]
    programs: ClassVar[dict[str, Sequence[GraphPass]]]
    #: whether a direction gets its size from the step before
    sizes_later: ClassVar[bool] = False

    def recipe(self, layout: Layout, dtype: torch.dtype) -> Any:
        """What makes the state of a weight whose gradients have ``dtype``."""
        return layout

    def carrier(self, layout: Layout, dtype: torch.dtype) -> Carrier:
        return Carrier.of(layout, dtype, self.sizes_later)

    def state_in_graph(self, layout: Layout, dtype: torch.dtype) -> tuple[str, ...]:
        """The state that a graph reads, by name."""
        return tuple(layout.fresh_state(torch.device("meta"))) if layout.reads_state else ()


class PreconditionAtStep(Mode):
    """On gradients that are accumulated, averaged and clipped, when an optimizer steps."""

    runtime = AtStep
    in_graphs = pipeline.CARRY
    programs = {"update": pipeline.UPDATE, "apply": pipeline.APPLY}  # noqa: RUF012


class PreconditionInBackward(Mode):
    """Where gradients are made, with the state and the sizes of the step before."""

    runtime = InBackward
    in_graphs = pipeline.CARRY_DIRECTIONS
    programs = {"refresh": pipeline.REFRESH}  # noqa: RUF012
    sizes_later = True

    def recipe(self, layout: Layout, dtype: torch.dtype) -> Any:
        return SizedLater(layout, self.carrier(layout, dtype).dtype)

    def state_in_graph(self, layout: Layout, dtype: torch.dtype) -> tuple[str, ...]:
        return tuple(self.recipe(layout, dtype).fresh_state(torch.device("meta")))


MODES = {"step": PreconditionAtStep(), "backward": PreconditionInBackward()}
