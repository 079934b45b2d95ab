"""From a graph to a callable: eager or Inductor. One of the homes of torch's private APIs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .capture import decompositions, unrolled_layers
from .tracing import Decompositions

BACKENDS = ("inductor", "eager")
#: Inductor's option, which leaves out, and says so in a log alone, what writes to its inputs
CUDA_GRAPHS = "triton.cudagraphs"


def inductor_decompositions() -> Decompositions:
    """What Inductor wants to see taken apart, operator by operator."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def eliminate_dead_code(graph: fx.Graph) -> None:
    """As ``graph.eliminate_dead_code``, which lints the graph and asks every node whether it is pure, a tenth of the time of
    writing a program; asked here are those that nothing reads."""
    random = torch._guards.TracingContext.try_get() is None or torch._inductor.config.fallback_random
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure(random):
            graph.erase_node(node)


@contextlib.contextmanager
def plain_tracing() -> Iterator[None]:
    """No gradient, no autocast: what is traced, compiled or run inside is taken literally."""
    with torch.no_grad(), torch._C._DisableAutocast():
        yield


class Compiler(NamedTuple):
    """One of ``BACKENDS``, and Inductor's configuration."""

    backend: str
    options: dict[str, Any]


def compile_graph(
    module: fx.GraphModule, compiler: Compiler, code: list[str], *passes: PostGradPass
) -> Callable[..., list]:
    """A callable over the graph's placeholders that returns its flat outputs; inputs that it copies into are mutated.

    What Inductor generates is appended to ``code``; ``passes`` run behind all of its own graph passes.
    """
    module.recompile()
    backend, options = compiler
    if backend == "eager":
        return module
    from torch._inductor import compile_fx as inductor

    options = {**_layout(module.graph), **options, CUDA_GRAPHS: False}
    for added in passes:
        options = _with_pass(options, "post_grad_custom_post_pass", added)
    examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    fake_mode = next(e.fake_mode for e in examples if isinstance(e, torch._subclasses.FakeTensor))
    context = torch._guards.TracingContext(fake_mode)
    with torch._guards.tracing(context), _collecting(code), torch._inductor.config.patch(options):
        if cpp_wrapper():
            return inductor.compile_fx(module, examples)
        return _compile_functional(module, examples, fake_mode)


def _layout(graph: fx.Graph) -> dict[str, Any]:
    """Inductor's option, which puts what convolutions read and write in channels-last order, for a graph.

    Inductor decides by a graph's forward convolutions, always for them on a CPU. torch.compile's backward, which has none,
    keeps the order of its inputs; of a step in one graph the backward would change too, which makes it a sixth slower.
    """
    backward = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default)
    on_cpu = bool(backward) and all(node.args[1].meta["val"].device.type == "cpu" for node in backward)
    return {"layout_optimization": False} if on_cpu and not torch._inductor.config.force_layout_optimization else {}


def cpp_wrapper() -> bool:
    """Whether Inductor is to write a program that C++ runs, which has no functions of its own."""
    return torch._inductor.config.cpp_wrapper


def _compile_functional(module: fx.GraphModule, examples: list[Any], fake_mode: FakeTensorMode) -> Callable[..., list]:
    """What ``compile_fx`` does with a graph behind AOTAutograd, through which this one has been already: to trace all of it
    once more takes a fifth of a compilation."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import compile_fx as inductor
    from torch._inductor.virtualized import V

    outputs = len(module.graph.output_node().args[0])
    extra = inductor.create_compiler_config_extra(module)
    with enable_python_dispatcher(), V.set_fake_mode(fake_mode), fake_mode:
        compiled = inductor.compile_fx_forward(
            module, examples, outputs, len(examples), extra, inductor.compile_fx_inner, is_inference=True
        )
    return lambda *args: compiled(list(args))


@contextlib.contextmanager
def _collecting(code: list[str]) -> Iterator[None]:
    """Append the program that Inductor generates, or finds in a cache, for each graph compiled inside; its C++ kernels are
    compiled together."""
    from torch._inductor.graph import GraphLowering

    from .cpp_kernels import compiled_together

    earlier = GraphLowering.save_output_code
    GraphLowering.save_output_code = code.append
    try:
        with compiled_together():
            yield
    finally:
        GraphLowering.save_output_code = earlier


def inductor_options(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """torch.compile's ``mode`` and ``options`` as Inductor config entries.

    Raises:
        ValueError: an unknown mode or option; lists what there is.
    """
    import torch._inductor as inductor

    patches = dict(options or {})
    if mode not in (None, "default"):
        modes = inductor.list_mode_options()
        if mode not in modes:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(dict.fromkeys(['default', *modes]))}")
        patches = {**modes[mode], **patches}
    known = inductor.list_options()
    for name in patches:
        if name not in known:
            raise ValueError(f"options: {name!r} is no option of Inductor; torch._inductor.list_options() lists them")
    return patches


class JointPass(CustomGraphPass):
    """A pass over the joint graph of what Dynamo has captured, run before Inductor's own; ``uuid`` is its cache key."""


class PostGradPass(CustomGraphPass):
    """A pass behind all of Inductor's own over a graph; ``uuid`` is its cache key, and a cache hit skips it."""


def depend(graph: fx.Graph, needs: dict[fx.Node, list[fx.Node]]) -> None:
    """Give each node of ``needs``, in the order of the graph, further nodes that must run before it."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    preserve_node_ordering(graph, {node: OrderedSet(before) for node, before in needs.items()})


def compile_joint(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    joint_pass: JointPass | None,
    compiler: Compiler,
    code: list[str],
) -> Callable[..., Any]:
    """Compile Dynamo's graph for training, its joint graph rewritten by ``joint_pass``; plainly without.

    What Inductor generates is appended to ``code``: the forward's program now, the backward's when it first runs.

    AOTAutograd's cache is left out, since it would skip the pass; Inductor's own cache stays in.
    """
    (backend, options), table = compiler, {} if joint_pass is None else decompositions()
    with torch._functorch.config.patch(enable_autograd_cache=False), unrolled_layers(gm):
        if backend == "eager":
            return _aot_eager(gm, inputs, joint_pass, table)
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        if joint_pass is None:
            return compile_fx(gm, list(inputs), config_patches=options)

        def inner(*args: Any, **kwargs: Any) -> Any:
            with _collecting(code):
                return compile_fx_inner(*args, **kwargs)

        patches = _with_pass(options, "joint_custom_pre_pass", joint_pass)
        return compile_fx(gm, list(inputs), inner, config_patches=patches, decompositions=table)


def _with_pass(options: dict[str, Any], hook: str, added: CustomGraphPass) -> dict[str, Any]:
    """Options with one more pass in one of Inductor's hooks, behind the user's own."""
    from torch._inductor import config

    chosen = options.get(hook, getattr(config, hook)) or []
    users = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
    return {**options, hook: [*users, added]}


def _aot_eager(
    gm: fx.GraphModule, inputs: Sequence[Any], joint_pass: JointPass | None, decompositions: dict
) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        if joint_pass is not None:
            joint_pass(joint.graph)
        return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

    def run(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(module.forward)

    compiler = aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        partition_fn=partition,
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )
    return compiler(gm, list(inputs))


def new_fake_mode() -> FakeTensorMode:
    """For graphs written from nothing, in which nothing is read on the host. It has a shape environment, without which
    Inductor's cache does not look."""
    return FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False))
