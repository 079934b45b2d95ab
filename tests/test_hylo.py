"""HyLo against its equations, written out here without the rule."""

import hashed
import processes
import pytest
import torch
from rows import watch
from side_by_side import Directed, side_by_side, small
from stepping import stepper
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import HyLo
from mkor_fx.rules import Gradient, Shape, Use

DAMPING = 0.2
SELDOM = [pytest.param(kind, marks=pytest.mark.nightly) for kind in ("cnn", "transformer")]
BOTH = pytest.mark.parametrize("method", ["kis", "kid"])
SGD = lambda params: torch.optim.SGD(params, lr=0.1)


def natural(a, g, G, N=None):
    """``(F + damping)^-1 G`` with the whole matrix, ``F`` of these rows."""
    U = (N or len(g)) * torch.einsum("no,ni->noi", g, a).flatten(1)
    F = U.T @ U / len(U) + DAMPING * torch.eye(U.shape[1]).double()
    return torch.linalg.solve(F, G.flatten()).view_as(G)


def by_interpolation(a, g, G, r):
    """The damped inverse of ``T^T Z_SS T + e`` in the place of the kernel ``Z``, by a matrix of all rows."""
    U = len(g) * torch.einsum("no,ni->noi", g, a).flatten(1)
    S = (a.square().sum(1) * g.square().sum(1)).argsort(descending=True)[:r]
    T = torch.linalg.lstsq(U[S].T, U.T, driver="gelsd").solution
    e = (U - T.T @ U[S]).square().sum() / len(U) ** 2
    inverse = torch.linalg.inv(T.T @ (U[S] @ U[S].T) @ T / len(U) + (DAMPING + e) * torch.eye(len(U)).double())
    D = G.flatten() - U[S].T @ (T @ inverse @ T.T) @ U[S] @ G.flatten() / len(U)
    return (D / DAMPING).view_as(G)


class ByHand:
    def __init__(self, method, r, every=1):
        self.method, self.r, self.every, self.kept = method, r, every, {}

    def __call__(self, name, t, a, g, G, b):
        if b is not None:
            a, G = torch.cat([a, torch.ones_like(a[:, :1])], 1), torch.cat([G, b[:, None]], 1)
        if t % self.every == 0:
            self.kept[name] = t, a, g
        drawn, a, g = self.kept[name]
        if self.method == "kis":
            score = a.square().sum(1) * g.square().sum(1) / -hashed.uniforms(drawn << 32, 0, len(a)).log()
            chosen = score.argsort(descending=True)[: self.r]
            D = natural(a[chosen], g[chosen], G, len(a))
        else:
            D = by_interpolation(a, g, G, self.r)
        D = D * (G.norm() / D.norm())
        return (D, None) if b is None else (D[:, :-1], D[:, -1])


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("kind", ["mlp", *SELDOM])
@BOTH
def test_equations(kind, door, method):
    rule, by_hand = HyLo(method=method, rows=5, damping=DAMPING, ranks=2), ByHand(method, 5, 2)
    beside = lambda model, optimizer: Directed(model, optimizer, by_hand)
    skip = ["embed.*"] if kind == "transformer" else []
    side_by_side(small(kind), rule, door, SGD, beside, 1e-3, refresh_every=2, skip=skip)


def rows(seed=0, count=12):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, size, dtype=torch.float64, generator=generator) for size in (4, 3))


def direction(rule, parts, bias=False):
    """Of float64 states, from ``parts``: ``(key, a, g)``."""
    a, g = (torch.cat(t) for t in list(zip(*parts, strict=True))[1:])
    shape = Shape(3, 4, bias)
    G = Gradient(g.T @ a, g.sum(0) if bias else None)
    state = {k: t.double() for k, t in rule.init(shape, torch.device("cpu")).items()}
    made = [rule.summarize(shape, a, g, key=torch.tensor(key)) for key, a, g in parts]
    use = Use(tuple(sum(t) for t in zip(*made, strict=True)), torch.tensor(len(a)).double(), False)
    state = rule.update(state, [use], G, torch.tensor(0))
    return rule.precondition(state, G), G, state


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [12, 20])
@BOTH
def test_all_rows_are_the_whole_fisher_matrix(method, kept, bias):
    a, g = rows()
    made, _, _ = direction(HyLo(method=method, rows=kept, damping=DAMPING), [(0, a, g)], bias)
    joint = torch.cat([a, torch.ones(12, 1).double()], 1) if bias else a
    expected = natural(joint, g, g.T @ joint)
    torch.testing.assert_close(made.weight, expected[:, :4], rtol=1e-9, atol=1e-11)
    if bias:
        torch.testing.assert_close(made.bias, expected[:, 4], rtol=1e-9, atol=1e-11)


