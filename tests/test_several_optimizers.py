"""Several optimizers in one compiled step: each trains its own parameters, as it would alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import MKOR

BATCHES = [(torch.randn(5, 6).double(), torch.randint(0, 4, (5,))) for _ in range(5)]


def network():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def split(model, first=torch.optim.SGD, second=torch.optim.AdamW, lr=0.05, **options):
    """The matrices by the first, the rest by the second, which has two groups."""
    matrices, biases = [[p for p in model.parameters() if p.dim() == dim] for dim in (2, 1)]
    groups = [{"params": biases[:1]}, {"params": biases[1:], "lr": 2e-3}]
    return [first(matrices, lr=lr, **options), second(groups, lr=0.01)]


def train_by_hand(model, optimizers, batches):
    for x, y in batches:
        functional.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def assert_equal(model, twin, optimizers, others):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    for one, other in zip(optimizers, others, strict=True):
        states = one.state_dict()["state"], other.state_dict()["state"]
        assert states[0].keys() == states[1].keys()
        for at, state in states[1].items():
            for key, value in state.items():
                torch.testing.assert_close(states[0][at][key], value, rtol=1e-10, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("order", [1, -1])
def test_each_trains_its_own_as_it_would_alone(order):
    model = network()
    twin = copy.deepcopy(model)
    optimizers, others = (split(m, momentum=0.9, nesterov=True)[::order] for m in (model, twin))
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizers, None, backend="eager")
    assert step.optimizer is optimizers
    for number, batch in enumerate(BATCHES):
        for one in (*optimizers, *others):
            for group in one.param_groups:
                group["lr"] = 0.01 / (1 + number)
        step(*batch)
        train_by_hand(twin, others, [batch])
        assert_equal(model, twin, optimizers, others)
    assert step.compilations == 1


def test_muon_and_adamw():
    """Muon multiplies in bfloat16, alike on both sides."""
    model = network().float()
    twin = copy.deepcopy(model)
    optimizers, others = (split(m, torch.optim.Muon, lr=0.01, adjust_lr_fn="match_rms_adamw") for m in (model, twin))
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizers, None, backend="eager")
    batches = [(x.float(), y) for x, y in BATCHES]
    for batch in batches:
        step(*batch)
    train_by_hand(twin, others, batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


def test_a_rule_takes_over_from_the_optimizer_that_holds_the_weight():
    """The size and the rate of its steps are those of the weight's optimizer; the rest is trained as before."""
    model = network()
    twin = copy.deepcopy(model)
    rule = {"2.*": MKOR()}
    optimizers = split(model, momentum=0.9)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizers, rule, backend="eager")
    sgd, adamw = split(twin, momentum=0.9)
    alike = mkor_fx.compile_step(twin, functional.cross_entropy, torch.optim.SGD([
        {"params": sgd.param_groups[0]["params"], "lr": 0.05, "momentum": 0.9},
        {"params": adamw.param_groups[0]["params"], "lr": 0.0},
        {"params": adamw.param_groups[1]["params"], "lr": 0.0},
    ]), rule, backend="eager")  # fmt: skip
    step(*BATCHES[0])
    alike(*BATCHES[0])
    for at in (0, 2, 4):
        torch.testing.assert_close(model[at].weight, twin[at].weight, rtol=1e-10, atol=1e-12)
        assert not torch.equal(model[at].bias, twin[at].bias)
    assert not optimizers[0].state.get(model[2].weight) and optimizers[0].state[model[0].weight]


def test_a_group_that_is_added_and_a_state_that_is_loaded_act_on_the_next_step():
    model = network()
    twin = copy.deepcopy(model)
    optimizers, others = (
        [torch.optim.SGD(m[0].parameters(), lr=0.1), torch.optim.AdamW(m[2].parameters())] for m in (model, twin)
    )
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizers, None, backend="eager")
    step(*BATCHES[0])
    train_by_hand(twin, others, BATCHES[:1])
    for m, pair in ((model, optimizers), (twin, others)):
        pair[0].add_param_group({"params": [*m[4].parameters()], "momentum": 0.9})
        pair[1].load_state_dict(copy.deepcopy(pair[1].state_dict()))
    for batch in BATCHES[1:]:
        step(*batch)
    for p in twin.parameters():
        p.grad = None
    train_by_hand(twin, others, BATCHES[1:])
    assert_equal(model, twin, optimizers, others)
    assert step.compilations == 2


class Counting(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_the_one_that_cannot_be_compiled_is_named():
    model = network()
    with pytest.raises(ValueError, match=r"Counting\.step\(\) changes self\.calls"):
        mkor_fx.compile_step(model, functional.cross_entropy, split(model, torch.optim.AdamW, Counting), None)


WRONG = {
    "none": (lambda m: [], r"optimizer=\[\]: pass at least one"),
    "no optimizer": (
        lambda m: [torch.optim.SGD(m.parameters()), "AdamW"],
        r"optimizer\[1\]: must be a torch.optim.Optimizer, .*got a str",
    ),
    "held twice": (
        lambda m: [torch.optim.SGD(m[0].parameters()), torch.optim.AdamW(m.parameters())],
        r"0\.weight is held by optimizer\[0\] \(SGD\) and by optimizer\[1\] \(AdamW\): which one trains it\?",
    ),
    "another model's": (
        lambda m: [torch.optim.SGD(m.parameters()), torch.optim.AdamW(network().parameters())],
        r"6 of the optimizer's 12 parameters are not this model's",
    ),
    "not for programs": (
        lambda m: [torch.optim.SGD(m[0].parameters()), torch.optim.LBFGS(m[2].parameters())],
        "LBFGS cannot be compiled into a step",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_compiled(name):
    model = network()
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        mkor_fx.compile_step(model, functional.cross_entropy, make(model), backend="eager")


def test_a_hook_on_any_of_them_is_refused():
    model = network()
    optimizers = split(model)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizers, backend="eager")
    step(*BATCHES[0])
    optimizers[1].register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="step hooks"):
        step(*BATCHES[1])


def test_simulate_takes_several():
    model = network()
    found = mkor_fx.simulate(
        model, *BATCHES[0], loss_fn=functional.cross_entropy, optimizer=split(model), world_size=2
    )
    assert found.total_ms > 0
