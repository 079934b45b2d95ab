"""R ranks on 1/R of the batch each are one process on the whole batch, and equal to each other bit for bit."""

import processes
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import mkor_fx
from mkor_fx import MKOR, Communication


def batches_of(name, rows, steps):
    """Batches whose parts differ in mean and scale, so that a mean of ranks' means is not the mean."""
    model, loss_fn, _ = zoo.build(name, steps=0)
    generator = torch.Generator().manual_seed(1)
    shape = zoo.MODELS[name][1][1:]
    batches = []
    for _ in range(steps):
        if name == "gpt":
            ids = torch.randint(23, (rows, 11), generator=generator)
            batches.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        else:
            slope = torch.linspace(0.5, 2, rows).reshape(-1, *[1] * len(shape))
            x = torch.randn(rows, *shape, generator=generator) * slope + slope
            batches.append((x, torch.randint(zoo.MODELS[name][2], (rows,), generator=generator)))
    return model, loss_fn, batches


def share(batch, bounds, rank):
    return [t[bounds[rank] : bounds[rank + 1]] for t in batch]


def even(rows, size):
    return [rows * rank // size for rank in range(size + 1)]


def everything(model, optimizer, step):
    state = {**model.state_dict(), **{f"factor {k}": v for k, v in step.mkor.state_dict().items()}}
    for name, param in model.named_parameters():
        state |= {f"{name} {key}": t for key, t in optimizer.state.get(param, {}).items()}
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def train(rank, size, name, rule, steps, bounds=None, backend="eager", **options):
    rows = 8
    model, loss_fn, batches = batches_of(name, rows, steps)
    if rank:  # ranks start as rank 0, whatever they have been initialised to
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"refresh_every": 2, "backend": backend, **options}
    step = mkor_fx.compile_step(model, loss_fn, optimizer, rule, **options)
    losses = [step(*share(batch, bounds or even(rows, size), rank)) for batch in batches]
    return everything(model, optimizer, step), torch.stack(losses)


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def assert_bitwise(states):
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert [key for key in state if not torch.equal(state[key], states[0][key])] == []


@pytest.mark.parametrize(
    "name, size, rule",
    [
        ("mlp", 4, MKOR.published()),
        ("gpt", 2, MKOR.published()),
        ("in_out", 2, MKOR.published(form="exact", statistic="mean+gradient", bias="joint", clamp=0.05)),
    ],
    ids=["mlp-4", "gpt-2", "in_out-2"],
)
def test_ranks_are_one_process(name, size, rule):
    whole, whole_losses = train(0, 1, name, rule, 5)
    parts = processes.values(train, size, name, rule, 5)
    assert_bitwise([state for state, _ in parts])
    assert_close(parts[0][0], whole, 1e-5)
    assert_close({"losses": parts[-1][1]}, {"losses": whole_losses}, 1e-5)


def test_ranks_of_unequal_batches_are_one_process():
    whole, _ = train(0, 1, "mlp", MKOR.published(), 8)
    parts = processes.values(train_rows, 2)
    assert_bitwise([state for state, _ in parts])
    assert_close(parts[0][0], whole, 1e-5)


def train_rows(rank, size):
    return train(rank, size, "mlp", MKOR.published(), 8, [0, 3, 8], communication=Communication(average="rows"))


