"""With owners each rank keeps and works on its part of the factors, and the training is the same."""

import re

import processes
import pytest
import torch
import torch.distributed as dist
from test_distributed import assert_bitwise, assert_close, batches_of, even, share, train
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, MKOR, Communication
from mkor_fx.doors.agreement import keepers_of
from mkor_fx.options import Options
from mkor_fx.passes.order.collectives import describe, starts
from mkor_fx.passes.write.placement import Load, assign, lay_out

# ---- who owns what ----------------------------------------------------------------------------------------------------


def test_work_and_bytes_are_balanced():
    sizes = {"qkv": (16, 48), "out": (16, 16), "up": (16, 64), "down": (64, 16)}
    loads = {f"{i}.{n}": Load(o * i_ * (o + i_), 4 * o * i_) for i in range(6) for n, (o, i_) in sizes.items()}
    owners = assign(loads, 4, 0.15)
    assert set(owners.values()) == {0, 1, 2, 3}
    for at in range(2):
        held = [sum(load[at] for name, load in loads.items() if owners[name] == rank) for rank in range(4)]
        assert max(held) <= 1.15 * sum(held) / 4
    assert owners == assign(dict(loads), 4, 0.15)


def test_a_weight_larger_than_a_share_stays_everywhere():
    loads = {"embedding": Load(10, 4000), **{f"{i}": Load(100, 400) for i in range(8)}}
    owners = assign(loads, 4, 0.15)
    assert owners.pop("embedding") is None
    assert sorted(owners.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert assign(loads, 4, float("inf"))["embedding"] is not None


def test_owners_that_are_known_stay():
    first = assign({"a": Load(5, 5), "b": Load(5, 5)}, 2, 1.0)
    more = assign({"c": Load(9, 9), "a": Load(5, 5), "b": Load(5, 5)}, 2, 1.0, first)
    assert {name: more[name] for name in first} == first and set(first.values()) == {0, 1}


@pytest.mark.parametrize("length", [1, 3, 7, 100])
def test_layout_sends_every_element_once(length):
    tensors = [(7, 5, 0), (2, 4, 1), (3, 1, 0), (9, 11, 2), (4, 6, 1)]
    chunks = lay_out(tensors, 4, length)
    sent = [(part.key, i, rank) for c in chunks for rank in range(4) for part in c.parts[rank]
            for i in range(part.start, part.stop)]  # fmt: skip
    assert sorted(sent) == sorted((key, i, owner) for key, numel, owner in tensors for i in range(numel))
    assert all(chunk.length == length for chunk in chunks[:-1]) and sum(c.length for c in chunks) == 11


# ---- training ---------------------------------------------------------------------------------------------------------


def train_owned(rank, size, name, rule, steps, placement, **options):
    model, loss_fn, batches = batches_of(name, 8, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"refresh_every": 2, "backend": "eager", **options}
    step = mkor_fx.compile_step(model, loss_fn, optimizer, rule, placement=placement, **options)
    losses = [step(*share(batch, even(8, size), rank)) for batch in batches]
    own, full = step.mkor.state_dict(), step.mkor.state_dict(full=True)
    state = {**model.state_dict(), **{f"factor {k}": v for k, v in full.items()}}
    for key, param in model.named_parameters():
        state |= {f"{key} {k}": t for k, t in optimizer.state.get(param, {}).items()}
    program = step.variants["refresh"]["schedule"].graph
    graph = {"lines": describe(program), "code": step.variants["refresh"].code}
    graph |= {"bytes": [(s.target.__name__, s.args[0].meta["val"].nbytes, {m.kind for m in s.meta["mkor_messages"]})
                        for s in starts(program)]}  # fmt: skip
    return {key: t.detach().clone() for key, t in state.items()}, torch.stack(losses), own, step.mkor.owners, graph


EXACT = MKOR.published(form="exact", statistic="mean+gradient", bias="joint", clamp=0.05)
CLIPPED = KFAC(damping=0.1, derive_every=2, graft=None, kl_clip=1e-3)
CASES = {
    "mlp-4": ("mlp", 4, MKOR.published(), Communication(padding=9.0)),
    "mlp-4-half": ("mlp", 4, CLIPPED, Communication(padding=9.0), 0.5),
    "gpt-4-half": ("gpt", 4, MKOR(), Communication(gradient_bytes=3000), 0.5),
    "gpt-2-clipped": ("gpt", 2, CLIPPED, Communication(padding=9.0)),
    "gpt-2": ("gpt", 2, MKOR.published(), Communication(gradient_bytes=3000)),
    "cnn-2": ("cnn", 2, MKOR.published(), Communication(padding=9.0, average="rows", check_replicas_every=2)),
    "in_out-2": ("in_out", 2, EXACT, Communication()),
}


SLOW = ("in_out-2", "cnn-2", "gpt-2-clipped", "gpt-4-half", "gpt-2", "mlp-4")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.nightly] * (case in SLOW)) for case in CASES]
)
def test_owners_train_as_replicas_do(case):
    name, size, rule, _, *share = CASES[case]
    columns = round(1 / share[0]) if share else size
    whole, whole_losses = train(0, 1, name, rule, 5)
    parts = processes.values(train_owned_case, size, case)
    assert_bitwise([state for state, *_ in parts])
    if name != "cnn" and not rule.draws:  # a batch norm sees a share of the batch, each rank has its signs
        assert_close(parts[0][0], whole, 1e-5)
        assert_close({"losses": parts[-1][1]}, {"losses": whole_losses}, 1e-5)
    else:
        replicas = processes.values(train_owned, size, name, rule, 5, 1.0)
        assert_close(parts[0][0], replicas[0][0], 1e-5)
    owners = parts[0][3]
    assert set(owners.values()) - {None} == set(range(min(columns, len(owners))))
    for rank, (state, _, own, ranks_owners, graph) in enumerate(parts):
        assert ranks_owners == owners
        assert graph["lines"] == parts[0][4]["lines"]
        names = {key.rpartition(".")[0] for key in own} - {""}
        assert names == {name for name, owner in owners.items() if owner in (None, rank % columns)}
        assert all(torch.equal(own[key], state[f"factor {key}"]) for key in own)


