"""Dynamo: what it has captured, and how it is called. One of the homes of torch's private APIs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..naming import Naming
from .failures import STANCE, failed_call, recompile_forbidden

_copies = itertools.count()


def own_code(function: Callable) -> Callable:
    """The function under a name of its own: Dynamo keeps caches, limits and guesses of dynamic sizes by code and name."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def dynamo_parameters(gm: fx.GraphModule, naming: Naming) -> dict[int, tuple[str, nn.Parameter]]:
    """Trainable parameters of the model among the inputs of Dynamo's graph: position -> (name, parameter)."""
    found = {}
    for index, example in dynamo_tensors(gm).items():
        name = naming.name(example)
        if name is not None and isinstance(example, nn.Parameter) and example.requires_grad:
            found[index] = (name, example)
    return found


def dynamo_tensors(gm: fx.GraphModule) -> dict[int, Any]:
    """What the inputs of Dynamo's graph are at its capture, by position."""
    arguments = (node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder"))
    return {i: argument.example for i, argument in enumerate(arguments) if argument is not None}


def data_inputs(gm: fx.GraphModule, naming: Naming) -> frozenset[int]:
    """Positions among the inputs of Dynamo's graph that hold no parameter or buffer of the model."""
    arguments = enumerate(node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder"))
    return frozenset(index for index, a in arguments if a is None or id(a.example) not in naming.own)


def dense_lookups(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph whose embeddings have dense gradients: a sparse one is the same numbers in a form that no
    compiler takes. The graph itself where there is none."""
    sparse = [node for node in gm.graph.nodes if _asks_for_sparse(node)]
    if not sparse:
        return gm
    copied = fx.GraphModule(gm, fx.Graph())
    copies: dict[fx.Node, fx.Node] = {}
    copied.graph.output(copied.graph.graph_copy(gm.graph, copies))
    for node, copy in copies.items():
        if node.op == "placeholder":
            copy._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    for node in map(copies.__getitem__, sparse):
        node.args = (*node.args[:6], *([False] if len(node.args) > 6 else []))
        node.kwargs = {**node.kwargs, **({"sparse": False} if "sparse" in node.kwargs else {})}
    copied.meta.update(gm.meta)
    copied.recompile()
    return copied


def _asks_for_sparse(node: fx.Node) -> bool:
    return node.target is F.embedding and bool(node.kwargs.get("sparse", (*node.args, *[False] * 7)[6]))


def recurrence(gm: fx.GraphModule) -> tuple[set[int], int]:
    """The lengths of the sequences that recurrent layers of Dynamo's graph run over, and how many programs Dynamo makes
    of one function."""
    lengths = set()
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu") and node.op == "call_function":
            rows = node.args[0].meta["example_value"]
            if rows.dim() == 3:  # what is packed has no time of its own
                lengths.add(int(rows.shape[1 if node.args[-1] is True else 0]))
    return lengths, torch._dynamo.config.recompile_limit


def check_loss(gm: fx.GraphModule, named: dict[int, str]) -> None:
    """Dynamo's graph must return a scalar that has a gradient."""
    returned = gm.graph.output_node().args[0]
    loss = returned[0].meta.get("example_value") if returned and isinstance(returned[0], fx.Node) else None
    if not isinstance(loss, Tensor):
        raise ValueError("the loss is not a tensor of the captured graph: loss_fn must compute it from the outputs")
    if loss.dim() != 0:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}, it must be a scalar: return loss.mean() or loss.sum()"
        )
    if not loss.dtype.is_floating_point:
        raise ValueError(f"the loss has dtype {loss.dtype}: integers have no gradient, return a floating-point loss")
    if not named or not loss.requires_grad:
        raise ValueError(
            "the loss depends on no trainable parameter of the model: is it computed under no_grad, from a "
            "detached or integer tensor, or are all parameters frozen?"
        )


def with_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], added: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of Dynamo's graph with one more, unused, input for each tensor in ``added``.

    The gradient of an input that the forward does not use is free for the backward graph to define. So a leaf among them
    can carry statistics out of the backward, and autograd adds them up over micro-batches, uses and graphs as it does any
    gradient.
    """
    graph = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, environment))
    for node, copy in environment.items():
        if node.op == "placeholder":
            copy._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    fake_mode = torch._guards.TracingContext.get().fake_mode
    last = graph.find_nodes(op="placeholder")[-1]
    fakes = [fake_mode.from_tensor(tensor, static_shapes=True) for tensor in added]
    for i, fake in enumerate(fakes):
        with graph.inserting_after(last):
            last = graph.placeholder(f"mkor_input_{i}")
        last.meta["example_value"] = fake
        last._dynamo_source = None  # type: ignore[attr-defined]
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied, [*example_inputs, *fakes]


def dynamo_compile(function: Callable, backend: Callable[..., Any], *, fullgraph: bool, dynamic: bool | None) -> Callable:
    """``torch.compile(function)`` for the user to call, by a bound method ``backend(gm, inputs)`` that is held weakly.

    Dynamo keeps backends in a table for ever, and compiled code beside the function's code, where no garbage collector
    looks: neither may own what owns the function.
    """
    held = _Backend(weakref.WeakMethod(backend))
    compiled = torch.compile(own_code(function), backend=held, fullgraph=fullgraph, dynamic=dynamic)
    weakref.finalize(backend.__self__, torch._dynamo.eval_frame.cached_backends.pop, id(held), None)  # type: ignore
    return facing_user(compiled)


class _Backend:
    """What Dynamo is given as a backend."""

    def __init__(self, method: weakref.WeakMethod) -> None:
        self._method = method

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        backend = self._method()
        assert backend is not None, "what compiles has been dropped while it is called"
        return backend(gm, inputs)


def held_weakly(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What a backend returns to Dynamo, which keeps it beside the code that it was made of and so for ever, if ``compiled``
    refers to that code: a graph with a backward does. Whoever owns the code has to own ``compiled`` as well."""
    ref = weakref.ref(compiled)

    def call(*args: Any) -> Any:
        own = ref()
        assert own is not None, "a graph has been dropped while it is called"
        return own(*args)

    return call


