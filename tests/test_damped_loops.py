"""MKOR's damped form in the loops that people have: micro-batches, clipping, loss scalers, schedules, ranks, a resume.

Beside the eager reference, whose rows come in parts that each draw signs of their own.
"""

import contextlib
import copy

import processes
import pytest
import torch
from damped import Damped
from hashed import signs
from test_damped import trainer
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import mkor_fx
from mkor_fx import MKOR

RULE = MKOR(rank=3, factor_dtype=torch.float64, product_dtype=None)
STEPS = 6


class Parts(Damped):
    """``part``: (micro-batch, rank) of what runs."""

    part = (0, 0)

    def watch(self, use, x, y):
        y.requires_grad and y.register_hook(
            lambda g, part=self.part: self.rows.setdefault(use.weight, []).append((part, x, g)) and None
        )

    def blocks(self, weight, G_OI):
        sketches = [
            (signs(key, 1, len(a), self.rank).T @ g, signs(key, 0, len(a), self.rank).T @ a)
            for (micro, rank), a, g in self.rows[weight]
            for key in [(self.steps << 32) + (micro << 16) + rank]
        ]
        yield [sum(sides) for sides in zip(*sketches, strict=True)]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5, bias=False)).double()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 6, generator=generator).double(), torch.randint(5, (8,), generator=generator))
        for _ in range(STEPS)
    ]
    return model, batches


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.1)


def expected(parts, clip=None, schedule=False):
    """Weights after each step of one process, which takes each batch in ``(micro-batches, ranks)``."""
    model, batches = build()
    optimizer = adamw(model)
    reference, (micro, ranks), history = Parts(model, optimizer, rank=RULE.rank), parts, []
    schedule = schedule and torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for x, y in batches:
        for i, (x_i, y_i) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            for rank, share in enumerate(zip(x_i.chunk(ranks), y_i.chunk(ranks), strict=True)):
                reference.part = (i, rank)
                (functional.cross_entropy(model(share[0]), share[1]) / (micro * ranks)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        reference.step()
        if schedule:
            schedule.step()
        history.append(snapshot(model))
    return history


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(history, reference):
    assert len(history) == len(reference)
    for own, other in zip(history, reference, strict=True):
        for name, tensor in other.items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_clipping_and_a_schedule():
    model, batches = build()
    compiled, optimizer = mkor_fx.compile(model, RULE, backend="eager"), adamw(model)
    schedule, history = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7), []
    for x, y in batches:
        optimizer.zero_grad()
        for x_i, y_i in zip(x.chunk(2), y.chunk(2), strict=True):
            (functional.cross_entropy(compiled(x_i), y_i) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        schedule.step()
        history.append(snapshot(model))
    same(history, expected((2, 1), 0.3, schedule=True))


def test_a_schedule_of_the_whole_step():
    model, batches = build()
    optimizer, history = adamw(model), []
    step = mkor_fx.compile_step(model, functional.cross_entropy, optimizer, RULE, backend="eager")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for batch in batches:
        step(*batch)
        schedule.step()
        history.append(snapshot(model))
    same(history, expected((1, 1), schedule=True))


def test_a_loss_scaler_with_clipping():
    model, batches = build()
    compiled, optimizer = mkor_fx.compile(model, RULE, backend="eager"), adamw(model)
    scaler, history = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2), []
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(compiled(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        history.append(snapshot(model))
    same(history, expected((1, 1), 0.3))


def on_a_rank(rank, size, how, micro):
    model, batches = build()
    if rank:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)  # ranks start as rank 0
    optimizer, history = adamw(model), []
    if how == "drop-in":
        compiled = mkor_fx.compile(model, RULE, backend="eager")
        handle = DistributedDataParallel(compiled)

        def run(x, y):
            optimizer.zero_grad()
            for i, part in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
                with handle.no_sync() if i < micro - 1 else contextlib.nullcontext():
                    (functional.cross_entropy(handle(part[0]), part[1]) / micro).backward()
            optimizer.step()

    else:
        options = {"placement": how, "backend": "eager"}
        run, _ = trainer("step", model, functional.cross_entropy, optimizer, RULE, **options)
    for x, y in batches:  # each micro-batch has a share for each rank
        parts = [t.chunk(micro) for t in (x, y)]
        run(*(torch.cat([part.chunk(size)[rank] for part in t]) for t in parts))
        history.append(snapshot(model))
    return history


@pytest.mark.parametrize(("how", "micro"), [("replicated", 1), ("owner", 1), ("drop-in", 1), ("drop-in", 2)])
def test_two_ranks_are_one_process(how, micro):
    ranks = processes.values(on_a_rank, 2, how, micro)
    for history in ranks:
        same(history, expected((micro, 2)))
    assert all(torch.equal(ranks[0][-1][name], p) for name, p in ranks[1][-1].items())


@pytest.mark.parametrize("door", ["step", "drop-in"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(door):
    """Bit for bit: weights, Adam's moments, factors, momenta, the averages that size a step, the count behind the signs."""
    whole, batches = build()
    optimizer = adamw(whole)
    run, mkor = trainer(door, whole, functional.cross_entropy, optimizer, RULE, backend="eager")
    for batch in batches[:3]:
        run(*batch)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), mkor.state_dict()))
    again, _ = build()
    other = adamw(again)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed, factors = trainer(door, again, functional.cross_entropy, other, RULE, backend="eager")
    factors.load_state_dict(saved[2])
    for batch in batches[3:]:
        run(*batch)
        resumed(*batch)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    for key, tensor in mkor.state_dict().items():
        assert torch.equal(factors.state_dict()[key], tensor), key
