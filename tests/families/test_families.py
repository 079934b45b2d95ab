"""Every family: its parameters' roles, one program, falling losses; its trajectory beside the hook-based reference."""

import copy
from pathlib import Path

import pytest
import torch
from catalogue import FAMILIES
from family import loss_of, made, roles, summary
from test_lockstep import reference_for

import mkor_fx
from mkor_fx import MKOR

#: in the nightly run alone: more of a kind that another family here stands for
MORE = ("Qwen2-MoE", "GPT-OSS", "Mixtral, batched_mm", "RoBERTa", "ALBERT", "nanoGPT", "nn.TransformerEncoder")
NAMES = [pytest.param(name, marks=[pytest.mark.nightly] * (name in MORE)) for name in FAMILIES]
TABLE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.parametrize("name", NAMES)
def test_coverage_and_training(name):
    """20 steps on one batch, as the default rule and AdamW take them: one program, and the loss falls."""
    family = FAMILIES[name]
    model, batch = made(family)
    expected = family.expected(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = mkor_fx.compile_step(model, None, optimizer, backend="eager", rule=mkor_fx.MKOR.published())
    examples = batch()
    losses = [step(**examples).item() for _ in range(20)]
    print(f"\n{summary(family, model, step.coverage)}; loss {losses[0]:.3g} -> {losses[-1]:.3g}")
    assert step.compilations == 1 and step.skipped == 0
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and losses[-1] < 0.9 * losses[0]
    assert roles(step.coverage) == expected
    covered = summary(family, model, step.coverage)
    assert covered.uncovered == tuple(family.uncovered)
    assert family.uncovered or min(covered.share, covered.covered / covered.matrices) >= 0.95
    assert covered.row() in TABLE.read_text().splitlines(), "python tests/families/catalogue.py writes docs/families.md"


def distance(value, reference):
    """Relative, but for what is zero in exact arithmetic, as the bias of a softmax attention's keys remains."""
    return ((value - reference).norm() / reference.norm().clamp_min(1e-4)).item()


@pytest.mark.parametrize("name", NAMES)
def test_lockstep(name):
    """Three steps in float64, each on a new batch: losses, parameters and factors are the reference's."""
    family = FAMILIES[name]
    model, batch = made(family, torch.float64)
    twin = copy.deepcopy(model)
    family.plain(twin)
    own, other = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin))
    rule = MKOR.published(factor_dtype=torch.float64)
    reference = reference_for(twin, rule, other)
    step = mkor_fx.compile_step(model, None, own, rule, skip=family.hidden, backend="eager")
    for _ in range(3):
        examples = batch()
        loss = step(**examples)
        expected = loss_of(twin(**examples))
        expected.backward()
        reference.step()
        assert distance(loss, expected.detach()) <= family.tolerance
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert distance(p.detach(), q.detach()) <= family.tolerance, key
        state = step.mkor.state_dict()
        for key in state.keys() - {"step"}:
            assert distance(state[key], reference.state[key]) <= family.tolerance, key
    sites = [entry for entry in step.coverage.covered if not entry.bias_of]
    for entry in sites:  # one side may stay the identity: the gradients at a key projection sum to zero
        factors = [state[f"{entry.name}.{side}"] for side in entry.factors]
        moved = any(not torch.equal(factor, torch.eye(len(factor)).to(factor)) for factor in factors)
        assert moved == (entry.name not in family.still), entry.name
    assert sites