def train_on_changing_batches(rank, size):
    """Ranks compile again at different steps, under a learning rate that changes."""
    model, loss_fn, batches = batches_of("mlp", 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    communication = Communication(average="rows")
    step = mkor_fx.compile_step(
        model, loss_fn, optimizer, MKOR.published(), communication=communication, backend="eager"
    )
    for i, batch in enumerate(batches):
        first = (4, 4, 3, 3, 4, 2, 5, 5)[i]
        step(*share(batch, [0, first, 8] if size > 1 else [0, 8], rank))
        schedule.step()
    return everything(model, optimizer, step), step.compilations


def test_ranks_whose_batches_change_by_themselves():
    whole, _ = train_on_changing_batches(0, 1)
    parts = processes.values(train_on_changing_batches, 2)
    assert_bitwise([state for state, _ in parts])
    assert_close(parts[0][0], whole, 1e-5)
    assert all(compilations > 1 for _, compilations in parts)


def compiled(rank, size, backend):
    rule = MKOR.published(max_factor=14, bias="off")
    return train(rank, size, "mlp", rule, 3, None, backend, refresh_every=1)


def test_compiled_ranks_are_one_process():
    whole, _ = compiled(0, 1, "eager")
    parts = processes.values(compiled, 2, "inductor")
    assert_bitwise([state for state, _ in parts])
    assert_close(parts[0][0], whole, 1e-5)


def train_in_half_precision(rank, size):
    communication = Communication(statistics_dtype=torch.bfloat16, statistics_bytes=64, gradient_bytes=512)
    return train(rank, size, "mlp", MKOR.published(), 6, communication=communication)


def test_statistics_in_half_precision_stay_close():
    whole, _ = train(0, 1, "mlp", MKOR.published(), 6)
    parts = processes.values(train_in_half_precision, 2)
    assert_bitwise([state for state, _ in parts])
    assert_close(parts[0][0], whole, 2e-2)
    assert any((parts[0][0][key] - whole[key]).abs().max() > 1e-5 for key in whole if key.endswith(".R"))


def train_beside_ddp(rank, size):
    """A model with BatchNorm: plain compiled step, and DDP in eager mode; then 100 steps of MKOR."""
    model, loss_fn, batches = batches_of("cnn", 8, 6)
    copy, _, _ = batches_of("cnn", 8, 0)
    ddp = DistributedDataParallel(copy)
    eager = torch.optim.SGD(ddp.parameters(), lr=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = mkor_fx.compile_step(model, loss_fn, optimizer, None, backend="eager")
    for batch in batches:
        x, y = share(batch, even(8, size), rank)
        step(x, y)
        eager.zero_grad()
        loss_fn(ddp(x), y).backward()
        eager.step()
    return model.state_dict(), copy.state_dict()


def test_buffers_are_treated_as_ddp_does():
    states = processes.values(train_beside_ddp, 2)
    assert_close(states[0][0], states[0][1], 1e-6)  # rank 0's buffers are those that DDP keeps
    assert_bitwise([state for state, _ in states])


def test_replicas_stay_equal():
    assert_bitwise([state for state, _ in processes.values(train_long, 2)])


def train_long(rank, size):
    return train(rank, size, "cnn", MKOR.published(), 100, communication=Communication(check_replicas_every=10))


def train_poisoned(rank, size):
    model, loss_fn, batches = batches_of("cnn", 8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(model, loss_fn, optimizer, backend="eager")
    states, skipped = [], []
    for i, batch in enumerate(batches):
        x, y = share(batch, even(8, size), rank)
        if i == 2 and rank == 1:
            x = x.clone()
            x[0, 0, 0, 0] = float("nan")
        step(x, y)
        states.append(everything(model, optimizer, step))
        skipped.append(step.skipped)
    return states, skipped


def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_by_all():
    outcomes = processes.values(train_poisoned, 2)
    for states, skipped in outcomes:
        assert skipped == [0, 0, 1, 1]
        before, after = ({k: v for k, v in states[i].items() if k != "factor step"} for i in (1, 2))
        assert_bitwise([before, after])
        assert any(not torch.equal(states[3][key], states[2][key]) for key in states[2])
    for i in range(4):
        assert_bitwise([states[i] for states, _ in outcomes])


def train_on_part_of_the_world(rank, size):
    groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2])]
    own = groups[rank // 2]
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, process_group=own, backend="eager")
    for i in range(3):
        generator = torch.Generator().manual_seed(10 * rank + i)
        step(torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator))
    return model.state_dict()


def test_a_group_of_ones_own():
    states = processes.values(train_on_part_of_the_world, 3)
    assert_bitwise(states[:2])
    assert not torch.equal(states[0]["weight"], states[2]["weight"])
