"""Communication(compress=...): what owners send takes few bits, errs no further than it says, and is alike on all ranks
(COMPSO)."""

import processes
import pytest
import torch
from test_distributed import assert_bitwise, assert_close
from test_local import RATE, network, train
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, Communication, Compression
from mkor_fx.passes.order.compression import pack, unpack
from mkor_fx.show.timeline import COMMUNICATION


def sent_and_received(tensors, how, key=3, dtype=torch.float32, padding=5):
    length, slots = sum(t.numel() for t in tensors) + padding, len(tensors) + 1
    given = (torch.tensor(key), [11 * i for i in range(len(tensors))], length, slots, dtype, how)
    sent = pack(tensors, *given)
    assert sent.dtype == torch.uint8 and sent.numel() == how.bytes(length, slots, dtype)
    received = unpack(sent, [t.numel() for t in tensors], slots, dtype, how)
    assert received.dtype == dtype
    return sent, received.split([t.numel() for t in tensors])


def tensors_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    scales = (1e-20, 1e-3, 1.0, 1e12)
    drawn = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (1, 7, 300, 64))
    return [(scale * x).to(dtype) for scale, x in zip(scales, drawn)]


@pytest.mark.parametrize(
    ("bound", "bits"), [(1.0, 4), (1 / 7, 4), (0.14, 8), (1 / 127, 8), (0.005, 16), (1 / 32767, 16), (2**-20, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_element_is_within_the_bound(bound, bits, dtype):
    how = Compression(bound=bound)
    assert how.bits == bits and how.levels < 2 ** (bits - 1)
    rounding = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    own = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0  # what arrives is rounded to the dtype
    for key in range(5):
        tensors = tensors_of(dtype)
        for x, received in zip(tensors, sent_and_received(tensors, how, key, dtype)[1]):
            most = x.abs().max().double()
            error = (x.double() - received.double()).abs().max()
            assert error <= (bound + 4 * rounding + own) * most
            assert bits > 8 or error > 0.01 * bound * most or x.numel() < 10  # else nothing was rounded


def test_rounding_is_unbiased_and_its_variance_bounded():
    (x,) = tensors_of()[2:3]
    how, count = Compression(bound=1 / 7), 600
    errors = torch.stack([sent_and_received([x], how, key)[1][0] - x for key in range(count)]).double()
    delta = float(x.abs().max()) / 7
    assert errors.mean(0).abs().max() <= 5 * delta / 2 / count**0.5
    assert errors.var(0).max() <= delta**2 / 4 * 1.01 + 1e-12
    assert errors.std(0).max() > delta / 3  # and it is random


def test_draws_follow_the_key_alone():
    tensors = tensors_of()
    one, again, other = (sent_and_received(tensors, Compression(), key)[0] for key in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    same = [tensors[2], tensors[2]]
    first, second = sent_and_received(same, Compression())[1]
    assert not torch.equal(first, second)  # tensors have numbers of their own


def test_the_closed_forms():
    """The largest is exact at 8 bits, 2^-24 is the identity up to rounding, zero stays zero."""
    (x,) = tensors_of()[2:3]
    received = sent_and_received([x], Compression())[1][0]
    at = x.abs().argmax()
    torch.testing.assert_close(received[at], x[at], rtol=1e-6, atol=0)
    fine = sent_and_received([x], Compression(bound=2**-24))[1][0]
    assert (fine - x).abs().max() <= 2**-23 * x.abs().max()
    assert torch.equal(sent_and_received([torch.zeros(9)], Compression())[1][0], torch.zeros(9))
    empty = pack([], torch.tensor(0), [], 6, 2, torch.float32, Compression())
    assert empty.numel() == 6 + 8 and not empty.any() and unpack(empty, [], 2, torch.float32, Compression()).numel() == 0


def test_what_is_filtered_is_zero_and_the_rest_as_before():
    (x,) = tensors_of()[2:3]
    kept = sent_and_received([x], Compression())[1][0]
    filtered = sent_and_received([x], Compression(filter=0.1))[1][0]
    small = x.abs() <= 0.1 * x.abs().max()
    assert 10 < small.sum() < 200
    assert torch.equal(filtered, torch.where(small, 0.0, kept))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_arrives_as_such(wrong):
    x = torch.tensor([1.0, wrong, 2.0])
    assert not torch.isfinite(sent_and_received([x, torch.ones(2)], Compression())[1][0]).any()
    assert torch.isfinite(sent_and_received([x, torch.ones(2)], Compression())[1][1]).all()


# ---- training ---------------------------------------------------------------------------------------------------------

RULE = KFAC(damping=0.1, derive_every=2)
HOW = Compression(bound=1 / 127)


def both(rank, size, door, placement, how, steps, communication):
    given = [Communication(compress=one, **communication) for one in (None, how)]
    return [train(rank, size, door, RULE, steps, placement=placement, communication=one) for one in given]


@pytest.mark.parametrize(
    ("door", "placement", "size"), [("step", "owner", 2), ("step", "local", 2), ("loop", "local", 2), ("step", 0.5, 4)]
)
def test_ranks_stay_equal_and_a_step_errs_no_further(door, placement, size):
    more = {} if door == "loop" else {"padding": 0.15 if placement == "local" else 9.0}
    ranks = processes.values(both, size, door, placement, HOW, 1, more)
    assert_bitwise([pair[1][0] for pair in ranks])
    plain, compressed = ranks[0][0][0], ranks[0][1][0]
    before, worst = network().state_dict(), 0.0
    for name, weight in before.items():
        step, other = plain[name] - weight, compressed[name] - weight
        error, most = (other - step).abs().max(), step.abs().max()
        assert error <= HOW.bound * most * 1.001 + 1e-7
        worst = max(worst, float(error / most))
    assert worst > 0.2 * HOW.bound
    for pair in ranks:
        assert pair[1][2]["lines"] == ranks[0][1][2]["lines"]


@pytest.mark.parametrize(("door", "placement"), [("step", "owner"), ("step", "local"), ("loop", "local")])
def test_a_quarter_of_the_bytes_is_sent(door, placement):
    """Beside that the largest of each tensor: of each bucket as many as the rank with the most has."""
    more = {} if door == "loop" else {"padding": 9.0}
    for plain, compressed in processes.values(both, 2, door, placement, HOW, 1, more):
        numbers, sent = ([n for op, n, kind in about["sent"] if kind == "direction"] for _, _, about in (plain, compressed))
        assert len(numbers) == len(sent) > 0
        most = 4 * 8  # eight tensors
        assert sum(numbers) + 4 * len(numbers) <= sum(sent) <= sum(numbers) + most
        assert all(line.split(":")[0].endswith(" uint8") for line in compressed[2]["lines"] if "direction of" in line)
        others = [[line for line in about["lines"] if "direction of" not in line] for _, _, about in (plain, compressed)]
        assert others[0] == others[1]


def resumed(rank, size, door, placement):
    how = Communication(compress=Compression(bound=1 / 7))
    return [train(rank, size, door, RULE, 5, placement=placement, resume_at=at, communication=how)[0] for at in (None, 3)]


@pytest.mark.parametrize(("door", "placement"), [("step", "owner"), ("loop", "local")])
def test_a_resumed_run_draws_the_same(door, placement):
    for states in processes.values(resumed, 2, door, placement):
        assert_bitwise(states)


def compiled(rank, size, door, placement):
    how = Communication(compress=HOW, **({"padding": 9.0} if door == "step" else {}))
    given = {"placement": placement, "communication": how}
    return [train(rank, size, door, RULE, 2, backend=one, **given)[0] for one in ("eager", "inductor")]


@pytest.mark.nightly
@pytest.mark.parametrize(("door", "placement"), [("step", "owner"), ("step", "local"), ("loop", "local")])
def test_compiled_it_is_the_same(door, placement):
    ranks = processes.values(compiled, 2, door, placement)
    assert_bitwise([states[1] for states in ranks])
    names = network().state_dict()
    eager, inductor = ({name: state[name] for name in names} for state in ranks[0])
    assert_close(inductor, eager, 2 * RATE * HOW.bound)


def test_a_simulation_counts_fewer_bytes():
    model, x = network(), torch.randn(6, 12)
    options = {"loss_fn": functional.mse_loss, "optimizer": torch.optim.SGD(model.parameters(), lr=RATE), "world_size": 4}
    options |= {"rule": RULE, "placement": "owner"}
    directions = lambda how: sum(
        event.bytes
        for event in mkor_fx.simulate(
            model, x, x[:, :8], communication=Communication(compress=how, padding=9.0), **options
        ).lane(COMMUNICATION)
        if event.phase == "direction"
    )
    assert directions(None) / 4 < directions(HOW) < directions(None) / 4 + 4 * 8 + 8
    assert directions(Compression(bound=1 / 7)) < directions(HOW) * 0.6


@pytest.mark.parametrize(
    "wrong", [{"bound": 0}, {"bound": 1.5}, {"bound": True}, {"filter": 1}, {"filter": -0.1}, {"bound": None}]
)
def test_bounds_outside_their_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"Compression\({name}="):
        Compression(**wrong)


def test_sums_are_not_compressed():
    model, how = network(), Communication(compress=HOW)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with pytest.raises(ValueError, match=r"compress=\.\.\.\) is for what owners send"):
        mkor_fx.compile_step(model, functional.mse_loss, optimizer, RULE, communication=how)
    with pytest.raises(ValueError, match=r"compress=\.\.\.\) is for what owners send"):
        mkor_fx.compile(model, RULE, communication=how)
    with pytest.raises(ValueError, match=r"Communication\(compress=8\): must be a mkor_fx.Compression"):
        Communication(compress=8)
