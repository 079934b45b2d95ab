"""Factors multiply rows where that is cheaper, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mkor_fx import KFAC, MKOR
from mkor_fx.api import compiled_step
from mkor_fx.options import Options
from mkor_fx.passes.lower.order_products import _cheapest

PUBLISHED = MKOR.published(factor_dtype=torch.float64, bias="off")


class Turned(nn.Module):
    """A weight that is stored the other way round."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return x @ self.weight


def trained(layer, rows, rule=PUBLISHED, without=(), dtype=torch.float64, **options):
    """The step and the weight behind three of them."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(20, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"backend": "eager", "fullgraph": True, "rule": {"0.weight": rule, "*": None}, "without": without, **options}
    step = compiled_step(model, functional.mse_loss, optimizer, Options(**options))
    for _ in range(3):
        step(torch.randn(rows, 20).to(dtype), torch.randn(rows, 3).to(dtype))
    return step, model[0].weight.detach()


def widths(step):
    """Of the products with a factor: what they multiply, the smaller of its sizes that is not the factor's."""
    found = []
    for node in step.graphs.stages["lower"].graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        left, right = (arg.meta["val"].shape for arg in node.args)
        found += [right[1]] if tuple(left) == (12, 12) else [left[0]] if tuple(right) == (20, 20) else []
    return sorted(found)


@pytest.mark.parametrize("layer", [lambda i, o: nn.Linear(i, o, bias=False), Turned], ids=["[O, I]", "[I, O]"])
@pytest.mark.parametrize(("rows", "expected"), [(4, [4, 4]), (9, [9, 9]), (40, [12, 20])])
def test_the_cheapest_order_is_taken_and_no_value_changes(layer, rows, expected):
    step, found = trained(layer, rows)
    plain, same = trained(layer, rows, without=("order_products",))
    assert widths(step) == expected and widths(plain) == [12, 20]
    torch.testing.assert_close(found, same, rtol=1e-10, atol=1e-12)


def test_one_side_alone():
    """The left factor multiplies rows that are fewer than the inputs, the right one rows that are fewer than the outputs."""
    assert _cheapest((5, 40, 100), True, True, kept=False) == (True, False)
    assert _cheapest((100, 40, 5), True, True, kept=False) == (False, True)
    assert _cheapest((100, 40, 5), True, False, kept=False) == (False, False)
    assert _cheapest((100, 10, 100), True, True, kept=True) == (True, True)
    assert _cheapest((100, 100, 100), True, True, kept=True) == (False, False)


def test_of_equally_many_rows_the_product_made_anyway_decides():
    """Its multiply-adds are spent already: operands first would spend them again."""
    assert _cheapest((100, 90, 100), True, True, kept=True) == (False, False)
    assert _cheapest((100, 90, 100), True, True, kept=False) == (True, True)


@pytest.mark.parametrize("options", [{"clip_norm": 1e-3}, {"accumulate": 2}], ids=["clipped", "accumulated"])
def test_a_gradient_that_is_not_the_product_itself_is_left_alone(options):
    _, found = trained(nn.Linear, 4, **options)
    _, same = trained(nn.Linear, 4, without=("order_products",), **options)
    assert torch.equal(found, same)


def test_a_momentum_is_no_product():
    _, found = trained(nn.Linear, 4, MKOR(factor_dtype=torch.float64))
    _, same = trained(nn.Linear, 4, MKOR(factor_dtype=torch.float64), without=("order_products",))
    assert torch.equal(found, same)


def test_products_in_their_own_dtype():
    rule = MKOR.published(product_dtype=torch.bfloat16)
    step, found = trained(nn.Linear, 4, rule, dtype=torch.float32)
    _, same = trained(nn.Linear, 4, rule, without=("order_products",), dtype=torch.float32)
    products = step.graphs.stages["lower"].graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert sum(node.meta["val"].dtype == torch.bfloat16 for node in products) >= 3
    assert not torch.equal(found, same)
    torch.testing.assert_close(found, same, rtol=2e-2, atol=2e-3)


def test_a_rule_that_asks_for_no_size_makes_no_gradient():
    """Nothing but the direction needs it: three products, of which none is the gradient."""
    step, found = trained(nn.Linear, 4, KFAC(graft=None, derive_every=1, damping=1.0), skip_nonfinite=False)
    _, same = trained(
        nn.Linear, 4, KFAC(graft=None, derive_every=1, damping=1.0), without=("order_products",), skip_nonfinite=False
    )
    torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-6)  # its factors are float32
    made = [node for node in step.graphs.stages["lower"].graph.nodes if node.target is torch.ops.aten.mm.default]
    assert sum(tuple(node.meta["val"].shape) == (12, 20) for node in made) == 1
