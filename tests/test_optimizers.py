"""The compiled step's optimizer update is torch's own, for every optimizer that can be traced."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx.runtime.optimizer_state import initialise_state, tensor_state

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD, everything": (
        torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "SGD, dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW, tensor rate": (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.01}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
}


def network():
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)).double()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_eager_and_its_state_stays_the_optimizers(name):
    build, options = OPTIMIZERS[name]
    model = network()
    twin = copy.deepcopy(model)
    groups = [
        [{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": copy.copy(options["lr"]) / 2}]
        for m in (model, twin)
    ]
    own, other = (build(g, **options) for g in groups)
    step = mkor_fx.compile_step(model, functional.cross_entropy, own, None, backend="eager")
    for number in range(6):
        x, y = torch.randn(5, 6).double(), torch.randint(0, 4, (5,))
        for optimizer in (own, other):
            optimizer.param_groups[1]["lr"] = copy.copy(options["lr"]) / (2 + number)
        step(x, y)
        other.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert step.compilations == 1
    one, two = own.state_dict()["state"], other.state_dict()["state"]
    for index, state in two.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(one[index][key], value, rtol=1e-5, atol=1e-8)
    own.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    own.step()


def test_muon_over_its_matrices():
    model = torch.nn.Sequential(torch.nn.Linear(6, 9, bias=False), torch.nn.Tanh(), torch.nn.Linear(9, 4, bias=False))
    twin = copy.deepcopy(model)
    own, other = (torch.optim.Muon(m.parameters(), lr=0.01) for m in (model, twin))
    step = mkor_fx.compile_step(model, functional.cross_entropy, own, None, backend="eager")
    for _ in range(3):
        x, y = torch.randn(5, 6), torch.randint(0, 4, (5,))
        step(x, y)
        other.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # it multiplies in bfloat16


def test_one_that_cannot_be_traced_says_so_and_changes_nothing():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adafactor(model.parameters())
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    with pytest.raises(ValueError, match=r"Adafactor.step\(\) cannot be traced.*\n.*mkor_fx.compile"):
        step(torch.randn(5, 6).double(), torch.randint(0, 4, (5,)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_loading_an_optimizer_state_acts_on_the_next_step():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    weights, empty = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    batch = torch.randn(5, 6).double(), torch.randint(0, 4, (5,))
    trajectories = []
    for _ in range(2):
        model.load_state_dict(weights)
        optimizer.load_state_dict(empty)
        trajectories.append([step(*batch) for _ in range(4)])
    assert trajectories[0] == trajectories[1]
    assert step.compilations == 1


def test_a_learning_rate_scheduler_sees_that_the_optimizer_has_stepped(recwarn):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    step(torch.randn(5, 6).double(), torch.randint(0, 4, (5,)))
    schedule.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_step_counts_live_where_the_parameters_are():
    """AdamW keeps them on the host; a step that skips what is not finite would then write to the host, and wait."""
    model = nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    initialise_state(optimizer, list(model.parameters()))
    for p in model.parameters():
        assert {key: t.device.type for key, t in tensor_state(optimizer, p).items()} == {
            "exp_avg": "meta", "exp_avg_sq": "meta", "step": "meta"}  # fmt: skip
