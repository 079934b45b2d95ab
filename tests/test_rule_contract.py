"""Every kind of rule does in both doors what the contract says, on every kind of weight, and in every way of training.

Beside ``contract.Contract``, which calls the same rule on rows taken by hooks.
"""

import copy
import dataclasses
from dataclasses import dataclass

import processes
import pytest
import torch
from contract import Contract
from held_rules import HALF, KINDS, MORE_RULES, REFUSED, RULES
from rows import Experts
from stepping import stepper
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, MKOR, Communication, Rule
from mkor_fx.kinds import Kind
from mkor_fx.rules import Gradient


class Table(nn.Module):
    """A table that is also the output layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def build(kind):
    """``(model, batches)`` in float64, a batch ``(input, target)``."""
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    if kind == "tied":
        model, batches = Table(), [(torch.randint(0, 9, (5, 4)), torch.randint(0, 9, (5, 4))) for _ in range(5)]
    elif kind == "batched":
        model, batches = Experts(3, 5, 4), [(randn(3, 7, 5), randn(3, 7, 4)) for _ in range(5)]
    elif kind == "convolution":
        convolution, head = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Linear(64, 5, bias=False)
        model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), head)
        batches = [(randn(6, 2, 4, 4), randn(6, 5)) for _ in range(5)]
    else:
        bias = kind == "bias"
        model = nn.Sequential(nn.Linear(6, 7, bias=bias), nn.Tanh(), nn.Linear(7, 4, bias=bias))
        batches = [(randn(8, 6), randn(8, 4)) for _ in range(5)]
    return model.double(), batches


def loss_fn(outputs, target):
    if target.is_floating_point():
        return functional.mse_loss(outputs, target)
    return functional.cross_entropy(outputs.flatten(0, 1), target.flatten())


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(door, model, batches, rule, optimizer=None, scaler=None, **options):
    """Factor state by key, behind steps over ``batches``."""
    optimizer = optimizer or sgd(model)
    if door == "compile_step":
        step = mkor_fx.compile_step(model, loss_fn, optimizer, rule, backend="eager", **options)
        for x, y in batches:
            step(x, y)
        return step.mkor
    handle = mkor_fx.compile(model, rule, backend="eager", **options)
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(handle(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return handle.mkor


def close(one, other, tolerance=1e-4):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        apart = (one[key].double() - other[key].double()).norm()
        assert apart <= tolerance * other[key].double().norm().clamp_min(1e-6), key


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


ALL_RULES = {**RULES, **MORE_RULES}
SELDOM = [pytest.param(name, marks=pytest.mark.nightly) for name in MORE_RULES]
EACH_RULE = pytest.mark.parametrize("name", [*RULES, *SELDOM])
EACH_KIND = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.nightly) for name in ALL_RULES])  # fmt: skip
EACH_DOOR = pytest.mark.parametrize("door", ["compile_step", "compile"])


@EACH_DOOR
@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind, marks=[] if kind == "bias" or name in KINDS else pytest.mark.nightly)
    for name in ALL_RULES for kind in ("plain", "bias", "batched", "tied", "convolution")
])  # fmt: skip
def test_both_doors_do_what_the_contract_says(name, kind, door):
    rule = ALL_RULES[name]
    model, batches = build(kind)
    twin, start = copy.deepcopy(model), weights(model)
    mkor = train(door, model, batches, rule, refresh_every=2)
    reference = Contract(twin, sgd(twin), rule, refresh_every=2)
    for x, y in batches:
        loss_fn(twin(x), y).backward()
        reference.step()
    close(weights(model), weights(twin))
    state, members = mkor.state_dict(), 3 if kind == "batched" else 1
    assert int(state.pop("step")) == len(batches)
    for key, tensor in state.items():
        weight, _, entry = key.rpartition(".")
        expected = [reference.state[f"{weight}:{i}"][entry] for i in range(members)]
        close({key: tensor}, {key: torch.stack(expected) if members > 1 else expected[0]})
    assert all(not torch.equal(start[key], value) for key, value in weights(model).items())


@EACH_RULE
def test_backward_mode_or_its_refusal(name):
    rule = ALL_RULES[name]
    model, batches = build("bias")
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{type(rule).__name__} {REFUSED[name]}.*precondition='step'"):
            mkor_fx.compile(model, rule, precondition="backward", backend="eager")
        return
    handle, found = mkor_fx.compile(model, rule, precondition="backward", backend="eager"), []
    for x, y in batches:
        raw = dict(zip(weights(model), torch.autograd.grad(loss_fn(model(x), y), list(model.parameters())), strict=True))
        before = handle.mkor.state_dict()
        handle.zero_grad()
        loss_fn(handle(x), y).backward()
        found.append((before, raw, {key: p.grad.clone() for key, p in model.named_parameters()}))
    for before, raw, made in found[1:]:
        for layer in ("0", "2"):
            state = {key.rpartition(".")[2]: t for key, t in before.items() if key.startswith(f"{layer}.weight.")}
            scale = state.pop("scale") if rule.graft is not None else torch.ones(2)
            pair = Gradient(raw[f"{layer}.weight"], raw[f"{layer}.bias"])
            direction = dataclasses.replace(rule, **ungrafted(rule)).precondition(state, pair)
            for i, (part, key) in enumerate(zip(direction, (f"{layer}.weight", f"{layer}.bias"), strict=True)):
                torch.testing.assert_close(made[key], part * scale[i], rtol=1e-5, atol=1e-9)
    assert handle.mkor.step == len(batches)


def ungrafted(rule):
    return {"rescale": False} if isinstance(rule, MKOR) else {"graft": None}


class LateContract(Contract):
    """Refreshes from the rows of the step before."""

    late = 1

    def step(self):
        now = {name: layer.uses for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.uses = vars(self).get("before", {}).get(name, {})
        self.before = now
        super().step()

    def member(self, key, layer, member, grad):
        if not layer.uses:
            shape = self.shape(layer, grad.bias is not None)
            state = self.rule.init(shape, torch.device("cpu"))
            made, self.state[key] = self.direction(self.rule.advance(state, grad, torch.tensor(self.count)), grad)
            return made
        return super().member(key, layer, member, grad)


@EACH_KIND
def test_statistics_one_step_late(name):
    rule = ALL_RULES[name]
    model, batches = build("bias")
    if rule.reads_gradient:
        with pytest.raises(ValueError, match="stale=1 delays"):
            train("compile_step", model, batches, rule, stale=1)
        return
    if rule.reads_state:
        batches = batches[:2]  # from the third step on its statistics are of a state that the reference does not keep
    twin = copy.deepcopy(model)
    train("compile_step", model, batches, rule, stale=1)
    reference = LateContract(twin, sgd(twin), rule)
    for x, y in batches:
        loss_fn(twin(x), y).backward()
        reference.step()
    close(weights(model), weights(twin))


def on_a_rank(rank, size, name, placement="owner"):
    model, batches = build("bias")
    options = {"placement": placement, "communication": Communication(padding=9.0)} if placement == "owner" else {}
    mine = [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in batches]
    mkor = train("compile_step", model, mine, ALL_RULES[name], **options)
    return weights(model), mkor.state_dict(full=True), mkor.owners


@EACH_KIND
def test_owners_on_two_ranks(name):
    model, batches = build("bias")
    if ALL_RULES[name].reads_state:
        with pytest.raises(ValueError, match=r"reads_state.*placement='replicated'"):
            train("compile_step", model, batches, ALL_RULES[name], placement="owner")
        return
    if ALL_RULES[name].draws:  # each rank draws its own signs, so that one process goes another way
        expected, kept, _ = processes.values(on_a_rank, 2, name, "replicated")[0]
    else:
        kept = train("compile_step", model, batches, ALL_RULES[name]).state_dict()
        expected = weights(model)
    ranks = processes.values(on_a_rank, 2, name)
    for found, state, owners in ranks:
        close(found, expected)
        close(state, kept)
        assert set(owners.values()) == {0, 1}
    assert all(torch.equal(ranks[0][0][key], ranks[1][0][key]) for key in ranks[0][0])


@pytest.mark.parametrize(("name", "door"), [
    pytest.param(name, door, marks=[] if name in KINDS or door == "compile_step" else pytest.mark.nightly)
    for name in ALL_RULES for door in ("compile_step", "compile")
])  # fmt: skip
def test_resume_is_exact(name, door):
    rule = ALL_RULES[name]
    model, batches = build("bias")
    optimizer = sgd(model)
    whole, step = stepper(door, model, loss_fn, optimizer, rule, refresh_every=2)
    for x, y in batches[:3]:
        step(x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), whole.mkor.state_dict()))
    assert all(type(entry) is torch.Tensor for entry in saved[2].values())
    twin, _ = build("bias")
    other = sgd(twin)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed, another = stepper(door, twin, loss_fn, other, rule, refresh_every=2)
    resumed.mkor.load_state_dict(saved[2])
    for x, y in batches[3:]:
        step(x, y)
        another(x, y)
    for found, expected in ((weights(twin), weights(model)), (resumed.mkor.state_dict(), whole.mkor.state_dict())):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.nightly), True])
@EACH_KIND
def test_a_loss_scaler_changes_nothing(name, fused):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, batches = build("bias")
        model, batches = model.float(), [(x.float(), y.float()) for x, y in batches]
        rule = ALL_RULES[name]
        rule = dataclasses.replace(rule, factor_dtype=torch.float32) if isinstance(rule, MKOR) else rule
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        mkor = train("compile", model, batches, rule, optimizer, scaler)
        results.append((weights(model), mkor.state_dict()))
    close(results[1][0], results[0][0], 1e-3)
    close(results[1][1], results[0][1], 1e-3)


@EACH_KIND
def test_a_scaler_that_finds_an_inf_touches_nothing(name):
    model, batches = build("bias")
    model, rule = model.float(), ALL_RULES[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler, handle = torch.amp.GradScaler("cpu", init_scale=2.0), mkor_fx.compile(model, rule, backend="eager")
    for number, (x, y) in enumerate(batches):
        before = weights(model), handle.mkor.state_dict()
        optimizer.zero_grad()
        x = x.float() * (float("inf") if number == 2 else 1.0)
        scaler.scale(loss_fn(handle(x), y.float())).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(before[0][key], value) for key, value in weights(model).items()]
        assert all(moved) == any(moved) == (number != 2)
        if number == 2:
            after = handle.mkor.state_dict()
            assert all(torch.equal(value, after[key]) for key, value in before[1].items() if key != "step")


@EACH_RULE
def test_metrics_say_of_a_tensor_what_its_rule_says(name):
    rule = ALL_RULES[name]
    model, batches = build("bias")
    mkor = train("compile_step", model, batches, rule)
    metrics, state = mkor.metrics(per_factor=True), mkor.state_dict()
    expected = {"steps", "refreshes"}
    for key, tensor in state.items():
        kind = rule.kinds.get(key.rpartition(".")[2])
        if kind is Kind.POSITIVE:
            expected |= {"factor_min", "factor_max", f"{key}.min", f"{key}.max"}
            assert metrics[f"{key}.max"] == pytest.approx(float(tensor.diagonal().max()))
        elif kind is Kind.ORTHOGONAL:
            expected |= {"orthogonality", f"{key}.deviation"}
            assert metrics[f"{key}.deviation"] < 1e-4
        elif kind is Kind.MOMENT:
            expected |= {"moment", f"{key}.rms"}
            assert metrics[f"{key}.rms"] == pytest.approx(float(tensor.double().square().mean().sqrt()))
    assert set(metrics) == expected


@EACH_KIND
def test_state_follows_its_weight_and_keeps_its_dtypes(name):
    model, batches = build("bias")
    step = mkor_fx.compile_step(model, loss_fn, sgd(model), ALL_RULES[name], backend="eager")
    step(*batches[0])
    before = {key: (t.shape, t.dtype) for key, t in step.mkor.state_dict().items()}
    model.to(torch.bfloat16)
    assert {key: (t.shape, t.dtype) for key, t in step.mkor.state_dict().items()} == before
    model.to("meta")
    assert {t.device.type for t in step.mkor.of(model[0].weight).values()} == {"meta"}


@pytest.mark.nightly
@pytest.mark.parametrize("name", HALF)
def test_a_thousand_steps_in_bfloat16(name):
    """Of model, gradients and, where a rule has them, factors."""
    model, batches = build("bias")
    model.to(torch.bfloat16)
    other = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).to(torch.bfloat16)
    batches = [(x.bfloat16(), other(x.bfloat16()).detach()) for x, _ in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step = mkor_fx.compile_step(model, loss_fn, optimizer, HALF[name], backend="eager")
    losses = [float(step(*batches[number % len(batches)])) for number in range(1000)]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    state = step.mkor.state_dict()
    assert all(torch.isfinite(t).all() for t in [*state.values(), *model.parameters()])
    assert step.metrics()["skipped"] == 0 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for key, tensor in state.items():
        if HALF[name].kinds.get(key.rpartition(".")[2]) is Kind.POSITIVE:
            assert torch.linalg.eigvalsh(tensor.double()).min() > 0


class Alternating(nn.Module):
    """Heads that take turns, as of several tasks."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 7), nn.ModuleList(nn.Linear(7, 4) for _ in range(2))

    def forward(self, x, task):
        return self.heads[task](torch.tanh(self.body(x)))


