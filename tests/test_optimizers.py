"""The compiled step's optimizer update is torch's own, for every optimizer that can be traced."""

import copy

import pytest
import torch
from stepping import stepper
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx.runtime.optimizer_state import initialise_state, tensor_state
from mkor_fx.runtime.optimizers import Optimizers

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
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01, "weight_decay": 0.1}),
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
    plain = stepper("eager", twin, functional.cross_entropy, other)[1]
    for number in range(6):
        x, y = torch.randn(5, 6).double(), torch.randint(0, 4, (5,))
        for optimizer in (own, other):
            optimizer.param_groups[1]["lr"] = copy.copy(options["lr"]) / (2 + number)
        step(x, y)
        plain(x, y)
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
    plain = stepper("eager", twin, functional.cross_entropy, other)[1]
    for _ in range(3):
        x, y = torch.randn(5, 6), torch.randint(0, 4, (5,))
        step(x, y)
        plain(x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # it multiplies in bfloat16


class Shuffled(torch.optim.Optimizer):
    """Whose new state is a view of its old one; ``order`` is that of its state."""

    def __init__(self, params, lr, order):
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {key: torch.zeros_like(p if key == "last" else p.T) for key in order}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["before"].copy_(state["last"].T)
                state["last"].copy_(p.grad)
                state["last"][0].mul_(2)
                p.sub_(group["lr"] * (p.grad + state["before"].T))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("order", [("before", "last"), ("last", "before")])
def test_views_stay_views_also_where_new_state_is_one_of_old(order, backend):
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    twin = copy.deepcopy(model)
    optimizer, other = (Shuffled(m.parameters(), 0.1, order) for m in (model, twin))
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend=backend)
    plain = stepper("eager", twin, functional.cross_entropy, other)[1]
    for _ in range(4):
        x, y = torch.randn(6, 12).double(), torch.randint(4, (6,))
        step(x, y)
        plain(x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(optimizer.state[p], other.state[q], rtol=1e-14, atol=1e-14)
    # torch has select_copy, permute_copy and so on, which Inductor would run one by one
    assert not [op for op in step.graphs.op_counts("rewrite") if "_copy" in op.replace("_to_copy", "")]


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
    optimizer = Optimizers.of(torch.optim.AdamW(model.parameters()))
    initialise_state(optimizer, list(model.parameters()))
    for p in model.parameters():
        assert {key: t.device.type for key, t in tensor_state(optimizer, p).items()} == {
            "exp_avg": "meta", "exp_avg_sq": "meta", "step": "meta"}  # fmt: skip


class OfOneself(torch.optim.Optimizer):
    """Written by a user: a step of sign and size ``rate``; ``late``: it makes its momentum in its first step."""

    def __init__(self, params, lr=0.1, late=False):
        self.late = late
        super().__init__(params, {"lr": lr, "calls": 0, "scale": torch.ones(1)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.late:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).add_(p.grad)
                p.add_(p.grad.sign(), alpha=-group["lr"])


def test_one_without_any_state_can_be_compiled():
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = OfOneself(model.parameters()), OfOneself(twin.parameters())
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    plain = stepper("eager", twin, functional.cross_entropy, other)[1]
    for _ in range(3):
        x, y = torch.randn(5, 6).double(), torch.randint(0, 4, (5,))
        step(x, y)
        plain(x, y)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_one_that_makes_its_state_late_trains_once_it_has_stepped_as_it_is_told():
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = (OfOneself(m.parameters(), late=True) for m in (model, twin))
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    batches = [(torch.randn(5, 6).double(), torch.randint(0, 4, (5,))) for _ in range(3)]
    with pytest.raises(ValueError, match=r"creates its state \(momentum\) inside step\(\).*Call optimizer\.step\(\) once"):
        step(*batches[0])
    for m, one in ((model, optimizer), (twin, other)):
        functional.cross_entropy(m(batches[0][0]), batches[0][1]).backward()
        one.step()
        one.zero_grad()
    for x, y in batches[1:]:
        step(x, y)
        functional.cross_entropy(twin(x), y).backward()
        other.step()
        other.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(optimizer.state[p]["momentum"], other.state[q]["momentum"])


def test_a_sparse_embedding_trains_as_a_dense_one():
    """Its gradient is a whole one inside of a compiled step: the optimizer's step is the dense one."""
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8, sparse=sparse), nn.Linear(8, 4)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, backend="eager")
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            step(torch.randint(0, 30, (16,), generator=generator), torch.randint(0, 4, (16,), generator=generator))
        found.append([p.detach() for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


def test_every_number_of_a_users_optimizer_is_followed():
    """Torch's schedulers keep numbers of their own in the groups; names that only look like theirs are the optimizer's."""

    class Clipped(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad * group["max_grad_norm"])

    model = network()
    optimizer = Clipped(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    x, y = torch.randn(5, 6).double(), torch.randint(0, 4, (5,))
    step(x, y)
    optimizer.param_groups[0]["max_grad_norm"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    step(x, y)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) and step.compilations == 1


@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
])  # fmt: skip
def test_numbers_that_schedulers_keep_compile_nothing_again(schedule):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, None, backend="eager")
    rates = schedule(optimizer)
    for _ in range(4):
        step(torch.randn(5, 6).double(), torch.randint(0, 4, (5,)))
        rates.step()
    assert step.compilations == 1