def under_transform() -> bool:
    """Whether a function transform (``torch.func``) is at work, under which Dynamo may run what it is given as it is."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def told_to_stay_out() -> bool:
    """Whether the user has switched compilation off, or chosen by a stance when it happens."""
    stance = torch._dynamo.eval_frame._stance
    return torch._dynamo.config.disable or stance.stance != "default" or stance.backend is not None


def outside_dynamo() -> contextlib.AbstractContextManager:
    """What is traced inside has static shapes of its own, whatever Dynamo is capturing around it."""
    return torch._guards.tracing(None)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """torch.compiler.is_compiling() is True: optimizers then keep their step count on the device."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


#: methods of loggers that libraries add for what is worth saying once: it would end the graph, and says nothing of a step
SAID_ONCE = ("debug_once", "info_once", "warning_once", "warning_advice", "error_once")


def facing_user(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` returned, for the user to call.

    Errors that the library raises for the user while Dynamo compiles arrive as themselves, without Dynamo's wrapping, and
    its limit as one that says what to do.
    During the call Dynamo captures ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` as their time steps, leaves out what loggers
    say once, and does not split graphs at the buckets of a DistributedDataParallel around the model.
    """
    config = torch._dynamo.config
    once = {getattr(logging.Logger, name) for name in SAID_ONCE if hasattr(logging.Logger, name)}
    silent = config.ignore_logging_functions | once

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with config.patch(allow_rnn=True, optimize_ddp=False, ignore_logging_functions=silent):
                return compiled(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, ValueError):
                raise failure.inner_exception from None
            raise
        except (torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported) as failure:
            unsupported = isinstance(failure, torch._dynamo.exc.Unsupported)
            if unsupported and "when making fake tensor call" not in str(failure):
                raise
            raise failed_call(failure, args, kwargs) from failure
        except torch._dynamo.exc.FailOnRecompileLimitHit as failure:
            raise RuntimeError(
                f"torch.compile has reached its recompile limit ({config.recompile_limit} programs) and compiles no "
                f"further: "
                "something differs at each call, and each value of it asks for another program. TORCH_LOGS=recompiles tells "
                "what; pad inputs to few sizes (of sequences under nn.LSTM, nn.GRU and nn.RNN each length is a "
                "program of its own), "
                "keep counters in buffers, or raise torch._dynamo.config.recompile_limit"
            ) from failure
        except RuntimeError as failure:
            if STANCE not in str(failure) or torch._dynamo.eval_frame._stance.stance != STANCE:
                raise
            raise recompile_forbidden(failure) from failure

    return run
