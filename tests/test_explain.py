"""What `explain` and `Coverage` tell: fractions, lines, modules, costs, JSON, and the check for people's own tests."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from held_rules import MORE_RULES, RULES
from torch import nn

import mkor_fx
from mkor_fx import MKOR
from mkor_fx.optim import COAP, LAMB, SMMF, Adalayer, HFac
from mkor_fx.rules import Shape
from mkor_fx.show.costs import count_costs, orders, short

PUBLISHED = mkor_fx.MKOR.published()


@pytest.fixture(scope="module")
def gpt():
    """Coverage of the GPT; its position embedding is the one matrix that may be declined."""
    model, loss_fn, batches = zoo.build("gpt")
    return mkor_fx.explain(model, *batches[0], loss_fn=loss_fn, skip=["blocks.0.down.weight"], rule=PUBLISHED)


def test_fractions_count_matrices_apart(gpt):
    matrices = [e for e in gpt if e.matrix]
    assert {e.name for e in gpt} - {e.name for e in matrices} == {e.name for e in gpt if len(e.shape) == 1}
    covered = [e for e in matrices if e.declined is None]
    assert gpt.coverage[:2] == gpt.share()
    assert gpt.coverage.matrix_parameters == len(covered) / len(matrices) < 1
    assert gpt.coverage.matrix_elements == sum(e.elements for e in covered) / sum(e.elements for e in matrices)
    assert gpt.coverage.matrix_parameters > gpt.coverage.parameters


def test_a_row_of_ones_is_no_matrix():
    coverage = mkor_fx.explain(nn.Sequential(nn.Linear(4, 1), nn.PReLU()), torch.randn(3, 4), rule=PUBLISHED)
    assert [e.matrix for e in coverage] == [False, False, False]
    assert coverage.coverage.matrix_parameters == 1.0  # of nothing, nothing is missing
    coverage.assert_full()


def test_entries_know_lines_and_modules(gpt):
    source = Path(zoo.__file__).read_text().splitlines()

    def line(place):
        name, number = place.split(":")
        assert name == "zoo.py"
        return source[int(number) - 1]

    up = gpt["blocks.0.up.weight"]
    assert "self.up(" in line(up.sources[0]) and up.modules == ("blocks.0.up",)
    assert gpt["blocks.0.up.bias"].sources == up.sources
    tied = gpt["token.weight"]
    assert {"self.head(", "self.token("} <= {word for s in tied.sources for word in re.findall(r"self\.\w+\(", line(s))}
    assert set(tied.modules) == {"token", "head"}
    assert gpt["norm.weight"].declined.source in gpt["norm.weight"].sources


def test_assert_full_names_every_gap(gpt):
    with pytest.raises(AssertionError) as failure:
        gpt.assert_full()
    text = str(failure.value)
    gaps = [e for e in gpt.declined if e.matrix]
    assert {e.name for e in gaps} >= {"blocks.0.down.weight"}
    assert f"{len(gaps)} of {sum(e.matrix for e in gpt)} matrix parameters" in text
    assert all(e.name in text and e.declined.reason in text and e.declined.source in text for e in gaps)
    assert "norm" not in text  # vectors are no gaps


def test_assert_full_with_what_is_allowed(gpt):
    names = [e.name for e in gpt.declined if e.matrix]
    gpt.assert_full(allow=names)
    with pytest.raises(AssertionError, match=r"'nothing\.\*' matches no uncovered"):
        gpt.assert_full(allow=[*names, "nothing.*"])
    with pytest.raises(AssertionError, match=r"'token\.weight' matches no uncovered"):
        gpt.assert_full(allow=[*names, "token.weight"])  # it is covered: the exception has become idle


def test_json_holds_what_the_table_shows(gpt):
    data = json.loads(gpt.to_json())
    assert data["coverage"] == gpt.coverage._asdict()
    entries = {e["name"]: e for e in data["parameters"]}
    assert list(entries) == [e.name for e in gpt]
    out = entries["blocks.0.attention.out.weight"]
    assert out["factors"] == {"L": [16, 16], "R": [16, 16]} and out["declined"] is None and out["matrix"]
    assert out["costs"]["rows"] == 40
    assert entries["norm.bias"]["declined"]["reason"] and entries["norm.bias"]["costs"] is None
    assert data["state_bytes"] == sum(e["state_bytes"] for e in entries.values()) > 0


def test_costs_are_those_of_the_two_products():
    costs = mkor_fx.explain(nn.Linear(300, 200, bias=False), torch.randn(50, 300), rule=PUBLISHED).costs("weight")
    products = 2 * 200 * 300 * (200 + 300)
    assert products < costs.precondition_flops < 1.05 * products  # the rest is the rescale
    assert costs.layer_flops == 6 * 50 * 300 * 200
    state = 4 * (200**2 + 300**2)
    assert costs.precondition_bytes == state + 2 * 4 * 200 * 300  # factors and gradient are read, the direction written
    assert costs.refresh_bytes > 2 * state + 4 * 50 * (200 + 300)  # factors read and written, operands read
    assert 4 * (200**2 + 300**2) < costs.refresh_flops < 20 * (200**2 + 300**2)  # quadratic in the sides
    assert costs.cheapest == "operands first"  # 50 rows are fewer than both sides


def test_costs_follow_the_rule():
    model, x = nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    both = mkor_fx.explain(model, x, rule=PUBLISHED).costs("weight")
    one = mkor_fx.explain(model, x, rule=MKOR.published(max_factor=40)).costs("weight")
    half = mkor_fx.explain(model, x, rule=MKOR.published(factor_dtype=torch.bfloat16)).costs("weight")
    assert one.precondition_flops < 0.5 * both.precondition_flops
    assert half.refresh_bytes < both.refresh_bytes
    assert one.cheapest == "L on g"


@pytest.mark.parametrize("rows, cheapest", [(10, "operands first"), (100, "L on g"), (1000, "product first")])
def test_the_cheapest_order_by_hand(rows, cheapest):
    o, i, n = 40, 200, rows
    macs = orders(Shape(o, i), n, True, True)
    assert macs == {
        "product first": n * o * i + o * i * (o + i),
        "operands first": n * (o * o + i * i + o * i),
        "L on g": n * o * i + n * o * o + o * i * i,
        "R on a": n * o * i + n * i * i + o * o * i,
    }
    assert min(macs, key=macs.__getitem__) == cheapest


def test_no_factor_no_order():
    assert orders(Shape(3, 4), 5, False, False) == {}
    assert set(orders(Shape(3, 4), 5, True, False)) == {"product first", "L on g"}


def test_convolutions_count_positions():
    coverage = mkor_fx.explain(nn.Conv2d(2, 3, 3, padding=1), torch.randn(4, 2, 5, 6), rule=PUBLISHED)
    assert coverage.costs("weight").rows == 4 * 5 * 6
    assert coverage.costs("bias") is None


class Experts(nn.Module):
    def __init__(self, members, inputs, outputs):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(members, inputs, outputs))

    def forward(self, x):
        return torch.bmm(x, self.stack)


def test_members_of_a_batched_weight_count_each():
    one = mkor_fx.explain(Experts(1, 6, 5), torch.randn(1, 7, 6), rule=PUBLISHED).costs("stack")
    many = mkor_fx.explain(Experts(4, 6, 5), torch.randn(4, 7, 6), rule=PUBLISHED).costs("stack")
    assert many.rows == one.rows == 7
    for count in ("layer_flops", "refresh_flops", "precondition_flops", "refresh_bytes", "precondition_bytes"):
        assert getattr(many, count) == 4 * getattr(one, count), count
    coverage = mkor_fx.explain(nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 5), rule=PUBLISHED)
    assert coverage.costs("weight").rows == 2 * 3 * 3
    assert coverage.costs("weight").layer_flops == 2 * 6 * 18 * 3 * 18


def test_a_lookup_has_no_order_to_choose():
    costs = mkor_fx.explain(nn.Embedding(50, 4), torch.randint(0, 50, (7,)), rule=PUBLISHED).costs("weight")
    assert costs.rows == 7 and costs.layer_flops == 0 and costs.cheapest == "" and costs.precondition_flops > 0


def test_a_dynamic_batch_leaves_the_row_count_open():
    model = nn.Linear(6, 5)
    compiled = mkor_fx.compile(model, backend="eager", dynamic=True, rule=PUBLISHED)
    compiled(torch.randn(7, 6)).sum().backward()
    costs = compiled.coverage.costs("weight")
    assert costs.rows is None and costs.layer_flops is None and costs.cheapest == "" and costs.precondition_flops > 0
    assert "dynamic" in compiled.coverage.table(costs=True)


def test_the_cost_table_adds_up():
    coverage = mkor_fx.explain(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(7, 6), rule=PUBLISHED)
    text = coverage.table(costs=True)
    total = sum(coverage.costs(f"{i}.weight").precondition_flops for i in (0, 2))
    assert f"preconditioning {short(total)} flops a step" in text
    assert coverage.table() == str(coverage)


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (999, "999"), (1000, "1.00 k"), (99_960, "100 k"), (1_234_567, "1.23 M"), (None, "")]
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_costs_are_counted_once_per_shape():
    coverage = mkor_fx.explain(nn.Sequential(*(nn.Linear(7, 7) for _ in range(3))), torch.randn(4, 7), rule=PUBLISHED)
    counted = count_costs.cache_info().misses
    assert len({id(coverage.costs(f"{i}.weight")) for i in range(3)}) == 1
    assert count_costs.cache_info().misses == counted + 1


def test_graphs_need_no_training(tmp_path):
    model = nn.Linear(6, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    coverage = mkor_fx.explain(model, torch.randn(7, 6), torch.randn(7, 5), loss_fn=F.mse_loss, rule=PUBLISHED)
    assert "mm" in str(coverage.graphs.op_counts("match")) and len(list(coverage.graphs)) == 1
    coverage.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_steps_coverage_has_every_variant():
    model = nn.Linear(6, 5)
    step = mkor_fx.compile_step(
        model, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), backend="eager", refresh_every=2
    , rule=PUBLISHED)
    for _ in range(2):
        step(torch.randn(7, 6), torch.randn(7, 5))
    titles = [graphs.title for graphs in mkor_fx.explain(step).graphs]
    assert titles == ["Linear: refresh step", "Linear: reuse step"]


# ---- who trains what --------------------------------------------------------------------------------------------------

TRAINERS = {
    "AdamW": (torch.optim.AdamW, {}, "MKOR, steps of AdamW's size"),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, "MKOR, steps as long as SGD's"),
    "Lamb": (type("Lamb", (torch.optim.SGD,), {}), {}, "MKOR, Lamb's trust ratio"),
    "Adagrad": (torch.optim.Adagrad, {}, "Adagrad, on MKOR's direction"),
    **{cls.__name__: (cls, {}, f"{cls.__name__}, on MKOR's direction") for cls in (COAP, SMMF, Adalayer, HFac)},
    "LAMB": (LAMB, {"weight_decay": 0.01}, "MKOR, LAMB's trust ratio"),
}


def two_layers():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.mark.parametrize("name", TRAINERS)
def test_the_optimizer_says_who_trains_what(name):
    build, options, expected = TRAINERS[name]
    model, batch = two_layers(), (torch.randn(7, 6), torch.randn(7, 4))
    optimizer = build(model.parameters(), lr=0.01, **options)
    asked = mkor_fx.explain(model, *batch, loss_fn=F.mse_loss, optimizer=optimizer, rule={"0.*": MKOR()})
    assert asked.trainers == {"0.weight": expected, "0.bias": name, "2.weight": name, "2.bias": name}
    step = mkor_fx.compile_step(model, F.mse_loss, optimizer, {"0.*": MKOR()}, backend="eager")
    step(*batch)
    assert mkor_fx.explain(step).trainers == asked.trainers
    compiled = mkor_fx.compile(model, {"0.*": MKOR()}, backend="eager")
    F.mse_loss(compiled(batch[0]), batch[1]).backward()
    assert not compiled.coverage.trainers and "trained by" not in str(compiled.coverage)
    optimizer.step()
    assert compiled.coverage.trainers == asked.trainers and expected in str(compiled.coverage)
    by_name = {entry["name"]: entry["trained_by"] for entry in compiled.coverage.to_dict()["parameters"]}
    assert by_name == asked.trainers


@pytest.mark.parametrize("rule", {type(rule).__name__: rule for rule in (RULES | MORE_RULES).values()}.values(), ids=repr)
def test_behind_every_rule_an_optimizer_of_ours_trains_what_is_left(rule):
    model, batch = two_layers(), (torch.randn(7, 6), torch.randn(7, 4))
    optimizer = COAP(model.parameters(), lr=0.01)
    trainers = mkor_fx.explain(model, *batch, loss_fn=F.mse_loss, optimizer=optimizer, rule={"0.*": rule}).trainers
    kind = type(rule).__name__
    assert trainers["0.weight"].startswith((f"COAP, on {kind}'s direction", kind))
    assert trainers["2.weight"] == trainers["2.bias"] == "COAP"


def test_what_no_optimizer_holds_is_trained_by_nobody():
    model = two_layers()
    optimizers = [torch.optim.Muon([model[0].weight]), torch.optim.SGD([model[2].weight], lr=0.1)]
    step = mkor_fx.compile_step(model, F.mse_loss, optimizers, MKOR.published(), backend="eager")
    step(torch.randn(7, 6), torch.randn(7, 4))
    told = {"0.weight": "Muon, on MKOR's direction", "2.weight": "SGD, on MKOR's direction"}
    assert step.coverage.trainers == told and str(step.coverage).count("nobody: no optimizer holds it") == 2


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="parameters are not this model's"):
        mkor_fx.explain(two_layers(), torch.randn(7, 6), optimizer=torch.optim.SGD(two_layers().parameters()))
