"""What would be, or is, preconditioned: the coverage table of a model, a compiled model or a compiled step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .config import check_model, check_rule
from .coverage import Coverage
from .graphs import Graphs
from .passes.backend import facing_user, plain_tracing
from .passes.capture import Naming, capture_joint, dynamo_parameters, own_code
from .passes.pipeline import analyse
from .rules import MKOR, Rule
from .runtime.step import CompiledStep


def explain(
    subject: nn.Module | CompiledStep,
    *args: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    rule: Rule = MKOR(),  # noqa: B008  (frozen)
    skip: Sequence[str] = (),
    **kwargs: Any,
) -> Coverage:
    """Coverage of every trainable parameter: op, uses, factor sizes, bytes, traffic and costs, or why it is declined.

    ``explain(step)`` and ``explain(compiled_model)`` tell what has been compiled. ``explain(model, *batch)`` needs no
    training: it captures the model on the example batch, computes nothing and changes nothing. With ``loss_fn`` the last
    element of the batch is the target, as in ``compile_step``.

    Returns:
        Coverage: prints as a table. ``table(costs=True)``, ``to_json()``, ``to_html(path)``; ``coverage``, ``covered`` and
        ``declined`` for programs; ``assert_full(allow=[...])`` for a model's own tests.

    Raises:
        ValueError: nothing has been compiled yet and no batch is given.
    """
    known = getattr(subject, "coverage", None)
    if not args and not kwargs:
        if isinstance(known, Coverage):
            return known
        raise ValueError("nothing to explain yet: pass an example batch, explain(model, *batch), or run one step first")
    model = subject.model if isinstance(subject, CompiledStep) else subject
    check_model(model)
    check_rule(rule)
    naming, coverage = Naming.of(model, skip), Coverage(model, rule)
    captured = coverage.graphs.captured

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        named = {index: name for index, (name, _) in dynamo_parameters(gm, naming).items()}
        step = capture_joint(gm, inputs, naming)
        if step is not None:
            captured.append(Graphs(f"{type(model).__name__}: graph {len(captured)}, explained", coverage))
            with plain_tracing():
                analyse(step, rule, captured[-1])
        results = [node.meta["example_value"] for node in gm.graph.output_node().args[0]]

        def run(*values: Any) -> list[Any]:  # one graph may serve many instances, each with its own parameters
            if step is not None:
                coverage.add(step, {index: naming.names[id(values[index])] for index in named})
            return [_stand_in(result) for result in results]

        return run

    def call(*batch: Any, **named: Any) -> Any:
        if loss_fn is None:
            return type(model)._call_impl(model, *batch, **named)
        return loss_fn(type(model)._call_impl(model, *batch[:-1], **named), batch[-1])

    with torch.enable_grad():
        facing_user(torch.compile(own_code(call), backend=backend, dynamic=False))(*args, **kwargs)
    return coverage


def _stand_in(result: Any) -> Any:
    """Zeros in the place of what a graph would have computed: enough for the code between two graphs to go on."""
    if not isinstance(result, Tensor):
        return result
    zeros = torch.zeros(result.shape, dtype=result.dtype, device=result.device)
    return zeros.requires_grad_(result.requires_grad)
