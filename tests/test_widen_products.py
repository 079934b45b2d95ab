"""Half-precision products on processors without instructions for them."""

import pytest
import torch
from joint import program
from torch.nn import functional
from torch.utils._pytree import tree_map

from mkor_fx import compile_step
from mkor_fx.ir import verify
from mkor_fx.passes.lower import widen_products as module
from mkor_fx.passes.lower.widen_products import widen_products

aten = torch.ops.aten


def convolved(x, w, grad):
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    dx, dw, _ = aten.convolution_backward(grad, x, w, None, *geometry, [True, True, False])
    return aten.convolution(x, w, None, *geometry), dx, dw


CASES = {
    "mm": (lambda a, b: aten.mm(a, b), [(5, 7), (7, 9)]),
    "addmm": (lambda c, a, b: aten.addmm(c, a, b, beta=0.5, alpha=-2), [(5, 9), (5, 7), (7, 9)]),
    "bmm": (lambda a, b: aten.bmm(a, b), [(3, 5, 7), (3, 7, 9)]),
    "baddbmm": (lambda c, a, b: aten.baddbmm(c, a, b, beta=2, alpha=0.5), [(3, 5, 9), (3, 5, 7), (3, 7, 9)]),
    "convolution": (convolved, [(2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 8, 8)]),
}


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def native(request, monkeypatch):
    monkeypatch.setattr(module, "multiplies", lambda device, dtype: request.param)
    return request.param


def operands(shapes, dtype):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_product_is_summed_in_float32_and_rounded_once(name, dtype, native):
    function, shapes = CASES[name]
    given = operands(shapes, dtype)
    step = program(function, *given)
    widen_products(step)
    verify(step, "lower")
    step.module.recompile()
    multiplied = [n for n in step.graph.nodes if n.target in module.PRODUCTS]
    kept = native or dtype == torch.float32
    for node in multiplied:
        assert {n.meta["val"].dtype for n in node.all_input_nodes} == {dtype if kept else torch.float32}
    assert multiplied
    exact = function(*(given if kept else [operand.float() for operand in given]))
    expected = tree_map(lambda made: made.to(dtype), exact)
    torch.testing.assert_close(step.module(*given), expected, rtol=0, atol=0)


def test_what_is_not_of_one_half_precision_dtype_stays(monkeypatch):
    monkeypatch.setattr(module, "multiplies", lambda device, dtype: False)
    step = program(lambda a, b: aten.mm(a, b), *operands([(5, 7), (7, 9)], torch.float64))
    widen_products(step)
    assert len(step.graph.find_nodes(op="call_function", target=aten.mm.default)) == 1
    assert not step.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)


def trained(backend, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = compile_step(model, functional.mse_loss, optimizer, rule=None, backend=backend, **options)
    x, y = operands([(32, 12), (32, 8)], torch.bfloat16)
    losses = [float(step(x, y)) for _ in range(3)]
    return losses, step.graphs.stages["lower"].graph


def dtypes(graph):
    nodes = [n for n in graph.nodes if n.target in module.PRODUCTS]
    return {operand.meta["val"].dtype for node in nodes for operand in node.all_input_nodes}


def test_programs_of_inductor_have_it_and_train_the_same(monkeypatch):
    monkeypatch.setattr(module, "multiplies", lambda device, dtype: False)
    expected, graph = trained("eager")
    assert dtypes(graph) == {torch.bfloat16}
    found, graph = trained("inductor")
    assert dtypes(graph) == {torch.float32}
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
