"""Passes one by one: exact over the zoo, idempotent, before and after as text; the stages' grammar and their record."""

import pytest
import torch
import zoo
from joint import capture, program
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy

import mkor_fx
from mkor_fx import prims
from mkor_fx.ir import Decline, Parameter, verify
from mkor_fx.passes.lower.expand import expand
from mkor_fx.passes.lower.share import share
from mkor_fx.passes.lower.unpack import unpack
from mkor_fx.passes.match.cancel_double_transpose import cancel_double_transpose
from mkor_fx.passes.match.drop_detach import drop_detach
from mkor_fx.passes.match.find_sites import find_sites
from mkor_fx.passes.match.spell_transposes import spell_transposes
from mkor_fx.passes.order.recompute_checkpoints import recompute_checkpoints
from mkor_fx.passes.order.update_when_ready import update_when_ready
from mkor_fx.passes.pipeline import CANONICALIZE, SCHEDULE
from mkor_fx.passes.torch_api.tracing import add_input, insert
from mkor_fx.show.graphs import Graphs

aten = torch.ops.aten
VECTOR, MATRIX, CUBE = torch.ones(3), torch.ones(3, 4), torch.ones(2, 3, 4)


def text(step):
    """The calls of a graph, one a line, and what it returns."""
    calls = [n for n in step.graph.nodes if n.op == "call_function"]
    lines = [f"{n} = {_short(n.target)}({', '.join(map(str, n.args))})" for n in calls]
    return [*lines, f"return {step.output.args[0]}"]


def _short(target):
    return str(target).removeprefix("aten.").removesuffix(".default")


def same(left, right):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_exact_passes_are_bitwise_exact_and_idempotent_over_the_zoo(name):
    model, _, batches = zoo.build(name, steps=1, dropout=0.5)
    for joint in capture(model, batches[0][0], match=False):
        expected = joint.outputs()
        for graph_pass in (*CANONICALIZE, find_sites, *SCHEDULE):
            assert graph_pass.exact
            graph_pass(joint.step)
            verify(joint.step, graph_pass.stage)
            assert same(joint.outputs(), expected), graph_pass.name
            once = text(joint.step)
            if graph_pass is not find_sites:  # which fills in the roles and must leave the graph alone
                graph_pass(joint.step)
            assert text(joint.step) == once, graph_pass.name