def key(use, rank):
    return (3 << 32) + (use << 16) + rank


@BOTH
def test_ranks_and_micro_batches_are_gathered(method):
    """Three ranks with two micro-batches of two rows each are as good as all rows at once."""
    a, g = rows()
    rule = HyLo(method=method, rows=2, ranks=3, micro_batches=2, damping=DAMPING)
    at = [(use, rank) for use in range(2) for rank in range(3)]
    parts = [(key(*place), a[2 * i : 2 * i + 2], g[2 * i : 2 * i + 2]) for i, place in enumerate(at)]
    made, G, _ = direction(rule, parts)
    torch.testing.assert_close(made.weight, natural(a, g, G.weight), rtol=1e-9, atol=1e-11)


@BOTH
def test_calls_take_slots_in_turn_and_what_shares_one_or_has_none_is_left_out(method):
    a, g = rows()
    rule = HyLo(method=method, rows=6, micro_batches=2, damping=DAMPING)
    made, G, _ = direction(rule, [(key(use, 0), a[i : i + 6], g[i : i + 6]) for use, i in ((3, 0), (4, 6))])
    torch.testing.assert_close(made.weight, natural(a, g, G.weight), rtol=1e-9, atol=1e-11)
    rule = HyLo(method=method, rows=4, ranks=2, damping=DAMPING)
    parts = [(key(0, rank), a[i : i + 4], g[i : i + 4]) for rank, i in ((0, 0), (1, 4), (1, 8))]
    made, G, state = direction(rule, parts)
    torch.testing.assert_close(made.weight, natural(a[:4], g[:4], G.weight, 12), rtol=1e-9, atol=1e-11)
    twice = [(0, a[:6], g[:6]), (0, a[6:], g[6:])]
    made, G, state = direction(rule, twice)
    assert torch.equal(made.weight, G.weight) and not state["core"].any()


