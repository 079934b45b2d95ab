"""What becomes of each trainable parameter: roles equal hand-made labels, and every decline says why and where."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
import zoo
from joint import capture, rows
from torch import nn

from mkor_fx import MKOR, explain


def role(entry):
    return "declined" if entry.declined else f"bias of {entry.bias_of}" if entry.bias_of else "site"


def roles(coverage):
    return {entry.name: role(entry) for entry in coverage}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_roles_are_the_hand_made_labels(name):
    model, _, batches = zoo.build(name, steps=1)
    coverage = explain(model, batches[0][0], rule=MKOR.published())
    assert roles(coverage) == zoo.EXPECTED[name]
    assert all(entry.declined is None or entry.declined.reason for entry in coverage)


class Calls(nn.Module):
    """``function(self, x)`` over the given modules and parameters."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def weight(*shape):
    return nn.Parameter(torch.randn(shape))


def two_matrices(m, x):
    return F.linear(x[:, :4], m.w.view(6, 4)).sum(1) + F.linear(x, m.w.view(2, 12)).sum(1)


CONVOLUTION, LOOKUP = "aten.convolution_backward.default", "aten.embedding_dense_backward.default"
DECLINED = {
    # name: (function, parts, shape of the input, parameter, words of the reason, words of the op)
    "bias of a transposed convolution": (lambda m, x: m.conv(x), {"conv": lambda: nn.ConvTranspose2d(4, 6, 3)},
                                         (2, 4, 5, 5), "conv.bias", "vector", CONVOLUTION),
    "norm scale": (lambda m, x: m.norm(x), {"norm": lambda: nn.LayerNorm(5)}, (3, 5), "norm.weight", "vector", "aten."),
    "elementwise": (lambda m, x: x * m.p, {"p": lambda: weight(3, 5)}, (3, 5), "p", "no row", "aten.mul"),
    "by frequency": (lambda m, x: m.table(x.long().abs()), {"table": lambda: nn.Embedding(9, 5, scale_grad_by_freq=True)},
                     (3, 5), "table.weight", "scale_grad_by_freq", LOOKUP),
    "position": (lambda m, x: x + m.p, {"p": lambda: weight(1, 3, 5)}, (2, 3, 5), "p", "no row", "aten.sum"),
    "one of two": (lambda m, x: F.linear(x, m.w) + (m.w * m.w).sum(), {"w": lambda: weight(6, 5)}, (3, 5),
                   "w", "no row", "aten.mul"),
    "two matrices": (two_matrices, {"w": lambda: weight(2, 3, 4)}, (3, 12), "w", "different matrices", "aten.mm"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED)
def test_decline_carries_reason_op_and_source_line(case):
    torch.manual_seed(0)
    function, parts, shape, name, reason, op = DECLINED[case]
    model = Calls(function, **{part: make() for part, make in parts.items()})
    decline = explain(model, 3 * torch.randn(shape), rule=MKOR.published())[name].declined
    assert decline is not None
    assert decline.reason and reason in decline.reason
    assert op in decline.op and "built-in" not in decline.op
    assert re.fullmatch(r"test_match\.py:\d+", decline.source), decline
    lines, first = inspect.getsourcelines(model.function)
    line = int(decline.source.split(":")[1])
    assert first <= line < first + len(lines), "not the line of the model that uses the parameter"
    assert str(decline) == f"{decline.reason} [{decline.op}] at {decline.source}"


def test_source_line_is_never_the_library_s_own():
    """In a model made of torch's modules alone no line of the user's code makes the node."""
    decline = explain(nn.Sequential(nn.LayerNorm(5)), torch.randn(2, 4, 5), rule=MKOR.published())["0.weight"].declined
    assert not decline.source.startswith(("explain.py", "drop_in.py", "whole_step.py"))


def test_excluded_frozen_and_unused_parameters_are_told_apart():
    model = Calls(lambda m, x: m.taken(m.left(m.frozen(x))), frozen=nn.Linear(4, 4), left=nn.Linear(4, 4),
                  taken=nn.Linear(4, 4), unused=nn.Linear(4, 4))
    model.frozen.requires_grad_(False)
    coverage = explain(model, torch.randn(3, 4), skip=["left.*"], rule=MKOR.published())
    assert roles(coverage) == {
        "left.weight": "declined", "left.bias": "declined",
        "taken.weight": "site", "taken.bias": "bias of taken.weight",
        "unused.weight": "declined", "unused.bias": "declined",
    }  # fmt: skip
    assert all("left.*" in coverage[name].declined.reason for name in ("left.weight", "left.bias"))
    assert "graph" in coverage["unused.weight"].declined.reason
    text = str(coverage)
    assert "frozen" not in text and all(name in text for name in roles(coverage))
    assert coverage.share() == (2 / 6, 20 / 60)
    with pytest.raises(ValueError, match=r"right\.\*.*left\.weight"):
        explain(model, torch.randn(3, 4), skip=["right.*"], rule=MKOR.published())


def test_max_factor_is_the_reason_where_it_leaves_nothing():
    coverage = explain(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(3, 4), rule=MKOR.published(max_factor=3))
    assert "max_factor" in coverage["0.weight"].declined.reason
    assert "0.weight" in coverage["0.bias"].declined.reason
    assert coverage["1.weight"].factors == {"L": (2, 2)}


def test_tied_weight_is_one_site_of_two_opposite_uses():
    model, _, batches = zoo.build("gpt", steps=1)
    (joint,) = capture(model, batches[0][0])
    site = joint.site("token.weight")
    assert sorted((tap.op, tap.inputs) for tap in site.taps) == [("embedding", 1), ("linear", 0)]
    assert explain(model, batches[0][0], rule=MKOR.published())["token.weight"].uses == 2


def test_reused_layer_is_one_site_with_a_bias():
    model, _, batches = zoo.build("in_out", steps=1)
    (joint,) = capture(model, batches[0][0])
    site = joint.site("twice.weight")
    assert len(site.taps) == 2 and len(site.kinds) == 1
    assert site.bias.name == "twice.bias"


SHARED_BIAS = {
    "two weights": lambda m, x: F.linear(F.linear(x, m.v, m.b), m.w, m.b),
    "one of two uses": lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w),
    "and elementwise": lambda m, x: F.linear(F.linear(x, m.v), m.w, m.b) + m.b.pow(2).sum(),
}


