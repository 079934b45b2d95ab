"""fully_shard per block with precondition="backward": gradients are preconditioned while they are whole."""

import processes
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import mkor_fx
from mkor_fx import MKOR, Communication

ROWS, STEPS = 8, 5


class Block(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(6, 12, 6), Block(6, 12, 6), Block(6, 10, 3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def sharded(model, size):
    mesh = init_device_mesh("cpu", (size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(param):
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()


def train(rank, size, how, rescale):
    """Parameters after each step, the factors in the end, the names of what is preconditioned."""
    torch.manual_seed(0)
    model, rule = Model(), MKOR.published(rescale=rescale)
    if how == "fsdp":
        sharded(model, size)
    communication = Communication(check_replicas_every=2)
    compiled = mkor_fx.compile(model, rule, precondition="backward", communication=communication, backend="eager")
    handle = DistributedDataParallel(compiled) if how == "ddp" else compiled
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    generator, history = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        x, y = (torch.randn(ROWS, width, generator=generator).chunk(size)[rank] for width in (6, 3))
        optimizer.zero_grad()
        mse_loss(handle(x), y).backward()
        optimizer.step()
        history.append({name: whole(p) for name, p in model.named_parameters()})
    factors = {k: v for k, v in compiled.mkor.state_dict().items() if k.endswith((".L", ".R"))}
    return history, factors, sorted(entry.name for entry in compiled.coverage.covered)


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_ranks_are_one_process(how):
    history, factors, covered = train(0, 1, "alone", False)
    outcomes = processes.values(train, 2, how, False)
    for own_history, own_factors, own_covered in outcomes:
        assert own_covered == covered and len(covered) == 12
        assert own_factors.keys() == factors.keys()
        for own, one in (*zip(own_history, history, strict=True), (own_factors, factors)):
            for name, tensor in one.items():
                torch.testing.assert_close(own[name], tensor, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(outcomes[0][1][name], outcomes[1][1][name]) for name in factors)
    assert any((factor - torch.eye(len(factor))).abs().max() > 1e-2 for factor in factors.values())


def test_the_rescale_is_by_the_ranks_own_norms():
    """Two steps are one process's, for norms come from the step before, whose factors change none in the first; the
    third step has one process's direction and a length of its own, for each tensor."""
    (_, second, third, *_), _, _ = train(0, 1, "alone", True)
    (_, own_second, own_third, *_), _, _ = processes.values(train, 2, "fsdp", True)[0]
    lengths = []
    for name in second:
        torch.testing.assert_close(own_second[name], second[name], rtol=1e-5, atol=1e-5)
        own, one = own_third[name] - own_second[name], third[name] - second[name]
        assert torch.nn.functional.cosine_similarity(own.flatten(), one.flatten(), 0) > 1 - 1e-5
        lengths.append(float(own.norm() / one.norm()))
    assert all(0.5 < length < 2 for length in lengths) and any(abs(length - 1) > 1e-3 for length in lengths)


def refusals(rank, size):
    said, model = [], sharded(Model(), size)
    for call in (
        lambda: mkor_fx.compile(model),
        lambda: mkor_fx.compile_step(model, mse_loss, torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    late = Model()
    compiled = mkor_fx.compile(late, backend="eager")
    sharded(late, size)
    with pytest.raises(ValueError) as error:
        compiled(torch.randn(2, 6))
    said.append(str(error.value))
    return said


def test_what_would_not_see_whole_gradients_is_refused():
    for said in processes.values(refusals, 2):
        assert len(said) == 3 and all("precondition='backward'" in message for message in said)


def perceptron(skip=()):
    """A model of three layers, compiled, and how it is trained for three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    batches = [(torch.randn(16, 6), torch.randn(16, 4)) for _ in range(3)]

    def train():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        compiled = mkor_fx.compile(model, MKOR.published(), skip=skip, backend="eager")
        for x, y in batches:
            mse_loss(compiled(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return compiled

    return model, train


def tensor_parallel(rank, size):
    """The first two layers are split over the ranks, which all have the same batches."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, train = perceptron()
    parallelize_module(model, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"4 parameters are tensor-parallel \(0.weight, ...\).*use mkor_fx.compile"):
        mkor_fx.compile_step(model, mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    coverage = train().coverage
    whole = {k: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for k, p in model.named_parameters()}
    return whole, {entry.name: str(entry.declined) for entry in coverage.declined}


def test_tensor_parallel_layers_are_declined_and_the_others_train_as_on_one_process():
    model, train = perceptron(skip=["0.*", "2.*"])
    train()
    for whole, declined in processes.values(tensor_parallel, 2):
        assert declined == dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias"], "a tensor-parallel shard")
        for name, p in model.named_parameters():
            torch.testing.assert_close(whole[name], p.detach(), rtol=1e-5, atol=1e-6, msg=name)
