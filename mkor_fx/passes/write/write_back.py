"""What a program changes, at its end."""

from __future__ import annotations

import torch
from torch import fx

from ..core import graph_pass
from .draft import Draft

aten = torch.ops.aten


@graph_pass(stage="rewrite")
def write_back(draft: Draft) -> None:
    """Copy new values into the inputs that keep them; where the guard says no, nothing but what is settled anyway."""
    keep = draft.guard()
    values = dict(draft.settled)
    for target, value in draft.writes.items():
        before = draft.settled.get(target, target)
        if keep is not None and value is not before:
            value = draft.insert(torch.where, keep, value, before, label="skip_nonfinite")
        values[target] = value
    for target, value in values.items():
        if value is not target and _reads_an_input(value):  # which another write may have overwritten by then
            values[target] = draft.insert(torch.clone, value, label="write")
    with draft.graph.inserting_before(draft.step.output):
        for target, value in values.items():
            if value is not target:
                copy = draft.graph.call_function(aten.copy_.default, (target, value))
                copy.meta = {"val": target.meta["val"], "mkor_fx": "write"}


def _reads_an_input(value: fx.Node) -> bool:
    """Whether a value is an input's memory, or a view of it."""
    while getattr(value.target, "is_view", False) and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value.op == "placeholder"