CASES = {
    "spells transposes": (
        spell_transposes,
        lambda x: (aten.t(x), aten.transpose(x, 0, 1), aten.transpose(x, -1, -2)), MATRIX,
        ["t = t(x0)", "transpose = transpose.int(x0, 0, 1)", "transpose_1 = transpose.int(x0, -1, -2)",
         "return (t, transpose, transpose_1)"],
        ["t = permute(x0, [1, 0])", "transpose = permute(x0, [1, 0])", "transpose_1 = permute(x0, [1, 0])",
         "return (t, transpose, transpose_1)"],
    ),
    "leaves transposes of three dimensions": (
        spell_transposes,
        lambda x: aten.transpose(x, 1, 2), CUBE,
        ["transpose = transpose.int(x0, 1, 2)", "return transpose"],
        ["transpose = transpose.int(x0, 1, 2)", "return transpose"],
    ),
    "cancels two transposes": (
        cancel_double_transpose,
        lambda x: aten.permute(aten.permute(aten.permute(x, [1, 0]), [-1, -2]), [1, 0]), MATRIX,
        ["permute = permute(x0, [1, 0])", "permute_1 = permute(permute, [-1, -2])",
         "permute_2 = permute(permute_1, [1, 0])", "return permute_2"],
        ["permute_2 = permute(x0, [1, 0])", "return permute_2"],
    ),
    "keeps a transpose that others use": (
        cancel_double_transpose,
        lambda x: (lambda y: (aten.permute(y, [1, 0]), aten.neg(y)))(aten.permute(x, [1, 0])), MATRIX,
        ["permute = permute(x0, [1, 0])", "permute_1 = permute(permute, [1, 0])", "neg = neg(permute)",
         "return (permute_1, neg)"],
        ["permute = permute(x0, [1, 0])", "neg = neg(permute)", "return (x0, neg)"],
    ),
    "keeps permutations of three dimensions": (
        cancel_double_transpose,
        lambda x: aten.permute(aten.permute(x, [1, 2, 0]), [1, 2, 0]), CUBE,
        ["permute = permute(x0, [1, 2, 0])", "permute_1 = permute(permute, [1, 2, 0])", "return permute_1"],
        ["permute = permute(x0, [1, 2, 0])", "permute_1 = permute(permute, [1, 2, 0])", "return permute_1"],
    ),
    "keeps a permutation that changes nothing": (
        cancel_double_transpose,
        lambda x: aten.permute(aten.permute(x, [0, 1]), [1, 0]), MATRIX,
        ["permute = permute(x0, [0, 1])", "permute_1 = permute(permute, [1, 0])", "return permute_1"],
        ["permute = permute(x0, [0, 1])", "permute_1 = permute(permute, [1, 0])", "return permute_1"],
    ),
    "drops detach for all users": (
        drop_detach,
        lambda x: (lambda y: (aten.neg(y), aten.alias(y)))(aten.detach(x)), MATRIX,
        ["detach = detach(x0)", "neg = neg(detach)", "alias = alias(detach)", "return (neg, alias)"],
        ["neg = neg(x0)", "return (neg, x0)"],
    ),
    "unpacks what was packed": (
        unpack,
        lambda x: tuple(map(aten.neg, aten.split_with_sizes(aten.cat([x, x]), [3, 3]))), VECTOR,
        ["cat = cat([x0, x0])", "split_with_sizes = split_with_sizes(cat, [3, 3])",
         "getitem = <built-in function getitem>(split_with_sizes, 0)",
         "getitem_1 = <built-in function getitem>(split_with_sizes, 1)",
         "neg = neg(getitem)", "neg_1 = neg(getitem_1)", "return (neg, neg_1)"],
        ["neg = neg(x0)", "neg_1 = neg(x0)", "return (neg, neg_1)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_before_and_after(case):
    graph_pass, function, x, before, after = CASES[case]
    step = program(function, x)
    assert text(step) == before
    graph_pass(step)
    verify(step, graph_pass.stage)
    assert text(step) == after


def test_the_library_shares_what_is_whole_or_a_scalar_and_nothing_else():
    def function(x):
        hashes = [aten.mul(aten.add(aten.arange(3), aten._to_copy(x, dtype=torch.int64)), 2) for _ in range(2)]
        return *hashes, *(aten.sum(x) for _ in range(2)), *(aten.neg(x) for _ in range(2)), aten.mul(hashes[0], 2.0)

    step = program(function, VECTOR)
    label = {node: node.meta.pop("mkor_fx") for node in step.graph.nodes if "mkor_fx" in node.meta}
    before = text(step)
    share(step)
    assert text(step) == before  # nothing of a user's graph
    for node, own in label.items():
        node.meta["mkor_fx"] = own
    share(step)
    hashed, again, total, same_total, negated, other, scaled = step.output.args[0]
    assert hashed is again and total is same_total and negated is not other and scaled is not hashed


def checkpointed(policy=CheckpointPolicy.PREFER_RECOMPUTE):
    """``x -> exp -> rand_like -> mul`` inside a checkpoint, and a backward that reads exp and mul."""

    def function(x, tangent):
        e = aten.exp(x)
        m = aten.mul(e, aten.rand_like(e))
        return aten.neg(m), aten.mul(tangent, m), aten.mul(tangent, e)

    step = program(function, MATRIX, MATRIX)
    for node in step.graph.nodes:
        if node.name in ("exp", "rand_like", "mul"):
            node.meta["recompute"] = policy
    step.seeds = [step.inputs[1]]
    return step


def test_checkpointed_nodes_are_computed_again_for_the_backward_but_random_ones_are_kept():
    step = checkpointed()
    assert text(step) == [
        "exp = exp(x0)", "rand_like = rand_like(exp)", "mul = mul.Tensor(exp, rand_like)", "neg = neg(mul)",
        "mul_1 = mul.Tensor(x1, mul)", "mul_2 = mul.Tensor(x1, exp)", "return (neg, mul_1, mul_2)",
    ]  # fmt: skip
    recompute_checkpoints(step)
    verify(step, "schedule")
    assert text(step) == [
        "exp = exp(x0)", "rand_like = rand_like(exp)", "mul = mul.Tensor(exp, rand_like)", "neg = neg(mul)",
        "exp_1 = exp(x0)", "mul_3 = mul.Tensor(exp_1, rand_like)", "mul_1 = mul.Tensor(x1, mul_3)",
        "mul_2 = mul.Tensor(x1, exp_1)", "return (neg, mul_1, mul_2)",
    ]  # fmt: skip


def test_what_a_selective_checkpoint_must_save_is_not_computed_again():
    step = checkpointed(CheckpointPolicy.MUST_SAVE)
    before = text(step)
    recompute_checkpoints(step)
    assert text(step) == before


def test_written_nodes_move_up_to_their_last_operand_and_writes_stay():
    def function(x, y):
        a = aten.neg(x)
        b = aten.exp(a)
        c = aten.sin(b)
        statistic = aten.sum(aten.mul(a, y))
        return aten.copy_(y, statistic), c

    step = program(function, MATRIX, MATRIX)
    for node in step.graph.nodes:
        if node.name in ("mul", "sum_1", "copy_"):
            node.meta["mkor_fx"] = "weight: statistics"
    update_when_ready(step)
    verify(step, "schedule")
    assert [str(n) for n in step.graph.nodes] == ["x0", "x1", "neg", "mul", "sum_1", "exp", "sin", "copy_", "output"]


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_schedule_of_a_whole_step_keeps_a_valid_order_and_computes_the_same(name):
    model, loss_fn, batches = zoo.build(name, steps=1)
    optimizer = torch.optim.AdamW(model.parameters())
    step = mkor_fx.compile_step(model, loss_fn, optimizer, backend="eager")
    step(*batches[0])
    graphs = [step.graphs["rewrite"].module, step.graphs["schedule"].module]
    results = []
    for module in graphs:
        module.graph.lint()
        generator = torch.Generator().manual_seed(0)
        inputs = [_random(n.meta["val"], generator) for n in module.graph.find_nodes(op="placeholder")]
        results.append([*fx.Interpreter(module).run(*inputs), *inputs])
    assert same(*results)
    before, after = ([str(n) for n in module.graph.nodes] for module in graphs)
    assert sorted(before) == sorted(after) and before != after, "nothing has moved"
    assert [n for n in before if n.startswith("copy_")] == [n for n in after if n.startswith("copy_")]
    nodes = list(graphs[1].graph.nodes)
    first_write = next(i for i, n in enumerate(nodes) if n.target is aten.copy_.default)
    assert all(n.target is aten.copy_.default or n.op == "output" for n in nodes[first_write:])


def _random(fake, generator):
    if not fake.is_floating_point():
        return torch.zeros(fake.shape, dtype=fake.dtype)
    return torch.rand(fake.shape, dtype=fake.dtype, generator=generator)


def test_verify_names_what_breaks_the_grammar():
    step = program(aten.neg, MATRIX)
    verify(step, "capture")
    next(n for n in step.graph.nodes if n.op == "call_function").meta.pop("val")
    with pytest.raises(AssertionError, match=r"after capture: node neg .*val"):
        verify(step, "capture")

    step = program(prims.column_sum, MATRIX)
    verify(step, "schedule")
    with pytest.raises(AssertionError, match=r"mkor_fx.column_sum.default was not expanded"):
        verify(step, "lower")
    expand(step)
    verify(step, "lower")


def test_verify_wants_one_role_for_every_parameter():
    step = program(aten.neg, MATRIX)
    step.parameters = {0: Parameter(0, "weight", (3, 4), step.inputs[0], None)}
    verify(step, "canonicalize")
    with pytest.raises(AssertionError, match="after match"):
        verify(step, "match")
    step.declines = {0: Decline("because")}
    verify(step, "match")
    step.declines[1] = Decline("of a parameter that is not there")
    with pytest.raises(AssertionError, match="do not divide the parameters"):
        verify(step, "match")


def recorded():
    graphs, step = Graphs("a program"), program(lambda x: aten.neg(aten.detach(x)), MATRIX)
    graphs.record("capture", step.module, 0.001)
    drop_detach(step)
    step.module.recompile()
    graphs.record("canonicalize", step.module, 0.002)
    return graphs


def test_graphs_keep_every_stage_as_it_was(capsys):
    graphs = recorded()
    assert [stage.name for stage in graphs] == ["capture", "canonicalize"]
    assert graphs.op_counts("capture") == {"aten.detach.default": 1, "aten.neg.default": 1}
    assert graphs["canonicalize"].op_counts() == {"aten.neg.default": 1}
    changed = [line for line in graphs.diff("capture", "canonicalize").splitlines() if line[0] in "+-"]
    assert any(line.startswith("-") and "detach" in line for line in changed)
    assert any(line.startswith("+") and "neg" in line for line in changed)
    assert graphs.diff("capture", "capture") == ""
    readable = graphs["capture"].print_readable(print_output=False)
    assert "f32[3, 4]" in readable and "aten.neg.default" in readable and capsys.readouterr().out == ""
    assert graphs["capture"].print_readable() == readable and "aten.neg.default" in capsys.readouterr().out
    table = str(graphs).splitlines()
    assert table[0] == "a program"
    assert table[-1].split()[:3] == ["canonicalize", "3", "-1"]
    with pytest.raises(KeyError, match=r"'lower'.*capture, canonicalize"):
        graphs["lower"]
    with pytest.raises(KeyError, match="not run yet"):
        Graphs("nothing")["capture"]


def test_a_trace_of_one_operand_twice_is_none_of_two():
    with FakeTensorMode() as mode:
        values = [torch.empty(3), torch.empty(3)]
    graph = fx.Graph()
    x, y = (add_input(graph, name, value, mode) for name, value in zip("xy", values, strict=True))
    dot = lambda a, b: (a * b).sum()
    graph.output((insert(graph, dot, x, x), insert(graph, dot, x, y)))
    x, y = torch.randn(3), torch.randn(3)
    assert fx.GraphModule({}, graph)(x, y) == (x.dot(x), x.dot(y))


def test_a_function_of_no_tensor_makes_a_fake_one():
    graph = fx.Graph()
    add_input(graph, "x", torch.zeros(3), FakeTensorMode())
    made = insert(graph, lambda: torch.zeros(4))
    assert isinstance(made.meta["val"], FakeTensor)


@pytest.mark.parametrize("weights, calls", [(1, 1), (5, 1), (20, 2)])
def test_small_matrices_of_several_weights_are_computed_in_few_calls(weights, calls):
    """As for a GPU, here on the host: what is read and written stays what it was, also where it is read at once."""

    def function(*factors):
        made, visits = [], factors[0].new_full((), 3).long()
        for at, factor in enumerate(factors):
            block = factor[:2].sin() + at
            new = torch.ops.mkor_fx.damped_update(factor, [block], visits, 0.9, 10.0, 2)
            made += [new, new @ factor, block]
        return tuple(made)

    factors = [torch.eye(4 + at % 3) + 0.1 for at in range(weights)]
    step = program(function, *factors)
    expand(step, stacked=True)
    step.graph.lint()
    assert sum(node.target is aten.linalg_cholesky_ex.default for node in step.graph.nodes) == calls
    results = fx.Interpreter(step.module).run(*factors)
    torch.testing.assert_close(list(results), list(function(*factors)))
