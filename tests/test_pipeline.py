"""The pipeline as a list: what each pass is worth, seen by leaving it out; which passes each program has; what programs are
passed."""

import copy
from dataclasses import replace

import pytest
import torch
from held_rules import Leading
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR
from mkor_fx.api import compiled_model, compiled_step
from mkor_fx.options import Options
from mkor_fx.passes import pipeline
from mkor_fx.passes.pipeline import REWRITE, VARIANTS, choose
from mkor_fx.runtime import inputs


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step_of(model, rule=MKOR.published(), **options):  # noqa: B008
    chosen = Options(rule=rule, backend="eager", fullgraph=True, **options)
    return compiled_step(model, functional.mse_loss, sgd(model), chosen)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def trained(count=3, **options):
    """The step, and the model's values, behind ``count`` steps."""
    model = network()
    step = step_of(model, **options)
    for x, y in batches(count):
        step(x, y)
    return step, values(model)


# ---- leaving a pass out ---------------------------------------------------------------------------------------------------


def labels(step, stage="rewrite", variant=None):
    graphs = step.graphs if variant is None else step.variants[variant]
    return {node.meta.get("mkor_fx", "") for node in graphs[stage].graph.nodes}


def test_without_precondition_it_is_the_base_optimizer():
    _, plain = trained(rule=None)
    step, found = trained(without=["precondition"])
    assert same(found, plain)
    assert not torch.equal(step.mkor.state_dict()["0.weight.L"], torch.eye(9))  # but the factors refresh


def test_without_refresh_factors_stay_the_identity():
    step, _ = trained(without=["refresh"])
    assert torch.equal(step.mkor.state_dict()["0.weight.L"], torch.eye(9))


def test_without_statistics_there_is_nothing_to_refresh_from():
    step, _ = trained(without=["statistics", "refresh"])
    assert torch.equal(step.mkor.state_dict()["0.weight.L"], torch.eye(9))
    assert not any("statistics" in label for label in labels(step))


def test_without_optimize_no_weight_moves():
    step, found = trained(without=["optimize"])
    assert same(found, values(network()))
    assert not torch.equal(step.mkor.state_dict()["0.weight.L"], torch.eye(9))


def test_without_write_back_nothing_changes():
    model = network()
    optimizer = sgd(model)
    options = Options(backend="eager", fullgraph=True, without=["write_back"])
    step = compiled_step(model, functional.mse_loss, optimizer, options)
    before = values(model)
    losses = [step(*batches(1)[0]).item() for _ in range(2)]
    assert same(values(model), before) and losses[0] == losses[1]
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_without_seed_the_gradient_of_the_loss_is_passed_in():
    usual, expected = trained()
    step, found = trained(without=["seed"])
    assert same(found, expected)
    passed = [len(s.graphs["rewrite"].graph.find_nodes(op="placeholder")) for s in (usual, step)]
    assert passed[1] == passed[0] + 1


def test_without_reduce_one_process_computes_the_same():
    _, expected = trained()
    _, found = trained(without=["reduce"])
    assert same(found, expected)


@pytest.mark.parametrize("name", ["recompute_checkpoints", "update_when_ready", "store_scalars", "shortcut_row_sums",
                                  "order_products", "unpack", "widen_products", "skinny_products", "share", "outline",
                                  "rank_k_updates", "bucket", "issue_alike", "schedule", "pin"])  # fmt: skip
def test_order_and_shortcuts_change_no_value(name):
    _, expected = trained()
    _, found = trained(without=[name])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def driven(without, rule=MKOR.published(), precondition="step"):  # noqa: B008
    """As ``trained``, through the drop-in door: whether factors and weights have moved."""
    model = network()
    handle = compiled_model(model, Options(rule=rule, backend="eager", without=without, precondition=precondition))
    optimizer = sgd(model)
    for x, y in batches():
        optimizer.zero_grad()
        functional.mse_loss(handle(x), y).backward()
        optimizer.step()
    state = handle.mkor.state_dict()
    factor = state.get("0.weight.L", torch.eye(9))
    return not torch.equal(factor, torch.eye(9)), values(model)


@pytest.mark.filterwarnings("ignore:mkor_fx does not precondition")  # without statistics: right, and tested elsewhere
@pytest.mark.parametrize(("name", "refreshes"), [("statistics", False), ("carry", False), ("receive", False),
                                                 ("refresh", False), ("precondition", True),
                                                 ("write_back", False)])  # fmt: skip
def test_the_drop_in_doors_passes_can_be_left_out(name, refreshes):
    usual, plain = driven([]), trained(rule=None)[1]
    moved, found = driven([name])
    assert moved is refreshes and not same(found, usual[1])
    if name in ("statistics", "carry", "precondition"):
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:mkor_fx does not precondition")
@pytest.mark.parametrize(("name", "refreshes"), [("statistics", False), ("precondition_in_backward", True),
                                                 ("carry", False), ("receive", False), ("refresh", False),
                                                 ("resize", True)])  # fmt: skip
def test_those_of_the_backward_mode_too(name, refreshes):
    usual = driven([], precondition="backward")
    moved, found = driven([name], precondition="backward")
    assert moved is refreshes and not same(found, usual[1])


@pytest.mark.parametrize("name", ["take_directions", "optimize"])
def test_those_of_a_rule_that_steps_itself_too(name):
    assert same(driven([name], Leading())[1], values(network()))


@pytest.mark.parametrize("make", [lambda **o: step_of(network(), **o),
                                  lambda **o: compiled_model(network(), Options(backend="eager", **o))])  # fmt: skip
def test_the_name_of_no_pass(make):
    with pytest.raises(ValueError, match=r"without='refreshh': no such pass; there are seed, statistics, accumulate, "):
        make(without=["refreshh"])