def train_owned_case(rank, size, case):
    name, _, rule, communication, *share = CASES[case]
    return train_owned(rank, size, name, rule, 5, *(share or ["owner"]), communication=communication)


def train_deep(rank, size, placement):
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(24, 24), nn.Tanh())), nn.LayerNorm(24))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"communication": Communication(gradient_bytes=6000), "backend": "eager", "placement": placement}
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, MKOR.published(), **options)
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(rank))
    step(x, x)
    program = step.graphs["schedule"].graph
    sent = [(str(s.target), s.args[0].meta["val"].nbytes, s.meta["mkor_messages"][0].kind) for s in starts(program)]
    products = sum("mkor_fx.precondition" in str(node.target) for node in program.nodes)
    return sent, products, sum(t.nbytes for t in step.mkor.tensors().values())


@pytest.mark.parametrize(
    ("size", "placement", "columns"), [(2, "owner", 2), pytest.param(4, "owner", 4, marks=pytest.mark.nightly), (4, 0.5, 2)]
)
def test_volume_memory_and_work(size, placement, columns):
    replicas = processes.values(train_deep, 1, "replicated")[0]
    parts = processes.values(train_deep, size, placement)
    gradients = 8 * (24 * 24 + 24) * 4
    for sent, products, held in parts:
        assert sent == parts[0][0]
        scattered = [n for op, n, kind in sent if "reduce_scatter" in op]
        gathered = [n * columns for op, n, kind in sent if "all_gather" in op]
        again = [n * columns for op, n, kind in sent if kind == "column"]
        assert len(scattered) == len(gathered) > 2 and len(again) == (len(scattered) if columns < size else 0)
        # what a rank sends: a reduce-scatter and an all-gather in its row, an all-reduce of a part in its column
        rows = size // columns
        sends = (sum(scattered) + sum(gathered)) * (columns - 1) / columns + 2 * sum(again) / columns * (rows - 1) / rows
        assert 1 <= sends / (2 * gradients * (size - 1) / size) <= 1.15
        # an all-reduce of n bytes is a reduce-scatter of n and an all-gather of n
        assert 2 * gradients <= sum(scattered) + sum(gathered) <= 1.15 * 2 * gradients
        reduced = sum(n for op, n, kind in sent if "all_reduce" in op and kind == "gradient")
        assert reduced == 2 * 24 * 4  # the norm's
        assert held == replicas[2] / columns
        assert products == replicas[1] / columns  # 8 alike layers


def count_derivations(rank, size, placement):
    rule, done = KFAC(derive_every=2, inverse="eigen"), []
    found = type("Counted", (KFAC,), {"derive": lambda self, state: done.append(len(state)) or KFAC.derive(self, state)})
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(24, 24), nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"communication": Communication(padding=9.0), "backend": "eager", "placement": placement}
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, found(**vars(rule)), **options)
    counts, broadcast, sent = [], dist.broadcast, []
    dist.broadcast = lambda t, **given: sent.append(t.numel()) or broadcast(t, **given)
    for i in range(5):
        done.clear()
        sent.clear()
        step(*torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(i)))
        counts.append((len(done), sum(sent)))
    return counts, step.mkor.state_dict(full=True)


