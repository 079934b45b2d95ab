"""The knee-point schedule on losses whose knees are known."""

import math

import pytest
import torch
from torch import nn

from mkor_fx.optim import KneePointLR


def schedule(**options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    return optimizer, KneePointLR(optimizer, **{"rho": 0.0, "patience": 1, "delay": 0, **options})


def run(knee, losses):
    for loss in losses:
        knee.optimizer.step()
        knee.step(loss)


def test_an_exponential_has_its_knee_where_the_equation_says():
    optimizer, knee = schedule()
    run(knee, (math.exp(-0.05 * t) for t in range(40)))
    first = next(t for t in range(1, 40) if math.exp(-0.05 * t) * (math.exp(0.05) - 1) * t < 0.5 * (1 - math.exp(-0.05 * t)))
    assert first == 26 and knee.knees == [first + 1]  # the loss of step t is the t + 1st seen
    assert optimizer.param_groups[0]["lr"] == 0.5 and knee.get_last_lr() == [0.5]


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_a_line_has_none(rho):
    optimizer, knee = schedule(beta=0.99, rho=rho)
    run(knee, (100 - 0.5 * t for t in range(200)))
    assert knee.knees == [] and optimizer.param_groups[0]["lr"] == 1.0


def test_patience_and_the_least_rate():
    optimizer, knee = schedule(patience=10, factor=0.1, min_lr=0.05)
    run(knee, [2.0] + 30 * [1.0] + 30 * [0.0])
    assert knee.knees == [11, 33] and optimizer.param_groups[0]["lr"] == 0.05


def test_a_rate_below_the_least_stays():
    optimizer, knee = schedule(patience=10, min_lr=0.05)
    optimizer.param_groups[0]["lr"] = 0.01
    run(knee, [2.0] + 30 * [1.0])
    assert knee.knees == [11] and optimizer.param_groups[0]["lr"] == 0.01


def test_noise_is_averaged_away():
    generator = torch.Generator().manual_seed(0)
    losses = [10 - 0.01 * t + 0.1 * float(torch.randn((), generator=generator)) for t in range(400)]
    nervous, calm = schedule()[1], schedule(rho=0.99, patience=100)[1]
    run(nervous, losses)
    run(calm, losses)
    assert nervous.knees and not calm.knees


def test_a_loss_is_looked_at_later_and_tensors_are_taken():
    losses = [torch.tensor(math.exp(-0.05 * t)) for t in range(40)]
    (_, at_once), (_, later) = schedule(), schedule(delay=3)
    run(at_once, losses)
    run(later, losses)
    assert later.knees == [at_once.knees[0] + 3]


def test_what_is_not_finite_is_passed_over_and_a_tensor_rate_stays_one():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=torch.tensor(1.0))
    rate = optimizer.param_groups[0]["lr"]
    knee = KneePointLR(optimizer, rho=0.0, patience=1, delay=0)
    run(knee, [1.0, math.nan, math.inf, 0.5, 0.5])
    assert knee.knees == [5] and optimizer.param_groups[0]["lr"] is rate and rate == 0.5


def test_it_resumes_where_it_was():
    losses = [math.exp(-0.05 * t) for t in range(90)]
    _, whole = schedule(rho=0.5, delay=2)
    run(whole, losses)
    optimizer, first = schedule(rho=0.5, delay=2)
    run(first, losses[:20])
    _, second = schedule(rho=0.5, delay=2)
    second.optimizer.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    run(first, losses[20:])
    run(second, losses[20:])
    assert second.knees == first.knees == whole.knees != []
    assert second.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factor": 1.0}, r"KneePointLR\(factor=1\.0\): must lie in \(0, 1\)"),
        ({"rho": 1.0}, r"KneePointLR\(rho=1\.0\): the weight of the old average"),
        ({"patience": 0}, r"KneePointLR\(patience=0\): must be an integer, 1 or more"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        schedule(**options)


def test_without_a_loss_it_says_so():
    with pytest.raises(TypeError, match=r"pass the loss of this step"):
        schedule()[1].step()
