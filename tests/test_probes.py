"""Where compiled training tends to break: eight probes, each under every rule in both doors.

Exact resume and tied weights with both uses are in test_rule_contract.py (``test_resume_is_exact``,
``test_both_doors_do_what_the_contract_says[tied]``); the six others here.
"""

import contextlib
import copy
import dataclasses

import pytest
import torch
from contract import Contract
from stepping import stepper
from test_rule_contract import ALL_RULES, EACH_DOOR, build, close, loss_fn, sgd, weights
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

#: in every run: momentum, sides and signs; inverses of statistics; moments in a basis that products derive, and own steps
OFTEN = ("mkor", "kfac", "soap")
EACH_RULE = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.nightly) for name in ALL_RULES]
)


def train(door, model, batches, rule, **options):
    """State of the rule behind steps over ``batches``."""
    done, step = stepper(door, model, loss_fn, sgd(model), rule, **options)
    for x, y in batches:
        step(x, y)
    return done.mkor.state_dict()


def train_by_contract(model, batches, rule, kind=Contract, parts=1, around=contextlib.nullcontext):
    reference = kind(model, sgd(model), rule)
    for x, y in batches:
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with around():
                loss = loss_fn(model(part[0]), part[1]) / parts
            loss.backward()
        reference.step()
    return reference


def equal(one, other, but=()):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one if key not in but)


@EACH_DOOR
@EACH_RULE
def test_fullgraph(name, door):
    model, batches = build("bias")
    start = weights(model)
    counters.clear()
    train(door, model, batches, ALL_RULES[name], fullgraph=True)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert all(value.isfinite().all() and not torch.equal(value, start[key]) for key, value in weights(model).items())


def half():
    return torch.autocast("cpu", torch.bfloat16)


@EACH_DOOR
@EACH_RULE
def test_autocast(name, door):
    """Layers multiply in bfloat16, and rules as they would without: in the contract they are outside of ``autocast``."""
    rule, (model, batches) = ALL_RULES[name], build("bias")
    model, batches = model.float(), [(x.float(), y.float()) for x, y in batches]
    twin, start, tolerance = copy.deepcopy(model), weights(model), 1e-2 if rule.product_dtype == "fast" else 1e-4
    with half():
        state = train(door, model, batches, rule)
        assert model(batches[0][0]).dtype == torch.bfloat16
    reference = train_by_contract(twin, batches, rule, around=half)
    for key, value in weights(model).items():
        expected = weights(twin)[key]
        assert (value - expected).norm() < tolerance * (expected - start[key]).norm() and value.dtype == torch.float32, key
    for weight, _, entry in (key.rpartition(".") for key in state if key != "step"):
        assert state[f"{weight}.{entry}"].dtype == reference.state[f"{weight}:0"][entry].dtype


class Checkpointed(nn.Module):
    """Its middle is run again in the backward, or not."""

    def __init__(self, again):
        super().__init__()
        self.again, self.enter, self.leave = again, nn.Linear(6, 7), nn.Linear(7, 4)
        self.middle = nn.Sequential(nn.Linear(7, 7), nn.Tanh())

    def forward(self, x):
        x = torch.tanh(self.enter(x))
        return self.leave(checkpoint(self.middle, x, use_reentrant=False) if self.again else self.middle(x))


@EACH_DOOR
@EACH_RULE
def test_checkpointing_keeps_the_trajectory(name, door):
    _, batches = build("bias")
    model, plain = Checkpointed(True).double(), Checkpointed(False).double()
    plain.load_state_dict(model.state_dict())
    close(train(door, model, batches, ALL_RULES[name]), train(door, plain, batches, ALL_RULES[name]))
    close(weights(model), weights(plain), 1e-6)


class InParts(Contract):
    """Each micro-batch draws its own signs."""

    def summarize(self, shape, rows, read):
        once = super().summarize
        numbered = lambda part: {**read, "key": read["key"] + (part << 16)} if "key" in read else read
        return tuple(map(sum, zip(*(once(shape, [own], numbered(part)) for part, own in enumerate(rows)), strict=True)))


@EACH_DOOR
@EACH_RULE
def test_two_micro_batches_are_one_batch(name, door):
    """Under a rule that draws signs, each micro-batch has its own: the step is that of the sum of their statistics."""
    rule, (model, batches) = ALL_RULES[name], build("bias")
    if name.startswith("hylo"):  # it keeps rows of each
        rule = dataclasses.replace(rule, micro_batches=2)
    whole, summed = copy.deepcopy(model), copy.deepcopy(model)
    train(door, model, batches, rule, parts=2)
    train(door, whole, batches, rule)
    if rule.draws:
        train_by_contract(summed, batches, rule, InParts, parts=2)
        assert all((value - weights(whole)[key]).norm() > 1e-3 * value.norm() for key, value in weights(model).items())
    close(weights(model), weights(summed if rule.draws else whole), 1e-6)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Layers(nn.Module):
    """The same, parameters and rows in the same order."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 3)).permute(1, 2, 0, 3) for t in self.qkv(x.transpose(0, 1)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
        return self.head(x + self.out(attended).transpose(0, 1))


@EACH_DOOR
@EACH_RULE
def test_multihead_attention_is_its_layers(name, door):
    model, twin = Attending().double(), Layers().double()
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.copy_(p)
    start, batches = weights(twin), [(torch.randn(4, 5, 6).double(), torch.randn(4, 5, 4).double()) for _ in range(4)]
    train(door, model, batches, ALL_RULES[name])
    train_by_contract(twin, batches, ALL_RULES[name])
    found = weights(twin)
    close(dict(zip(found, weights(model).values(), strict=True)), found)
    assert not any(torch.equal(start[key], value) for key, value in found.items())


def with_root(outputs, target):
    """Where targets are zero the loss is finite, and its gradient NaN."""
    return loss_fn(outputs, target) + 0.1 * (outputs.square().sum() * target.square().sum()).sqrt()


@EACH_DOOR
@EACH_RULE
def test_a_gradient_that_is_not_finite_leaves_state_clean(name, door):
    """As it was, and what follows is what follows a resumption. ``compile_step`` takes no such step at all, whatever is due
    behind it; with ``compile`` the weights are the optimizer's, and what is derived then is of the state as it was."""
    rule, at = ALL_RULES[name], 2
    if door == "compile" and rule.overrides("derive"):
        rule, at = dataclasses.replace(rule, derive_every=3), 1
    model, batches = build("bias")
    optimizer = sgd(model)
    done, step = stepper(door, model, with_root, optimizer, rule)
    for x, y in batches[:at]:
        step(x, y)
    kept, before = copy.deepcopy((model.state_dict(), optimizer.state_dict())), done.mkor.state_dict()
    x, y = batches[at]
    step(x, torch.zeros_like(y))
    step(x * float("nan"), y)
    after = done.mkor.state_dict()
    assert equal(after, before, but="step")
    twin, _ = build("bias")
    other = sgd(twin)
    if door == "compile_step":
        assert equal(model.state_dict(), kept[0])
    else:
        model.load_state_dict(kept[0]), optimizer.load_state_dict(copy.deepcopy(kept[1]))
    twin.load_state_dict(kept[0]), other.load_state_dict(kept[1])
    again, another = stepper(door, twin, with_root, other, rule)
    again.mkor.load_state_dict(after)
    for x, y in batches[at + 1 :]:
        step(x, y), another(x, y)
    assert equal(weights(model), weights(twin)) and equal(done.mkor.state_dict(), again.mkor.state_dict())
    assert not equal(done.mkor.state_dict(), after, but="step")
