"""Every family: its parameters' roles, one program, falling losses; its trajectory beside the hook-based reference."""

import copy
import itertools

import decoders
import encoders
import pytest
import torch
import vision
from family import loss_of, made, roles, summary
from test_lockstep import reference_for, relative

import mkor_fx
from mkor_fx import MKOR

FAMILIES = {family.name: family for part in (encoders, decoders, vision) for family in part.FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_coverage_and_training(name):
    """20 steps on one batch, as the default rule and AdamW take them: one program, and the loss falls."""
    family = FAMILIES[name]
    model, batch = made(family)
    expected = family.expected(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=family.lr)
    step = mkor_fx.compile_step(model, None, optimizer, backend="eager")
    examples = batch()
    losses = [step(**examples).item() for _ in range(20)]
    print(f"\n{summary(family, model, step.coverage)}; loss {losses[0]:.3g} -> {losses[-1]:.3g}")
    assert step.compilations == 1 and step.skipped == 0
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and losses[-1] < 0.9 * losses[0]
    assert roles(step.coverage) == expected
    covered = summary(family, model, step.coverage)
    assert covered.uncovered == tuple(family.uncovered)
    if not family.uncovered:
        assert covered.covered >= 0.95 * covered.matrices
        assert covered.covered_elements >= 0.95 * covered.elements


@pytest.mark.parametrize("name", FAMILIES)
def test_lockstep(name):
    """Three steps in float64, each on a new batch: losses, parameters and factors are the reference's."""
    family = FAMILIES[name]
    model, batch = made(family, torch.float64)
    twin = copy.deepcopy(model)
    own, other = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin))
    rule = MKOR(factor_dtype=torch.float64)
    reference = reference_for(twin, rule, other)
    step = mkor_fx.compile_step(model, None, own, rule, skip=family.hidden, backend="eager")
    for _ in range(3):
        examples = batch()
        loss = step(**examples)
        expected = loss_of(twin(**examples))
        expected.backward()
        reference.step()
        assert relative(loss, expected.detach()) <= family.tolerance
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert relative(p.detach(), q.detach()) <= family.tolerance, key
        state = step.mkor.state_dict()
        assert state.keys() - {"step"} <= reference.state.keys()
        for key in state.keys() - {"step"}:
            assert relative(state[key], reference.state[key]) <= family.tolerance, key
    watched = {entry.name for entry in step.coverage.covered if not entry.bias_of}
    assert watched or family.hidden
    assert all(torch.equal(reference.state[f"{n}.L"], torch.eye(len(reference.state[f"{n}.L"])).double()) is False
               for n in itertools.islice(sorted(watched), 1))
