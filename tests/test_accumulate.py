"""A batch that is run in parts takes the step of the whole."""

import processes
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, MKOR, Communication, Eva, Hybrid

#: whose statistics draw no signs, so that parts add up to the batch
RULES = {
    "none": None,
    "mkor, gradient": MKOR(statistic="gradient", factor_dtype=torch.float64),
    "published": MKOR.published(factor_dtype=torch.float64),
    "kfac": KFAC(derive_every=2),
    "eva": Eva(decay=0.5, graft=None),
}


def build(rows=10, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
    return model, [(torch.randn(rows, 6, dtype=dtype), torch.randn(rows, 3, dtype=dtype)) for _ in range(5)]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def train(rule, parts, rank=0, size=1, rows=10, **options):
    model, batches = build(rows)
    options = {"refresh_every": 2, "backend": "eager", **options}
    step = mkor_fx.compile_step(model, mse_loss, adamw(model), rule, accumulate=parts, **options)
    losses = torch.stack([step(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in batches])
    return losses, {**model.state_dict(), **step.mkor.state_dict(full=True)}, step


def same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for key, tensor in expected[1].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("parts", [2, 3, 20])
@pytest.mark.parametrize("name", RULES)
def test_parts_are_the_batch(name, parts):
    """Even ones, an uneven last one (4, 4, 2), and no more than there are rows."""
    rule = RULES[name]
    *found, step = train(rule, parts, clip_norm=0.7)
    same(found, train(rule, 1, clip_norm=0.7))
    assert set(step.variants) == (
        {"plain", "part without statistics"} if rule is None else {"part", "refresh", "part without statistics", "reuse"}
    )


@pytest.mark.parametrize(
    "options", [{"refresh_every": 7}, {"refresh_every": 4, "refresh_phases": 2}], ids=["together", "in turns"]
)
def test_parts_know_what_is_due_behind_steps_in_first_order(options):
    """It comes back where most of a window, with its refresh, has gone by without the rule."""

    def run(parts):
        model, batches = build()
        hybrid = Hybrid(RULES["published"], window=3, patience=1, threshold=0.99, cost=0.1)
        slow = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = mkor_fx.compile_step(model, mse_loss, slow, hybrid, accumulate=parts, backend="eager", **options)
        losses = torch.stack([step(*batches[0]) for _ in range(26)])
        assert "tries second order" in {what for _, what in step.mkor.switch.history}
        return losses, {**model.state_dict(), **step.mkor.state_dict(full=True)}

    same(run(3), run(1))


def test_signs_are_those_of_micro_batches_in_a_loop():
    rule = MKOR(factor_dtype=torch.float64)
    losses, state, _ = train(rule, 2)
    model, batches = build()
    compiled, optimizer = mkor_fx.compile(model, rule, refresh_every=2, backend="eager"), adamw(model)
    for x, y in batches:
        optimizer.zero_grad()
        for part in zip(x.chunk(2), y.chunk(2), strict=True):
            (mse_loss(compiled(part[0]), part[1]) / 2).backward()
        optimizer.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(state[name], param.detach(), rtol=1e-9, atol=1e-9)
    assert losses.isfinite().all()


def on_a_rank(rank, size, name, options):
    return train(RULES[name], 2, rank, size, rows=12, communication=Communication(padding=9.0), **options)[:2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kfac", {"placement": "owner"}),
        pytest.param("published", {"clip_norm": 0.5}, marks=pytest.mark.nightly),
    ],
)
def test_ranks_send_once_a_step(name, options):
    for found in processes.values(on_a_rank, 2, name, options):
        same(found, train(RULES[name], 1, rows=12, **{k: v for k, v in options.items() if k != "placement"}), 1e-9)


def test_only_the_last_part_sends_and_steps():
    step = train(RULES["published"], 2)[2]
    part = str(step.variants["part"]["schedule"].graph)
    assert "precondition" not in part and "mkor_optimizer" not in part and "precondition" in str(
        step.variants["refresh"]["schedule"].graph
    )


def test_a_part_that_is_not_finite_skips_the_step_and_leaves_nothing_behind():
    model, batches = build()
    rule = RULES["published"]
    step = mkor_fx.compile_step(model, mse_loss, adamw(model), rule, accumulate=2, backend="eager")
    step(*batches[0])
    before = {key: t.clone() for key, t in {**model.state_dict(), **step.mkor.state_dict()}.items()}
    x = batches[1][0].clone()
    x[0] = torch.inf
    step(x, batches[1][1])
    after = {**model.state_dict(), **step.mkor.state_dict()}
    assert step.skipped == 1 and all(torch.equal(before[key], after[key]) for key in before if key != "step")
    with pytest.raises(TypeError, match="the last positional argument is the target"):
        step(batches[0][0])
    other, _ = build()
    twin = mkor_fx.compile_step(other, mse_loss, adamw(other), rule, accumulate=2, backend="eager")
    twin(*batches[0])
    assert torch.equal(step(*batches[1]), twin(*batches[1]))


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self):
        return self.weight.square().sum()


class Normalized(nn.Module):
    """With what is not cut: a table, and a number."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, batch, table, scale=1.0):
        return self.layer(self.norm(batch["x"])) * scale + table.sum()


def test_what_has_no_rows_goes_whole_and_buffers_follow_the_parts():
    torch.manual_seed(0)
    model = Normalized()
    step = mkor_fx.compile_step(model, mse_loss, adamw(model), MKOR(), accumulate=2, backend="eager")
    assert torch.isfinite(step({"x": torch.randn(8, 6)}, torch.ones(3), torch.randn(8, 3), scale=2.0))
    assert model.norm.num_batches_tracked == 2
    with pytest.raises(ValueError, match="called without a tensor that has one"):
        mkor_fx.compile_step(alone := Alone(), None, adamw(alone), None, accumulate=2, backend="eager")()


def test_half_precision_keeps_the_dtype_of_the_loss():
    model, batches = build(dtype=torch.bfloat16)
    step = mkor_fx.compile_step(model, mse_loss, adamw(model), MKOR(), accumulate=2, backend="eager")
    assert step(*batches[0]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate": 0}, r"accumulate=0: must be an integer of at least 1"),
        ({"accumulate": True}, r"accumulate=True: must be an integer"),
        ({"accumulate": 2, "stale": 1}, r"accumulate=2 runs a batch in parts, which cannot have stale=1"),
        ({"accumulate": 2, "return_outputs": True}, r"cannot have return_outputs=True"),
    ],
)
def test_bad_options_are_refused(options, said):
    model, _ = build()
    with pytest.raises(ValueError, match=said):
        mkor_fx.compile_step(model, mse_loss, adamw(model), MKOR.published(), **options)