@pytest.mark.parametrize(("size", "placement", "first", "later"), [
    (2, "replicated", 4, 2), (2, "owner", 2, 2), (4, 0.5, 2, 1), (4, "replicated", 4, 1),
])  # fmt: skip
def test_ranks_that_keep_the_same_derive_in_turn(size, placement, first, later):
    """From the second time on, what one has derived is sent to the others: two bases, their eigenvalues, a flag."""
    ranks = processes.values(count_derivations, size, placement)
    assert [[derived for derived, _ in counts] for counts, _ in ranks] == [[first, 0, later, 0, later]] * size
    sent = 0 if later == first else first * (2 * (24 * 24 + 24) + 1)
    assert [[numbers for _, numbers in counts[1:]] for counts, _ in ranks] == [[0, sent, 0, sent]] * size
    alone = processes.values(count_derivations, 1, "replicated")[0][1]
    assert_bitwise([state for _, state in ranks])
    for key in ("L", "R"):
        torch.testing.assert_close(ranks[0][1][f"0.weight.{key}"], alone[f"0.weight.{key}"], rtol=1e-4, atol=1e-6)


def test_a_share_has_to_divide_the_ranks():
    assert [keepers_of(share, 6) for share in (1, 0.5, 1 / 3, 1 / 6, "owner", "replicated")] == [6, 3, 2, 1, 1, 6]
    with pytest.raises(ValueError, match=r"placement=0\.4: 2\.4 of 6 ranks would .* use one of 1/6, 2/6, 3/6, 6/6"):
        keepers_of(0.4, 6)
    for wrong in (0, -0.5, 1.5, True, None):
        with pytest.raises(ValueError, match=r"must be 'replicated', 'owner', 'local', or the share of ranks"):
            Options(placement=wrong)


class Overflowing(nn.Module):
    """Where the first input is zero, the gradient of the first layer alone is not finite; the loss is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.second(h) + (h * x[0, 0]).abs().sum().sqrt()


def overflow(rank, size):
    torch.manual_seed(0)
    model = Overflowing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(
        model, functional.mse_loss, optimizer, placement="owner", communication=Communication(padding=9.0), backend="eager"
    )
    states = []
    for i in range(4):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * i + rank))
        if i == 2 and rank == 1:
            x[0, 0] = 0.0
        assert torch.isfinite(step(x, x[:, :4]))
        state = {**model.state_dict(), **step.mkor.state_dict(full=True)}
        del state["step"]
        states.append((step.skipped, {key: t.clone() for key, t in state.items()}))
    assert sorted(step.mkor.owners.values()) == [0, 1]
    return states


def test_all_ranks_skip_a_step_that_one_owner_sees():
    ranks = processes.values(overflow, 2)
    for states in ranks:
        assert [skipped for skipped, _ in states] == [0, 0, 1, 1]
        assert_bitwise([states[1][1], states[2][1]])
        assert any(not torch.equal(states[3][1][key], t) for key, t in states[2][1].items())
    for i in range(4):
        assert_bitwise([states[i][1] for states in ranks])


def train_compiled(rank, size):
    rule, communication = MKOR.published(max_factor=14), Communication(padding=9.0, gradient_bytes=1000)
    return train_owned(rank, size, "mlp", rule, 3, "owner", backend="inductor", communication=communication)


@pytest.mark.nightly
def test_compiled_owners_issue_alike():
    whole, _ = train(0, 1, "mlp", MKOR.published(max_factor=14), 3)
    parts = processes.values(train_compiled, 2)
    assert_bitwise([state for state, *_ in parts])
    assert_close(parts[0][0], whole, 1e-5)
    calls = r"^ *(?!#).*_c10d_functional\.(all_reduce|reduce_scatter_tensor|all_gather_into_tensor)_?\.default\("
    issued = [re.findall(calls, parts[rank][4]["code"][0], re.MULTILINE) for rank in range(2)]
    assert issued[0] == issued[1] and issued[0].count("reduce_scatter_tensor") > 1
    assert len(issued[0]) == len(parts[0][4]["lines"])


def test_one_process_owns_everything():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mkor_fx.compile_step(model, functional.mse_loss, optimizer, placement="owner", backend="eager")
    step(torch.ones(5, 4), torch.zeros(5, 3))
    assert step.mkor.owners == {"weight": None}
    with pytest.raises(ValueError, match="placement='shared': must be 'replicated', 'owner', 'local', or the share of"):
        mkor_fx.compile_step(model, functional.mse_loss, optimizer, placement="shared")