@BOTH
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_few_rows_give_a_direction_of_descent_and_the_scale_of_the_loss_is_taken_out(method, scale):
    rule = HyLo(method=method, rows=3, damping=1e-6)
    for seed in range(10):
        a, g = rows(seed)
        made, G, _ = direction(rule, [(0, a, scale * g)])
        assert (made.weight * G.weight).sum() > 0
        plain, scaled = (rule.summarize(Shape(3, 4), a, x, key=torch.tensor(0)) for x in (g, scale * g))
        for one, other in zip(plain, rule.unscale(scaled, torch.tensor(scale).double()), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


@BOTH
def test_rows_that_are_alike_or_none(method):
    """Also in float32, where sums over rows that are alike cancel to 1e-4 of what they add."""
    a, g = rows()
    made, G, _ = direction(HyLo(method=method, rows=4, damping=DAMPING), [(0, 0 * a, 0 * g)])
    assert torch.equal(made.weight, G.weight / DAMPING)
    a, g = a[:2].repeat(6, 1), g[:2].repeat(6, 1)
    few, G, _ = direction(HyLo(method=method, rows=4, damping=DAMPING), [(0, a, g)])
    assert torch.isfinite(few.weight).all()
    rule, expected = HyLo(method=method, rows=12, damping=DAMPING), natural(a, g, G.weight)
    made, G, _ = direction(rule, [(0, a, g)])
    assert (made.weight - expected).norm() < 1e-6 * expected.norm()
    use = Use(rule.summarize(Shape(3, 4), a.float(), g.float(), key=torch.tensor(0)), torch.tensor(12.0), False)
    state = rule.update(rule.init(Shape(3, 4), torch.device("cpu")), [use], G.to(torch.float32), torch.tensor(0))
    made = rule.precondition(state, Gradient(g.float().T @ a.float()))
    assert (made.weight - expected).norm() < 0.01 * expected.norm()


def test_samples_are_drawn_by_the_size_of_rows_and_without_replacement():
    a, g = torch.ones(6, 1).double(), torch.tensor([0.0, 1, 1, 2, 2, 3]).double()[:, None]
    rule, found = HyLo(rows=1), torch.zeros(6).double()
    for draw in range(3000):
        summary = rule.summarize(Shape(1, 1), a * torch.arange(6).double()[:, None].add(1), g, key=torch.tensor(draw << 32))
        found[int(summary[0]) - 1] += 1
    p = (torch.arange(1, 7).double() * g[:, 0]).square()
    assert (found / 3000 - p / p.sum()).abs().max() < 0.03
    many = HyLo(rows=5).summarize(Shape(1, 1), torch.arange(1.0, 7)[:, None], g.float(), key=torch.tensor(7 << 32))
    assert sorted(many[0].flatten().tolist()) == [2, 3, 4, 5, 6]


def twice_as(model, batches, loss_fn):
    """One step of SGD by the whole Fisher matrix, of all batches together; sized by the gradient."""
    layers = watch(model)
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    loss_fn(model(x), y).backward()
    with torch.no_grad():
        for layer in layers.values():
            (a, g), W, b = layer.rows(), layer.weight, layer.bias
            a, G = torch.cat([a, torch.ones_like(a[:, :1])], 1), torch.cat([W.grad, b.grad[:, None]], 1)
            D = natural(a, g, G)
            D *= 0.1 * G.norm() / D.norm()
            W -= D[:, :-1]
            b -= D[:, -1]


def one_step(door, rule, model, batches, loss_fn, accumulate):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if door == "compile_step":
        x, y = (torch.cat(t) for t in zip(*batches, strict=True))
        mkor_fx.compile_step(model, loss_fn, optimizer, rule, backend="eager", accumulate=accumulate)(x, y)
        return
    handle = mkor_fx.compile(model, rule, backend="eager")
    for x, y in batches:
        (loss_fn(handle(x), y) / len(batches)).backward()
    for p in model.parameters():
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(p.grad)
            p.grad /= torch.distributed.get_world_size()
    optimizer.step()


def trained(rank, size, door, method, accumulate):
    model, loss_fn, batches = small("mlp", 4)
    own = batches[rank * 4 // size : (rank + 1) * 4 // size]
    rule = HyLo(method=method, rows=32, ranks=size, micro_batches=accumulate, damping=DAMPING)
    one_step(door, rule, model, own, loss_fn, accumulate)
    return [p.detach() for p in model.parameters()]


def check(found):
    twin, loss_fn, batches = small("mlp", 4)
    twice_as(twin, batches, loss_fn)
    for p, q, start in zip(found, twin.parameters(), small("mlp")[0].parameters(), strict=True):
        assert (p - q).norm() < 1e-3 * (q - start).norm()


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@BOTH
def test_micro_batches_of_a_step(door, method):
    check(trained(0, 1, door, method, 4))


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("method", ["kis", pytest.param("kid", marks=pytest.mark.nightly)])
def test_two_ranks_with_micro_batches(door, method):
    for found in processes.values(trained, 2, door, method, 2):
        check(found)


def refused(rank, size):
    found = []
    for door in (mkor_fx.compile, lambda model, rule: mkor_fx.compile_step(model, mse_loss, sgd(model), rule)):
        with pytest.raises(ValueError, match=r"HyLo\(.*gathers the summaries of 1 ranks, and there are 2: tell it") as error:
            door(nn.Linear(4, 3), HyLo())
        found.append(str(error.value))
    return found


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_more_ranks_or_parts_than_slots_are_refused():
    assert all("ranks=1" in said for found in processes.values(refused, 2) for said in found)
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"gathers the summaries of 2 micro-batches, and there are 3"):
        mkor_fx.compile_step(model, mse_loss, sgd(model), HyLo(micro_batches=2), accumulate=3)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.square, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x)))).flatten(1)
        return self.head(torch.tanh(self.square(torch.tanh(self.square(x)))))


@pytest.mark.parametrize("door", ["compile_step", "compile"])
def test_what_one_program_reads_in_two_ways_is_declined(door):
    """A convolution's patches are summed use by use; of a linear layer that is applied twice they are gathered as one."""
    model = Twice()
    done, step = stepper(door, model, mse_loss, sgd(model), HyLo(rows=8))
    step(torch.randn(4, 2, 2, 2), torch.randn(4, 2))
    assert "its uses are read in several ways, and HyLo gathers" in str(done.coverage["conv.weight"].declined)
    assert done.coverage["square.weight"].declined is None and done.mkor.state_dict()["square.weight.core"].any()


