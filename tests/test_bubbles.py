"""A refresh in the bubbles of a pipeline: the schedule alone (PipeFisher)."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import mkor_fx
from mkor_fx import KFAC, Pipeline
from mkor_fx.show.bubbles import LayerWork, fill, pipeline_step

SHAPES = [(1, 1), (1, 5), (4, 1), (4, 4), (4, 9), (7, 3)]


def layers_of(stages, count=2, curvature=(0.1, 0.2), sync=(0.05, 0.05), inverse=(0.3, 0.4)):
    return {s: [LayerWork(f"{s}.{i}", curvature, sync, inverse) for i in range(count)] for s in range(stages)}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("S", "M"), SHAPES)
def test_a_step_takes_as_long_as_its_closed_form(schedule, S, M):
    items = pipeline_step(Pipeline(stages=S, micro_batches=M, schedule=schedule), 1.0, 2.0)
    assert max(item.end for item in items) == (M + S - 1) * 3.0
    filled = fill(Pipeline(stages=S, micro_batches=M, schedule=schedule), 1.0, 2.0, {})
    assert filled.utilisation == filled.utilisation_without == pytest.approx(M / (M + S - 1))
    assert (filled.steps, filled.appended, filled.step) == (1, 0, (M + S - 1) * 3.0)


@pytest.mark.parametrize("S", [2, 4, 6, 8])
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_two_directions_leave_smaller_bubbles(S, backward):
    items = pipeline_step(Pipeline(stages=S, micro_batches=S, schedule="chimera"), 1.0, backward)
    assert max(item.end for item in items) == S + (2 * S - 2) * backward
    assert all(sum(i.rank == rank for i in items) == 2 * S for rank in range(S))


def test_with_fewer_activations():
    """As many forwards ahead of their backwards as there are stages behind and the own one; with gpipe all."""
    for schedule, most in (("gpipe", [8, 8, 8]), ("1f1b", [3, 2, 1])):
        items = pipeline_step(Pipeline(stages=3, micro_batches=8, schedule=schedule), 1.0, 2.0)
        for stage in range(3):
            lane = sorted((i for i in items if i.rank == stage), key=lambda i: i.start)
            held = itertools.accumulate(1 if i.kind == "forward" else -1 for i in lane)
            assert max(held) == most[stage]


def assert_sound(filled, layers, M, forward=1.0, backward=2.0):
    S = filled.pipeline.stages
    ends = {}
    for rank in range(S):
        lane = filled.lane(rank)
        assert all(b.start >= a.end - 1e-9 for a, b in itertools.pairwise(lane))  # no two at once
    passes = [i for i in filled.items if i.kind in ("forward", "backward")]
    first = {(i.of, i.kind, i.micro_batch): i for i in passes if i.start < filled.step}
    once = [i for i in filled.items if i.kind not in ("forward", "backward")]
    for item in once:
        assert (item.kind, item.of, item.micro_batch, item.rank) not in ends
        ends[item.kind, item.of, item.micro_batch, item.rank] = item
    stage_of = {layer.name: stage for stage, own in layers.items() for layer in own}
    for item in once:
        kind, side = item.kind.split()
        mine = [other for key, other in ends.items() if key[1] == item.of and key[3] == item.rank and key[0].endswith(side)]
        if kind == "curvature":
            event = first[f"stage {stage_of[item.of]}", "forward" if side == "R" else "backward", item.micro_batch]
            assert item.start >= event.end - 1e-9
        else:
            first_of = ("curvature", "sync") if kind == "inverse" else ("curvature",)
            assert all(item.start >= other.end - 1e-9 for other in mine if other.kind.split()[0] in first_of)
    per_layer = {"curvature R": M, "curvature L": M, "sync R": 1, "sync L": 1, "inverse R": 1, "inverse L": 1}
    for layer, (kind, count) in itertools.product(stage_of, per_layer.items()):
        assert sum(i.kind == kind and i.of == layer for i in once) == count


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("S", "M"), SHAPES)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_everything_is_done_once_in_order_and_never_two_at_a_time(schedule, S, M, count):
    layers = layers_of(S, count)
    filled = fill(Pipeline(stages=S, micro_batches=M, schedule=schedule), 1.0, 2.0, layers)
    assert_sound(filled, layers, M)
    work = count * (M * 0.3 + 0.1 + 0.7)
    busy = S * (filled.steps * M * 3.0 + work)
    assert filled.utilisation == pytest.approx(busy / (S * max(filled.end, filled.steps * filled.step)))


def test_two_directions_fill_alike():
    layers = layers_of(4, 1)
    filled = fill(Pipeline(stages=4, micro_batches=4, schedule="chimera"), 1.0, 2.0, layers)
    for rank in range(4):
        lane = filled.lane(rank)
        assert all(b.start >= a.end - 1e-9 for a, b in itertools.pairwise(lane))
        kinds = [item.kind for item in lane]
        assert kinds.count("curvature R") == 4 and kinds.count("inverse L") == 2  # of two stages


@pytest.mark.parametrize(("duration", "steps", "start"), [(1.4, 1, 2.5), (1.45, 2, 7.0), (2.8, 2, 7.0), (2.9, 1, 6.0)])
def test_a_gap_takes_what_fits_with_five_percent_to_spare(duration, steps, start):
    """Two stages, one micro-batch: the first waits from 1 to 4 for its backward, [4, 6]. Statistics take 1, their sum 0.5:
    1.5 is left in the first step, 3 in further ones, and what does not fit there either goes behind the first."""
    layers = {0: [LayerWork("0", (1.0, 0.0), (0.5, 0.0), (duration, 0.0))]}
    filled = fill(Pipeline(stages=2, micro_batches=1), 1.0, 2.0, layers)
    (inverse,) = (item for item in filled.items if item.kind == "inverse R")
    assert (filled.step, filled.steps, inverse.start) == (6.0, steps, start)
    assert filled.appended == (start == 6.0)


def test_without_bubbles_the_refresh_is_at_the_end_of_the_step():
    filled = fill(Pipeline(stages=1, micro_batches=3), 1.0, 2.0, layers_of(1, 2))
    work = 2 * (3 * 0.3 + 0.1 + 0.7)
    assert (filled.steps, filled.appended, filled.step) == (1, 2 * (6 + 4), 9.0)
    assert filled.end == pytest.approx(9.0 + work) and filled.utilisation == pytest.approx(1.0)


def test_small_pieces_fill_all_bubbles():
    """Up to the five percent, the last piece of a gap and what waits for a forward: of 4 stages and 4 micro-batches 43 % are
    bubbles."""
    layers = {s: [LayerWork(f"{s}.{i}", (0.0, 0.0), (0.0, 0.0), (0.01, 0.0)) for i in range(3600)] for s in range(4)}
    filled = fill(Pipeline(stages=4, micro_batches=4), 1.0, 2.0, layers)
    assert filled.utilisation_without == pytest.approx(4 / 7)
    assert filled.steps == 5 and filled.appended == 0
    work = 4 * (5 * 12 + 36)
    assert filled.utilisation == pytest.approx(work / (4 * 5 * 21))


def simulated(**options):
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())))
    x = torch.randn(32, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"rule": KFAC(), "world_size": 8, **options}
    return mkor_fx.simulate(model, x, x, loss_fn=functional.mse_loss, optimizer=optimizer, **options)


def test_a_simulation_is_laid_out_on_stages():
    seen = simulated(pipeline=Pipeline(stages=2, micro_batches=4, schedule="1f1b"))
    filled = seen.filled
    phases = seen.phases()
    assert filled.step == pytest.approx(5 * (phases["forward"] + phases["backward"]) / 2)
    layers = {s: [LayerWork(f"{2 * i}.weight", (0, 0), (0, 0), (0, 0)) for i in (2 * s, 2 * s + 1)] for s in range(2)}
    assert_sound(filled, layers, 4)
    inversions = sum(i.duration for i in filled.items if i.kind.startswith("inverse"))
    assert inversions == pytest.approx(sum(one.derive_ms for one in seen.inversions))
    curvature = sum(i.duration for i in filled.items if i.kind.startswith("curvature"))
    assert curvature == pytest.approx(4 * phases["statistics"])
    assert "1f1b of 2 stages and 4 micro-batches (estimated)" in str(seen)
    assert simulated().filled is None


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ValueError, match=r"4 weights are preconditioned, fewer than 5 stages"):
        simulated(pipeline=Pipeline(stages=5, micro_batches=4), world_size=10)
    with pytest.raises(ValueError, match=r"pipeline=3: must be a mkor_fx\.Pipeline"):
        simulated(pipeline=3)
    with pytest.raises(ValueError, match=r"refresh=False"):
        simulated(pipeline=Pipeline(stages=2, micro_batches=4), refresh=False)
    with pytest.raises(ValueError, match=r"world_size=8: .* 3 stages"):
        simulated(pipeline=Pipeline(stages=3, micro_batches=4))


@pytest.mark.parametrize(
    "wrong", [{"stages": 0}, {"micro_batches": True}, {"schedule": "zb"}, {"schedule": "chimera", "stages": 3},
              {"schedule": "chimera", "micro_batches": 6}]
)  # fmt: skip
def test_pipelines_outside_their_range_are_named(wrong):
    with pytest.raises(ValueError, match=r"Pipeline\("):
        Pipeline(**{"stages": 4, "micro_batches": 4, **wrong})