@pytest.mark.parametrize("case", SHARED_BIAS)
def test_shared_bias_is_not_claimed_by_one_weight(case):
    model = Calls(SHARED_BIAS[case], v=weight(4, 4), w=weight(4, 4), b=weight(4))
    coverage = explain(model, torch.randn(4, 4), rule=MKOR.published())
    expected = {"two weights": "declined", "one of two uses": "bias of w", "and elementwise": "declined"}[case]
    assert role(coverage["b"]) == expected
    assert role(coverage["w"]) == "site"


@pytest.mark.parametrize("bias_first", [False, True])
def test_square_layers_do_not_confuse_roles_or_biases(bias_first):
    """O == I == N everywhere, stored both ways, and two vectors of the right size that are no bias at all."""

    def forward(m, x):
        x = torch.tanh(x @ m.in_out)
        x = torch.tanh(F.linear(x * m.scale, m.out_in, m.bias) + x.sum() * m.shift)
        return x @ m.last

    parts = {"in_out": weight(4, 4), "out_in": weight(4, 4), "last": weight(4, 4)}
    vectors = {"scale": weight(4), "bias": weight(4), "shift": weight(4)}
    torch.manual_seed(0)
    model = Calls(forward, **(vectors | parts if bias_first else parts | vectors)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    (joint,) = capture(model, x)
    env = joint.run()
    found = {p.name: joint.step.role(p.index).value for p in joint.step.parameters.values()}
    assert found == {**dict.fromkeys(parts, "site"), "scale": "declined", "bias": "bias", "shift": "declined"}
    assert joint.site("out_in").bias.name == "bias"
    hidden = torch.tanh(x @ model.in_out)
    for name, a_NI in (("in_out", x), ("out_in", hidden * model.scale)):
        (tap,) = joint.site(name).taps
        torch.testing.assert_close(rows(env, tap.a), a_NI.detach(), rtol=1e-12, atol=1e-12)
    assert [joint.site(name).kinds for name in parts] == [(1,), (0,), (1,)]


def test_explain_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 2))
    x, target = torch.randn(2, 3, 5, 5), torch.randint(0, 2, (2,))
    random = torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name: list(vars(module)) for name, module in model.named_modules()}
    for training in (True, False):
        model.train(training)
        explain(model, x, rule=MKOR.published())
        explain(model, x, target, loss_fn=F.cross_entropy, rule=MKOR.published())
        assert model.training is training
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert {name: list(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), random), "random numbers were drawn"


@pytest.mark.parametrize("options", [{"bias": "off"}, {"max_factor": 4}], ids=["bias off", "left side too large"])
def test_a_bias_that_the_rule_leaves_alone_is_declined(options):
    coverage = explain(nn.Linear(3, 5), torch.randn(2, 3), rule=MKOR.published(**options))
    assert coverage["weight"].declined is None
    assert "leaves the bias of weight alone" in coverage["bias"].declined.reason


def test_a_recurrence_of_many_steps_is_one_site():
    """Its gradient is a sum of as many terms, one inside the other."""

    def unrolled(m, x):
        h = x
        for _ in range(400):
            h = torch.tanh(F.linear(h, m.w))
        return h

    model = Calls(unrolled, w=weight(3, 3))
    assert explain(model, torch.randn(2, 3), rule=MKOR.published())["w"].uses == 400