# ---- programs -------------------------------------------------------------------------------------------------------------


def test_variants_are_rows_of_passes_in_the_order_of_the_list():
    order = [p.name for p in REWRITE]
    assert order == ["seed", "statistics", "accumulate", "add_parts", "reduce", "clip_gradients", "send", "arrive",
                     "refresh", "precondition", "clip_divergence", "spread_directions", "optimize", "scale_steps",
                     "average_weights", "write_back"]
    for name, variant in VARIANTS.items():
        assert variant.name == name
        assert list(variant.passes) == [p for p in order if p in variant.passes]
    assert {"refresh", "reuse", "plain", "fallback"} <= VARIANTS.keys()
    assert all(p.stage == "rewrite" for p in [*REWRITE, *pipeline.UPDATE, *pipeline.APPLY, *pipeline.REFRESH])


@pytest.mark.parametrize(("case", "expected"), [
    ({"step": 0, "refresh_every": 1}, "refresh"),
    ({"step": 0, "refresh_every": 3}, "refresh"),
    ({"step": 1, "refresh_every": 3}, "reuse"),
    ({"step": 3, "refresh_every": 3}, "refresh"),
    ({"step": 0, "refresh_every": 1, "rule": False}, "plain"),
    ({"step": 0, "refresh_every": 1, "fallback": True}, "fallback"),
    ({"step": 0, "refresh_every": 1, "rule": False, "fallback": True}, "plain"),
    ({"step": 0, "refresh_every": 3, "stale": 1}, "collect"),
    ({"step": 1, "refresh_every": 3, "stale": 1}, "catch up"),
    ({"step": 2, "refresh_every": 3, "stale": 1}, "reuse"),
    ({"step": 5, "refresh_every": 1, "stale": 1}, "late refresh"),
])  # fmt: skip
def test_one_function_chooses(case, expected):
    options = dict(case)
    assert choose(options.pop("step"), options.pop("refresh_every"), **options).name == expected


def test_each_program_is_named_by_its_variant():
    step, _ = trained(count=3, refresh_every=2)
    assert set(step.variants) == {"refresh", "reuse"}
    assert not any("statistics" in label or "refresh" in label for label in labels(step, variant="reuse"))


def test_the_fallback_is_exactly_the_base_optimizer():
    model, twin = network(), network()
    step, plain = step_of(model), step_of(twin, rule=None)
    first, *rest = batches(4)
    step(*first)
    state = {key: t.clone() for key, t in step.mkor.tensors().items()}
    twin.load_state_dict(model.state_dict())
    plain(*first)
    plain.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    twin.load_state_dict(model.state_dict())
    step.fallback = True
    for x, y in rest:
        assert torch.equal(step(x, y), plain(x, y))
        assert same(values(model), values(twin))
    assert set(step.variants) == {"refresh", "fallback"}
    assert all(torch.equal(t, state[key]) for key, t in step.mkor.tensors().items())
    costs = [graphs.op_counts("lower") for graphs in (step.variants["fallback"], plain.variants["plain"])]
    assert costs[0] == costs[1]
    step.fallback = False
    step(*first)
    assert not same(list(step.mkor.tensors().values()), list(state.values()))


# ---- what programs are passed ---------------------------------------------------------------------------------------------


def test_an_added_input_says_how_it_is_fetched(monkeypatch):
    """A pass outside of the library adds an input of its own: nothing else has to know of it."""

    class Temperature(inputs.Input):
        def __eq__(self, other):
            return isinstance(other, Temperature)

        def __hash__(self):
            return 1

        def fetch(self, call):
            return torch.full((), float(call.step.mkor.step), dtype=torch.float32)

    def cool(draft):
        node = draft.scalar(Temperature(), torch.float32)
        for index, gradient in draft.gradients.items():
            draft.gradients[index] = draft.insert(torch.mul, gradient, node, label="cool")

    monkeypatch.setattr("mkor_fx.doors.whole_step.REWRITE", [REWRITE[0], GraphPassNamed("seed", cool), *REWRITE[1:]])
    model = network()
    step, found = step_of(model, rule=None), [values(model)]
    for x, y in batches(2):
        step(x, y)
        found.append(values(model))
    assert same(found[0], found[1]) and not same(found[1], found[2])  # the temperature was 0, then 1
    names = [node.name for node in step.graphs["rewrite"].graph.find_nodes(op="placeholder")]
    assert "mkor_temperature" in names


def GraphPassNamed(name, run):
    """A pass that every variant with ``name`` has."""
    run.__name__ = name
    return pipeline.GraphPass(run, "rewrite", False)


def test_inputs_are_fetched_anew_at_each_step():
    step, _ = trained(count=2)
    inputs = step.graphs["rewrite"].graph.find_nodes(op="placeholder")
    added = [node.name for node in inputs if node.name.startswith("mkor_")]
    assert {"mkor_steps", "mkor_numbers", "mkor_skipped"} <= set(added)
    assert sum(name.startswith("mkor_factor_") for name in added) == 4
    assert sum(name.startswith("mkor_optimizer_") for name in added) == 4


def test_a_model_is_matched_alike_before_and_while_it_is_compiled(monkeypatch):
    """``compile`` looks at each graph once to give carriers and once more to write: the two must agree, by name."""
    from mkor_fx.doors import compiled_graph

    def other(gm, given, matching):
        found = look_at(gm, given, matching)
        return replace(found, layouts=dict(list(found.layouts.items())[1:]))

    look_at = compiled_graph.look_at
    monkeypatch.setattr(compiled_graph, "look_at", other)
    handle = mkor_fx.compile(network(), backend="eager")
    with pytest.raises(Exception, match=r"0\.weight"):
        handle(batches()[0][0])