@dataclass(frozen=True)
class Counting(Rule):
    """Counts what is done to it."""

    derive_every: int = 5

    def init(self, shape, device):
        return {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("updated", "advanced", "derived")}

    def summarize(self, shape, a_NI, g_NO):
        return (g_NO.sum(0),)

    def update(self, state, uses, grad, step):
        return {**state, "updated": state["updated"] + 1}

    def advance(self, state, grad, step):
        return {**state, "advanced": state["advanced"] + 1}

    def derive(self, state):
        return {**state, "derived": state["derived"] + 1}

    def precondition(self, state, grad):
        return grad


@pytest.mark.parametrize("door", ["compile", "compile_step"])
@pytest.mark.parametrize("refresh_every", [1, 2, 3])
def test_a_weight_is_refreshed_and_derived_of_once_a_window_whichever_steps_it_takes_part_in(refresh_every, door):
    model = Alternating()
    optimizer, steps = sgd(model), 12
    if door == "compile_step":
        done = mkor_fx.compile_step(model, loss_fn, optimizer, Counting(), refresh_every=refresh_every, backend="eager")
    else:
        done = mkor_fx.compile(model, Counting(), refresh_every=refresh_every, backend="eager")
    for number in range(steps):
        task, x, y = number // 2 % 2, torch.randn(8, 6), torch.randn(8, 4)  # two steps each
        if door == "compile_step":
            done(x, task, y)
        else:
            optimizer.zero_grad()
            loss_fn(done(x, task), y).backward()
            optimizer.step()
    used = {"body": range(steps), **{f"heads.{task}": [n for n in range(steps) if n // 2 % 2 == task] for task in (0, 1)}}
    state = done.mkor.state_dict()
    for name, taken in used.items():
        assert int(state[f"{name}.weight.updated"]) == len({n // refresh_every for n in taken}), name
        assert int(state[f"{name}.weight.derived"]) == len({n // 5 for n in taken}), name
        assert int(state[f"{name}.weight.advanced"]) == len(taken), name
    if door == "compile_step":
        assert done.compilations <= 8


@pytest.mark.parametrize("rule", [MKOR.published(), KFAC(derive_every=2)], ids=["mkor", "kfac"])
def test_so_it_is_in_the_backward_mode(rule):
    model, every = Alternating(), 2
    handle = mkor_fx.compile(model, rule, refresh_every=every, precondition="backward", backend="eager")
    optimizer = sgd(model)
    for number in range(8):
        optimizer.zero_grad()
        loss_fn(handle(torch.randn(8, 6), number % 2), torch.randn(8, 4)).backward()
        optimizer.step()
    state = handle.mkor.state_dict()
    for name in ("body", "heads.0", "heads.1"):
        for key in ("L", "R") if isinstance(rule, MKOR) else ("L_inverse", "R_inverse"):
            assert not torch.equal(state[f"{name}.weight.{key}"], torch.eye(len(state[f"{name}.weight.{key}"]))), (name, key)
