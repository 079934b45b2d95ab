"""Products of a few rows with many, by a kernel of their own on a processor."""

import math

import pytest
import torch
from joint import program
from torch.nn import functional

from mkor_fx import MKOR, compile_step
from mkor_fx.ir import verify
from mkor_fx.passes.lower.skinny_products import FEW, MANY, skinny_products

mm, skinny_mm = torch.ops.aten.mm.default, torch.ops.mkor_fx_cpu.skinny_mm.default


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [*range(1, 18), 33])
@pytest.mark.parametrize("shape", [(1, 1), (17, 65), (160, 256), (77, 130), (16, 1000)])
def test_it_is_the_product(rows, shape, threads):
    few, many = randn(rows, shape[0]), randn(*shape, seed=1)
    expected = few.double() @ many.double()
    bound = (few.double().abs() @ many.double().abs()) * 2**-24 * (shape[0] + 1)
    for left in (few, few.mT.contiguous().mT):
        for right in (many, many.mT.contiguous().mT, torch.cat([many, many], 1)[:, : shape[1]]):
            found = skinny_mm(left, right)
            assert found.is_contiguous() and found.shape == expected.shape
            assert ((found.double() - expected).abs() <= bound).all()


def test_what_is_not_finite_stays_so_in_its_column():
    few, many = randn(8, 100), randn(100, 80, seed=1)
    many[50, 7], many[99, 79] = math.inf, math.nan
    found = skinny_mm(few, many)
    assert found[:, 7].isinf().all() and found[:, 79].isnan().all()
    assert found[:, [m for m in range(80) if m not in (7, 79)]].isfinite().all()


def test_of_no_rows_it_is_zero():
    assert torch.equal(skinny_mm(torch.empty(3, 0), torch.empty(0, 70)), torch.zeros(3, 70))


@pytest.mark.parametrize(
    ("few", "many", "dtype", "taken"),
    [
        ((FEW[0], 256), (256, MANY // 256), torch.float32, True),
        ((FEW[-1], 256), (256, MANY // 256), torch.float32, True),
        ((FEW[0] - 1, 256), (256, MANY // 256), torch.float32, False),
        ((FEW[-1] + 1, 256), (256, MANY // 256), torch.float32, False),
        ((8, 256), (256, MANY // 256 - 1), torch.float32, False),
        ((8, 256), (256, MANY // 256), torch.float64, False),
        ((8, 256), (256, MANY // 256), torch.bfloat16, False),
    ],
)
def test_what_is_taken(few, many, dtype, taken):
    given = randn(*few).to(dtype), randn(*many, seed=1).to(dtype)
    step = program(lambda a, b: torch.mm(a, b), *given)
    skinny_products(step)
    verify(step, "lower")
    step.module.recompile()
    found = [len(step.graph.find_nodes(op="call_function", target=target)) for target in (skinny_mm, mm)]
    assert found == [taken, not taken]
    torch.testing.assert_close(step.module(*given), torch.mm(*given), rtol=1e-5, atol=1e-4)


def test_columns_that_lie_apart_are_left_to_the_general_product():
    step = program(lambda a, b: torch.mm(a, b.mT), randn(8, 256), randn(MANY // 256, 256))
    skinny_products(step)
    assert not step.graph.find_nodes(op="call_function", target=skinny_mm)


def trained(backend, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(320, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = compile_step(model, functional.mse_loss, optimizer, rule=MKOR(product_dtype=None), backend=backend, **options)
    losses = [float(step(randn(256, 320, seed=at), randn(256, 8, seed=99))) for at in range(4)]
    return losses, step.graphs.stages["lower"].graph


def test_programs_of_inductor_have_it_and_train_the_same():
    expected, graph = trained("eager")
    assert not graph.find_nodes(op="call_function", target=skinny_mm)
    found, graph = trained("inductor")
    taken = [n for n in graph.nodes if n.target is skinny_mm]
    shapes = {tuple(tuple(operand.meta["val"].shape) for operand in node.args) for node in taken}
    rows, factors = {((8, 256), (256, 320)), ((8, 256), (256, 256))}, {((8, 320), (320, 320)), ((8, 256), (256, 256))}
    assert rows | factors <= shapes
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
