"""DistributedDataParallel around the compiled model, inside of it, and taken off by the whole step."""

import contextlib

import processes
import pytest
import test_distributed as whole
import torch
from torch.nn.parallel import DistributedDataParallel

import mkor_fx
from mkor_fx import MKOR, Communication

STEPS, ROWS = 4, 8


def wrap(model, how, **options):
    options = {"rule": MKOR.published(), **options}
    if how == "outside":
        return DistributedDataParallel(mkor_fx.compile(model, backend="eager", **options))
    if how == "inside":
        return mkor_fx.compile(DistributedDataParallel(model), backend="eager", **options)
    return mkor_fx.compile(model, backend="eager", **options)


def train(rank, size, name, how, micro=1, options=()):
    """Each batch in `micro` parts, of which each rank has its share; under no_sync but for the last."""
    model, loss_fn, batches = whole.batches_of(name, ROWS, STEPS)
    compiled = wrap(model, how, **dict(options))
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
    for x, y in batches:
        optimizer.zero_grad()
        for i, part in enumerate(zip(x.chunk(micro), y.chunk(micro))):
            last = i == micro - 1 or how == "alone"
            with contextlib.nullcontext() if last else compiled.no_sync():
                x_r, y_r = whole.share(part, whole.even(ROWS // micro, size), rank)
                (loss_fn(compiled(x_r), y_r) / micro).backward()
        optimizer.step()
    mkor = compiled.module.mkor if how == "outside" else compiled.mkor
    factors = {f"factor {k}": v for k, v in mkor.state_dict().items()}
    return {**{k: p.detach() for k, p in model.named_parameters()}, **factors}


@pytest.mark.parametrize("how", ["inside", "outside"])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_are_one_process(how, micro):
    alone = train(0, 1, "mlp", "alone", micro)
    states = processes.values(train, 2, "mlp", how, micro)
    whole.assert_bitwise(states)
    whole.assert_close(states[0], alone, 1e-5)


def test_a_rule_that_reads_gradients():
    options = {"rule": MKOR.published(form="exact", statistic="mean+gradient"), "refresh_every": 2}
    alone = train(0, 1, "gpt", "alone", 1, options)
    states = processes.values(train, 2, "gpt", "outside", 1, options)
    whole.assert_bitwise(states)
    whole.assert_close(states[0], alone, 1e-5)


def one_half(rank, size):
    """Two towers of which a rank uses one: what the other has seen of a weight counts on both."""
    towers = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)])

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = towers

        def forward(self, x, which):
            return self.towers[which](x)

    model = Model()
    compiled = mkor_fx.compile(model, backend="eager")
    ddp = DistributedDataParallel(compiled, find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for i in range(4):
        optimizer.zero_grad()
        which = i % 2 if i < 2 else (i + rank) % 2  # both know both towers before they part
        generator = torch.Generator().manual_seed(10 * i + rank)
        ddp(torch.randn(5, 4, generator=generator), which).square().mean().backward()
        optimizer.step()
    return {**model.state_dict(), **compiled.mkor.state_dict()}


def test_a_weight_that_only_one_rank_has_used():
    states = processes.values(one_half, 2)
    whole.assert_bitwise(states)


def train_whole_step(rank, size):
    model, loss_fn, batches = whole.batches_of("mlp", ROWS, STEPS)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(ddp, loss_fn, optimizer, MKOR.published(), backend="eager")
    for batch in batches:
        step(*whole.share(batch, whole.even(ROWS, size), rank))
    return {**model.state_dict(), **{f"factor {k}": v for k, v in step.mkor.state_dict().items()}}


def test_whole_step_takes_the_wrapper_off():
    states = processes.values(train_whole_step, 2)
    whole.assert_bitwise(states)
    whole.assert_close(states[0], train(0, 1, "mlp", "alone"), 1e-5)


def refused(rank, size):
    model = torch.nn.Linear(4, 3)
    said = []
    for options in ({"find_unused_parameters": True}, {"hook": True}):
        hook = options.pop("hook", False)
        ddp = DistributedDataParallel(model, **options)
        if hook:
            ddp.register_comm_hook(None, lambda state, bucket: None)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="cannot honour") as error:
            mkor_fx.compile_step(ddp, torch.nn.functional.mse_loss, optimizer)
        said.append(str(error.value))
    return said


def test_what_the_whole_step_cannot_take_over_is_refused():
    for unused, hook in processes.values(refused, 2):
        assert "find_unused_parameters" in unused and "communication hook" in hook


def different_rule(rank, size):
    compiled = mkor_fx.compile(torch.nn.Linear(4, 3), MKOR.published(gamma=0.9 + 0.05 * rank), backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    compiled(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def test_another_rule_on_one_rank():
    for error in processes.errors(different_rule, 2):
        assert "ranks would run different steps" in error and "gamma=0.95" in error


def test_rows_are_not_averaged_here():
    with pytest.raises(ValueError, match="average='rows'"):
        mkor_fx.compile(torch.nn.Linear(4, 3), communication=Communication(average="rows"))
