"""Symmetric rank-k updates of factors in their own memory, by a kernel of their own on a processor."""

import math

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR
from mkor_fx.api import compiled_step
from mkor_fx.options import Options
from mkor_fx.passes.lower.rank_k_updates import LARGE, update_in_place

aten = torch.ops.aten
rank_k_update_ = torch.ops.mkor_fx_cpu.rank_k_update_.default
YES, NO = torch.tensor(True), torch.tensor(False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def symmetric(size):
    factor = randn(size, size, seed=7)
    return torch.eye(size) + (factor + factor.mT) / 2


@pytest.mark.parametrize("rank", [0, 1, 2, 15, 60, 200])
@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 128, 191, 300])
def test_it_is_the_update_and_symmetric(rank, size, threads):
    factor, roots, divisor = symmetric(size), randn(rank, size), torch.tensor(0.95)
    expected = factor.double() / divisor.double() - roots.double().mT @ roots.double()
    bound = (factor.double().abs() * 2 + roots.double().abs().mT @ roots.double().abs()) * 2**-24 * (rank + 4)
    for given in (roots, roots.mT.contiguous().mT):
        found = factor.clone()
        rank_k_update_(found, given, divisor, YES)
        assert ((found.double() - expected).abs() <= bound).all()
        assert torch.equal(found, found.mT)


@pytest.mark.parametrize("size", [64, 130])
def test_the_lower_triangle_is_the_mirror_image_whatever_it_was(size):
    factor = symmetric(size)
    spoiled = factor.triu() + randn(size, size, seed=3).tril(-1)
    for each in (factor, spoiled):
        rank_k_update_(each, randn(9, size), torch.tensor(0.9), YES)
    assert torch.equal(factor, spoiled)


def test_a_step_that_does_not_count_changes_nothing():
    factor = symmetric(200)
    before = factor.clone()
    rank_k_update_(factor, torch.full((8, 200), math.nan), torch.tensor(0.95), NO)
    assert torch.equal(factor, before)


# ---- which writes of a program are taken ------------------------------------------------------------------------------


def graph_of(function, *given):
    return make_fx(function, tracing_mode="fake")(*given)


def write(factor, roots, keep, divisor):
    factor.copy_(torch.where(keep, factor / divisor - roots.mT @ roots, factor))


def taken(module):
    update_in_place(module.graph)
    module.graph.lint()
    module.recompile()
    return len(module.graph.find_nodes(op="call_function", target=rank_k_update_))


def spelled(module):
    """As Inductor has it behind its own passes: transposes are permutes."""
    for node in module.graph.find_nodes(op="call_function", target=aten.t.default):
        node.target, node.args = aten.permute.default, (node.args[0], [1, 0])
    for node in module.graph.find_nodes(op="call_function", target=aten.transpose.int):
        node.target, node.args = aten.permute.default, (node.args[0], [1, 0])
    module.recompile()
    return module


