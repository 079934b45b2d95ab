"""Functions of a compiled program: what they share, and that they write when everybody has read. Under Inductor."""

import copy
import re

import torch
from torch import fx, nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx.passes.lower.outline import _owned, outline

aten = torch.ops.aten


class Cosine(torch.optim.Optimizer):
    """Momentum, its rate the cosine of a count that is a tensor of the group, written behind its only reader."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "turn": torch.zeros(())})

    def _init_group(self, group):
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                average = self.state[p]["average"].mul_(0.9).add_(p.grad)
                p.sub_(average * group["turn"].cos() * group["lr"])
            group["turn"].add_(1.0)


def beside_its_own_loop(model, optimizer, steps=4):
    """The compiled step, which ends where the loop does."""
    twin = copy.deepcopy(model)
    start, ours, own = copy.deepcopy(model), optimizer(model.parameters()), optimizer(twin.parameters())
    step = mkor_fx.compile_step(model, mse_loss, ours, None)
    for _ in range(steps):
        x, y = torch.randn(32, 16), torch.randn(32, 16)
        step(x, y)
        own.zero_grad()
        mse_loss(twin(x), y).backward()
        own.step()
    for p, q, old in zip(model.parameters(), twin.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 1e-5 * (q - old).norm()
    return step


def test_what_others_write_is_read_before():
    step = beside_its_own_loop(nn.Linear(16, 16, bias=False), Cosine)
    (code,) = step.variants["plain"].code
    assert "def outlined_0(" in code


def test_equal_updates_are_one_function():
    layers = [nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)]
    step = beside_its_own_loop(nn.Sequential(*layers), lambda params: torch.optim.AdamW(params, lr=1e-2))
    (code,) = step.variants["plain"].code
    assert code.count("def outlined_") == 1 and code.count("= outlined_0(outlined_0_args)") == 3


def test_what_is_used_in_its_own_midst_stays_where_it_is():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(4)
    nodes = []
    for target in (aten.sin, aten.cos, aten.exp, aten.neg, aten.sin):
        nodes.append(graph.call_function(target.default, (nodes[-1] if nodes else x,)))
        nodes[-1].meta = {"val": torch.zeros(4)}
    for node in (nodes[0], nodes[1], nodes[3], nodes[4]):  # a pass of Inductor's has put the third between them
        node.meta["mkor_fx_alone"] = "op"
    graph.output((nodes[2], nodes[4]))
    module = fx.GraphModule(torch.nn.Module(), graph)
    before, x = module(torch.ones(4)), torch.ones(4)
    outline(graph, [None])
    module.recompile()
    assert torch.equal(module(x)[1], before[1])


def test_directions_are_made_with_factors_where_these_are_kept():
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    step = mkor_fx.compile_step(model, mse_loss, torch.optim.AdamW(model.parameters()), mkor_fx.MKOR(product_dtype=None))
    step(torch.randn(32, 16), torch.randn(32, 24))
    (code,) = step.variants["refresh"].code
    assert re.search(r"mm\((outlined_\d+)_operand_\d+, \1_buf\d+, out", code)
    assert re.search(r"mm\((outlined_\d+)_buf\d+, \1_operand_\d+, out", code)


def function_of(graph, examples):
    """The one function that is made of all of a graph, its operands owned by one weight."""
    for node in graph.nodes:
        if node.op != "output" and node.target is not aten.copy_.default:
            node.meta["val"] = examples[node.name] if node.op == "placeholder" else torch.empty(4, 4)
    module = fx.GraphModule(nn.Module(), graph)
    outline(graph, [0] * len(graph.find_nodes(op="placeholder")))
    return module.outlined_0


def product_with_a_new_factor(graph, factor, weight, *, and_the_old=False):
    """``W <- F' W`` and ``F <- F'`` with ``F' = F + F^2``, and the weight written first."""
    squared = graph.call_function(aten.mm.default, (factor, factor))
    new = graph.call_function(aten.add.Tensor, (factor, squared))
    product = graph.call_function(aten.mm.default, (new, weight))
    if and_the_old:
        product = graph.call_function(aten.add.Tensor, (product, factor))
    for target, value in ((weight, product), (factor, new)):
        graph.call_function(aten.copy_.default, (target, value))
    graph.output(())


