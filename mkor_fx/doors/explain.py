"""What would be, or is, preconditioned: the coverage table of a model, a compiled model or a compiled step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from ..options import Options
from ..passes.naming import Naming
from ..passes.pipeline import analyse
from ..passes.torch_api.backend import plain_tracing
from ..passes.torch_api.capture import capture_joint
from ..passes.torch_api.dynamo import dynamo_compile, dynamo_parameters
from ..rules import MKOR, RuleChoice
from ..runtime.compiled_step import CompiledStep
from ..runtime.optimizers import Optimizers
from ..show.coverage import Coverage
from ..show.graphs import Graphs
from .checks import check_model
from .optimizer_checks import check_optimizer


def explain(
    subject: nn.Module | CompiledStep,
    *args: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    rule: RuleChoice = MKOR(),  # noqa: B008  (frozen)
    skip: Sequence[str] = (),
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    **kwargs: Any,
) -> Coverage:
    """Coverage of every trainable parameter: op, uses, factor sizes, bytes, traffic and costs, or why it is declined.

    ``explain(step)`` and ``explain(compiled_model)`` tell what has been compiled. ``explain(model, *batch)`` needs no
    training: it captures the model on the example batch, computes nothing and changes nothing. With ``loss_fn`` the last
    element of the batch is the target, as in ``compile_step``.

    Args:
        rule, skip: as in :func:`mkor_fx.compile`.
        optimizer: that, or those, which will train the model: then a column says who trains what, and how long a step is.

    Returns:
        Coverage: prints as a table. ``table(costs=True)``, ``to_json()``, ``to_html(path)``; ``coverage``, ``covered`` and
        ``declined`` for programs; ``assert_full(allow=[...])`` for a model's own tests.

    Raises:
        ValueError: nothing has been compiled yet and no batch is given.
    """
    known = getattr(subject, "coverage", None)
    if optimizer is not None:
        check_optimizer(_model_of(subject), optimizer)
    if not args and not kwargs:
        if isinstance(known, Coverage) and known.graphs.captured:
            if optimizer is not None:
                known.trained_by(Optimizers.of(optimizer), _model_of(subject).named_parameters())
            return known
        raise ValueError("nothing to explain yet: pass an example batch, explain(model, *batch), or run one step first")
    model = _model_of(subject)
    check_model(model)
    options = Options(rule=rule, skip=skip)
    look = _Look(model, options)

    def call(*batch: Any, **named: Any) -> Any:
        if loss_fn is None:
            return type(model)._call_impl(model, *batch, **named)
        return loss_fn(type(model)._call_impl(model, *batch[:-1], **named), batch[-1])

    with torch.enable_grad():
        dynamo_compile(call, look.backend, fullgraph=False, dynamic=False)(*args, **kwargs)
    if optimizer is not None:
        look.coverage.trained_by(Optimizers.of(optimizer), model.named_parameters())
    return look.coverage


def _model_of(subject: nn.Module | CompiledStep) -> nn.Module:
    return subject.model if isinstance(subject, CompiledStep) else subject


class _Look:
    """A Dynamo backend that matches and computes nothing."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.title, self.rules = type(model).__name__, options.rules
        self.naming, self.coverage = Naming.of(model, options.skip, options.rules), Coverage(model)

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        named = {index: name for index, (name, _) in dynamo_parameters(gm, self.naming).items()}
        step, captured = capture_joint(gm, inputs, self.naming), self.coverage.graphs.captured
        if step is not None:
            captured.append(Graphs(f"{self.title}: graph {len(captured)}, explained", self.coverage))
            with plain_tracing():
                analyse(step, self.rules, captured[-1])
        results = [node.meta["example_value"] for node in gm.graph.output_node().args[0]]
        coverage, names = self.coverage, self.naming.names

        def run(*values: Any) -> list[Any]:  # one graph may serve many instances, each with its own parameters
            if step is not None:
                coverage.add(step, {index: names[id(values[index])] for index in named})
            return [_stand_in(result) for result in results]

        return run


def _stand_in(result: Any) -> Any:
    """Zeros in the place of what a graph would have computed: enough for the code between two graphs to go on."""
    if not isinstance(result, Tensor):
        return result
    zeros = torch.zeros(result.shape, dtype=result.dtype, device=result.device)
    return zeros.requires_grad_(result.requires_grad)