class Training:
    """A loop behind ``compile``, with room for every row of a batch of 8."""

    def __init__(self, micro_batches=1, precondition="step", refresh_every=1):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        rule = HyLo(rows=8, micro_batches=micro_batches, damping=DAMPING)
        self.handle = mkor_fx.compile(
            self.model, rule, precondition=precondition, refresh_every=refresh_every, backend="eager"
        )
        self.optimizer = sgd(self.model)
        self.batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(8)]

    def loss(self, number):
        x, y = self.batches[number]
        return mse_loss(self.handle(x), y)

    def step(self, *numbers):
        self.optimizer.zero_grad()
        for number in numbers:
            self.loss(number).backward()
        self.optimizer.step()

    def check_like(self, other):
        for p, q in zip(self.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


MORE = r"weight: HyLo\(.*micro_batches=2.*gathers the summaries of 2 micro-batches of a step, and there are 3: tell it how"


def test_more_micro_batches_than_slots_are_refused_before_anything_is_lost():
    own, other = Training(2), Training(2)
    before = [p.detach().clone() for p in own.model.parameters()]
    with pytest.raises(ValueError, match=MORE):
        own.step(0, 1, 2)
    raw = torch.autograd.grad(sum(mse_loss(other.model(x), y) for x, y in own.batches[:3]), [*other.model.parameters()])
    for p, start, grad in zip(own.model.parameters(), before, raw, strict=True):
        assert torch.equal(p, start)
        torch.testing.assert_close(p.grad, grad)
    assert own.handle.mkor.step == 0 and not own.handle.mkor.tensors()
    for training in (own, other):
        training.step(3, 4)
        training.step(5)
    own.check_like(other)
    assert own.handle.mkor.state_dict()["0.weight.core"].any()


def refused_late(rank, size):
    model = nn.Linear(4, 3)
    handle, optimizer = mkor_fx.compile(model, HyLo(ranks=size), backend="eager"), sgd(model)
    for _ in range(2):
        handle(torch.randn(5, 4)).square().sum().backward()
    with pytest.raises(ValueError, match=r"1 micro-batches of a step, and there are 2"):
        optimizer.step()


@pytest.mark.nightly
def test_so_they_are_on_every_rank():
    processes.values(refused_late, 2)


def test_so_they_are_in_the_backward_when_the_next_step_begins():
    training = Training(2, "backward")
    training.step(0, 1)
    training.step(2, 3, 4)
    training.optimizer.zero_grad()
    with pytest.raises(ValueError, match=MORE):
        training.loss(5)


def test_a_step_that_does_not_refresh_takes_any_number():
    training = Training(2, refresh_every=2)
    training.step(0)
    training.step(1, 2, 3, 4)
    with pytest.raises(ValueError, match=MORE):
        training.step(5, 6, 7)


def skipped(training, clear):
    """A step that a gradient scaler has skipped."""
    training.loss(0).backward()
    training.loss(1).backward()
    clear(training)


BETWEEN = {
    "a skipped step": lambda t: skipped(t, lambda t: t.optimizer.zero_grad()),
    "gradients set to zero": lambda t: skipped(t, lambda t: t.optimizer.zero_grad(set_to_none=False)),
    "gradients cleared behind the forward": lambda t: skipped(t, lambda t: None),
    "calls without a backward": lambda t: [t.loss(0) for _ in range(3)],
}


@pytest.mark.parametrize("what", BETWEEN)
def test_slots_are_free_again_where_statistics_are_gone(what):
    own, other = Training(2), Training(2)
    BETWEEN[what](own)
    for training in (own, other):
        loss = training.loss(2)
        training.optimizer.zero_grad()
        loss.backward()
        training.loss(3).backward()
        training.optimizer.step()
        training.step(4, 5)
    own.check_like(other)


def test_two_calls_that_come_to_one_slot_are_refused():
    training = Training(2)
    training.loss(0).backward()
    training.loss(1)
    training.loss(2).backward()
    with pytest.raises(ValueError, match=r"weight: 2 micro-batches, and two in one of the 2 slots of HyLo.*without a backw"):
        training.optimizer.step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": 0.0}, r"HyLo\(damping=0\.0\): must be positive"),
        ({"method": "svd"}, r"HyLo\(method='svd'\): must be 'kis' or 'kid'"),
        ({"rows": 0}, r"HyLo\(rows=0\): must be an integer of at least 1"),
        ({"ranks": 0.5}, r"HyLo\(ranks=0\.5\): must be an integer of at least 1"),
        ({"micro_batches": 0}, r"HyLo\(micro_batches=0\): must be an integer of at least 1"),
        ({"kl_clip": -1.0, "graft": None}, r"HyLo\(kl_clip=-1\.0\): must be positive"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        HyLo(**options)