def test_new_factors_are_read_where_the_old_ones_were():
    graph = fx.Graph()
    product_with_a_new_factor(graph, graph.placeholder("factor"), graph.placeholder("weight"))
    function = function_of(graph, {"factor": torch.empty(4, 4), "weight": torch.empty(4, 4)})
    targets = [node.target for node in function.graph.nodes if node.op == "call_function"]
    assert targets == [aten.mm.default, aten.add.Tensor, aten.copy_.default, aten.mm.default, aten.copy_.default]
    factor, weight = torch.eye(4) * 2, torch.ones(4, 4)
    function(factor, weight)
    assert torch.equal(factor, torch.eye(4) * 6) and torch.equal(weight, torch.full((4, 4), 6.0))


def test_a_factor_is_overwritten_behind_its_last_reader():
    for examples in ({}, {"factor": torch.empty(4, 4, dtype=torch.float64)}):  # what is rounded is not what was written
        graph = fx.Graph()
        product_with_a_new_factor(graph, graph.placeholder("factor"), graph.placeholder("weight"), and_the_old=not examples)
        function = function_of(graph, {"factor": torch.empty(4, 4), "weight": torch.empty(4, 4), **examples})
        *_, first, second = [node for node in function.graph.nodes if node.op == "call_function"]
        assert (first.target, second.target) == (aten.copy_.default, aten.copy_.default)


def test_what_is_written_twice_is_rounded_where_it_is_narrow():
    graph = fx.Graph()
    narrow, wide, other = map(graph.placeholder, ("narrow", "wide", "other"))
    value = graph.call_function(aten.mul.Tensor, (wide, wide))
    behind = graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (value, value)), wide))
    for target, new in ((narrow, value), (other, behind), (wide, value)):
        graph.call_function(aten.copy_.default, (target, new))
    graph.output(())
    examples = {"narrow": torch.empty(4, 4, dtype=torch.bfloat16), "wide": torch.empty(4, 4), "other": torch.empty(4, 4)}
    function = function_of(graph, examples)
    wide, narrow, other = torch.full((4, 4), 1 / 3), torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4)
    expected = wide * wide
    function(wide, narrow, other)  # in the order of their first use
    assert torch.equal(wide, expected) and torch.equal(narrow, expected.bfloat16())


def test_what_a_copy_reads_is_written_behind_it():
    """A copy of what is made elsewhere stays outside of a function, unless another copy inside reads what it writes."""
    graph = fx.Graph()
    old, older, made = (graph.placeholder(name) for name in ("old", "older", "made"))
    for node in (old, older, made):
        node.meta["val"] = torch.zeros(4)
    nodes = [graph.call_function(aten.sin.default, (older,))]
    for target in (aten.cos, aten.exp, aten.neg):
        nodes.append(graph.call_function(target.default, (nodes[-1],)))
    new = graph.call_function(aten.mul.Tensor, (made, 2))
    for node in (*nodes, new):
        node.meta["val"] = torch.zeros(4)
    last = graph.placeholder("last")
    nodes[0].prepend(last)
    last.meta["val"] = torch.zeros(4)
    for target, value in ((last, nodes[-1]), (older, old), (old, new)):
        graph.call_function(aten.copy_.default, (target, value))
    graph.output((new,))
    groups = _owned(graph, dict(zip(graph.find_nodes(op="placeholder"), ("one", "one", None, "one"), strict=True)))
    (inside,) = groups
    written = [node.args[0] for node in inside if node.target is aten.copy_.default]
    assert written == [last, older, old]