def checked(function, *given, expected=1):
    """The program writes and returns the same with the kernel; how often it has it is as expected."""
    module = spelled(graph_of(function, *given))
    assert taken(module) == expected
    plain, kernel = ([t.clone() for t in given] for _ in range(2))
    torch.testing.assert_close(module(*kernel), function(*plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [YES, NO], ids=["counts", "does_not_count"])
@pytest.mark.parametrize("number", [0.9, None], ids=["number", "tensor"])
def test_a_factor_is_written_in_place(keep, number):
    def program(factor, roots, keep, finite, gamma):
        divisor = gamma.reshape(1, 1) if number is None else number
        new = torch.where(keep, torch.where(finite, factor / divisor - roots.mT @ roots, factor), factor)
        direction = 2 * new
        factor.copy_(new)
        return direction

    checked(program, symmetric(LARGE), randn(20, LARGE), keep, YES, torch.tensor(0.9))
    checked(program, symmetric(LARGE), randn(20, LARGE), YES, keep, torch.tensor(0.9))


def test_who_reads_the_old_factor_in_front_of_the_new_one_does_not_disturb():
    def program(factor, roots, keep):
        pushed = roots @ factor
        write(factor, pushed, keep, 0.9)
        return pushed

    checked(program, symmetric(LARGE), 0.01 * randn(20, LARGE), YES)


def reads_behind(factor, roots, keep):
    new = torch.where(keep, factor / 0.9 - roots.mT @ roots, factor)
    old = factor.sum()
    factor.copy_(new)
    return old


def holds_a_view(factor, roots, keep):
    view = factor[0]
    new = torch.where(keep, factor / 0.9 - roots.mT @ roots, factor)
    old = view + 1
    factor.copy_(new)
    return old


def needs_the_product(factor, roots, keep):
    product = roots.mT @ roots
    factor.copy_(torch.where(keep, factor / 0.9 - product, factor))
    return product


def returns_it(factor, roots, keep):
    new = torch.where(keep, factor / 0.9 - roots.mT @ roots, factor)
    factor.copy_(new)
    return new


def of_two_matrices(factor, roots, keep):
    factor.copy_(torch.where(keep, factor / 0.9 - roots.mT @ (2 * roots), factor))


def keeps_by_entry(factor, roots, keep):
    write(factor, roots, factor > 0, 0.9)


def keeps_another(factor, roots, keep):
    factor.copy_(torch.where(keep, factor / 0.9 - roots.mT @ roots, 0 * factor))


def no_condition(factor, roots, keep):
    factor.copy_(factor / 0.9 - roots.mT @ roots)


def divides_by_column(factor, roots, keep):
    write(factor, roots, keep, factor.diagonal())


def of_another_factor(factor, roots, keep):
    factor.copy_(torch.where(keep, (2 * factor) / 0.9 - roots.mT @ roots, factor))


@pytest.mark.parametrize(
    "program",
    [reads_behind, holds_a_view, returns_it, needs_the_product, of_two_matrices, keeps_by_entry, keeps_another, no_condition,
     divides_by_column, of_another_factor],
)  # fmt: skip
def test_what_is_left_as_it_is(program):
    checked(program, symmetric(LARGE), randn(20, LARGE), YES, expected=0)


@pytest.mark.parametrize(("size", "dtype"), [(LARGE - 1, torch.float32), (LARGE, torch.float64), (LARGE, torch.bfloat16)])
def test_small_factors_and_other_dtypes_are_left_as_they_are(size, dtype):
    module = spelled(graph_of(lambda f, r, k: write(f, r, k, 0.9), symmetric(size).to(dtype), randn(9, size).to(dtype), YES))
    assert not taken(module)


def test_a_product_that_is_spread_over_a_factor_is_left_as_it_is():
    checked(lambda f, r, k: write(f, r, k, 0.9), randn(LARGE, LARGE + 1), randn(9, 1), YES, expected=0)


def test_columns_that_lie_apart_are_left_as_they_are():
    factor = symmetric(2 * LARGE)[:, ::2][:LARGE]
    module = spelled(graph_of(lambda f, r, k: write(f, r, k, 0.9), factor, randn(9, LARGE), YES))
    assert isinstance(module, fx.GraphModule) and not taken(module)


# ---- programs ---------------------------------------------------------------------------------------------------------


def model_and_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(320, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def trained(poisoned=None, **options):
    model, optimizer = model_and_optimizer()
    options = {"backend": "inductor", "fullgraph": True, "rule": {"*": MKOR(product_dtype=None)}, **options}
    step = compiled_step(model, functional.mse_loss, optimizer, Options(**options))
    losses = []
    for at in range(5):
        rows = randn(256, 320, seed=at)
        losses.append(float(step(rows * math.nan if at == poisoned else rows, randn(256, 8, seed=99))))
    return step, losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def code_of(step):
    return "".join(code for variant in step.variants.values() for code in variant.code)


@pytest.mark.filterwarnings("ignore:mkor_fx. a step was skipped")
def test_programs_of_inductor_have_it_and_train_the_same():
    plain, expected, weights = trained(poisoned=2, without=["rank_k_updates"])
    step, losses, found = trained(poisoned=2)
    assert "rank_k_update_" in code_of(step) and "rank_k_update_" not in code_of(plain)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-4)
    state = step.state_dict()["mkor"]
    for factor in (state["0.weight.L"], state["0.weight.R"]):
        assert torch.equal(factor, factor.mT) and not torch.equal(factor, torch.eye(len(factor)))


def test_the_loop_of_the_user_has_it_as_well():
    model, optimizer = model_and_optimizer()
    model = mkor_fx.compile(model, rule=MKOR(product_dtype=None))
    losses = []
    for at in range(5):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(randn(256, 320, seed=at)), randn(256, 8, seed=99))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert "rank_k_update_" in "".join(code for graphs in mkor_fx.explain(model).graphs.updates for code in graphs.code)
    torch.testing.assert_close(losses, trained(backend="eager")[1], rtol=1e-4, atol=1e-5)
