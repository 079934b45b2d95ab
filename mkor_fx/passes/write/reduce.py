"""What ranks have in common: gradients, loss and buffers."""

from __future__ import annotations

from torch import fx

from ..core import graph_pass
from ..torch_api.tracing import insert
from .finite import weighted
from .step_draft import StepDraft


@graph_pass(stage="rewrite")
def reduce(draft: StepDraft) -> None:
    """Gradients of all ranks together, to their owners where they have one; statistics, but for those that travel late
    or stay where they are; the mean loss, and rank 0's buffers."""
    graph, network, delivery, step = draft.graph, draft.network, draft.delivery, draft.step
    if network is None:
        return
    over_ranks = {} if draft.sends_late or draft.plan.local else draft.statistics
    with graph.inserting_before(step.output):
        owned = {} if delivery is None else delivery.owner
        gradients: dict[int, fx.Node] = {}
        for i in draft.plan.trained:
            if i not in owned:
                gradients[i] = network.sum(draft.gradients[i], "gradient", step.parameters[i].name)
        if delivery is not None:
            gradients |= delivery.to_owners(draft.gradients)
        for index, vectors in over_ranks.items():
            name = step.parameters[index].name
            draft.statistics[index] = {k: network.sum(vector, "statistics", name) for k, vector in vectors.items()}
        own = insert(graph, weighted, draft.outputs[0], draft.share, label="loss")
        draft.outputs[0] = network.sum(own, "loss", "loss")
        for index, name in draft.plan.buffers.items():
            target = step.inputs[index]
            if target in draft.writes:
                draft.writes[target] = network.copy_of(0, draft.writes[target], "buffer", name)
    draft.gradients = gradients
    draft.hand_out()
