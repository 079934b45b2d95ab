"""Random programs agree with their reference, and at least nine in ten of their supported weights are sites."""

from dataclasses import replace

import pytest
from fuzz import check
from fuzz.program import Part, draw

from mkor_fx import MKOR


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 50), marks=pytest.mark.nightly)], ids=str)
def test_random_programs_agree_and_declining_does_not_pass_for_being_right(seeds):
    outcomes = {seed: check.check(draw(seed)) for seed in seeds}
    failures = [f"seed {s}: {o.failure}\n{o.detail}\n{o.program}" for s, o in outcomes.items() if o.failure]
    assert not failures, "\n\n".join(failures)
    supported = sum(len(outcome.supported) for outcome in outcomes.values())
    missed = [reason for outcome in outcomes.values() for reason in outcome.missed.values()]
    assert supported >= len(seeds)
    assert len(missed) <= 0.1 * supported, missed
    assert sum(bool(outcome.refused) for outcome in outcomes.values()) <= 2


PLAN = replace(
    draw(0), parts=(Part("Linear", 1), Part("line", 0), Part("Linear", 2)), door="step", integers=False, autocast=False,
    frozen=0.0, shape=(3,), rule={"form": "forgetful", "gamma": 0.77}, refresh_every=1, sizes=(3, 3), dynamic=None,
)  # fmt: skip


def test_it_compiles_with_inductor():
    outcome = check.check(PLAN, backend="inductor")
    assert not outcome.failure and len(outcome.sites) == 2, outcome


def test_wrong_statistics_are_found(monkeypatch):
    right = MKOR.summarize
    monkeypatch.setattr(MKOR, "summarize", lambda rule, *rest: right(rule, *rest[:-1], 2 * rest[-1]))
    wrong = check.check(replace(PLAN, rule={**PLAN.rule, "gamma": 0.76}))  # traces are kept by rule
    assert wrong.failure == "direction of a site: linear", wrong


def test_rows_that_are_not_the_gradients_are_found(monkeypatch):
    monkeypatch.setattr(check, "rows", lambda env, operand, right=check.rows: 2 * right(env, operand))
    assert check.check(PLAN).failure.startswith("identity")
