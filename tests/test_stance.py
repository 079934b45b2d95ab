"""torch.compiler.set_stance and the modes with CUDA graphs: each respected, or refused with nothing changed."""

import re

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import MKOR

DOORS = ("compile_step", "compile")
SKIPPED = "does not precondition 0.weight, 2.weight .* set_stance"


class Run:
    def __init__(self, door):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        if door == "compile_step":
            self.compiled = mkor_fx.compile_step(self.model, mse_loss, self.optimizer, MKOR(), backend="eager")
        else:
            self.compiled = mkor_fx.compile(self.model, MKOR(), backend="eager")
        self.door = door

    def step(self, rows=8):
        x, y = torch.ones(rows, 6), torch.ones(rows, 3)
        if self.door == "compile_step":
            return self.compiled(x, y)
        self.optimizer.zero_grad()
        mse_loss(self.compiled(x), y).backward()
        return self.optimizer.step()

    def weight(self):
        return self.model[0].weight.detach().clone()

    def steps_of_the_rule(self):
        return self.compiled.mkor.step


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_compiled_step_is_not_taken_uncompiled(stance):
    run = Run("compile_step")
    before = run.weight()
    with torch.compiler.set_stance(stance), pytest.raises(RuntimeError, match=r"without being compiled.*set_stance"):
        run.step()
    assert torch.equal(before, run.weight()) and run.steps_of_the_rule() == 0
    run.step()
    assert not torch.equal(before, run.weight()) and run.steps_of_the_rule() == 1


def test_nor_by_another_backend():
    run = Run("compile_step")
    before = run.weight()
    refused = pytest.raises(RuntimeError, match=r"did not run, and nothing was trained: .*set_stance")
    with torch.compiler.set_stance(force_backend="eager"), refused:
        run.step()
    assert torch.equal(before, run.weight()) and run.steps_of_the_rule() == 0


def test_what_is_compiled_already_runs():
    run = Run("compile_step")
    run.step()
    for stance in ("eager_on_recompile", "fail_on_recompile"):
        before = run.weight()
        with torch.compiler.set_stance(stance):
            run.step()
        assert not torch.equal(before, run.weight())


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_the_drop_in_door_says_that_the_rule_has_no_part(stance):
    run = Run("compile")
    before = run.weight()
    with torch.compiler.set_stance(stance), pytest.warns(UserWarning, match=SKIPPED):
        run.step()
    assert not torch.equal(before, run.weight())


@pytest.mark.parametrize("stance", ["eager_then_compile", "aot_eager_then_compile"])
def test_a_first_call_that_torch_may_want_eager(stance):
    """Which calls these are is torch's choice: each is refused, or a whole step."""
    run, taken = Run("compile_step"), 0
    with torch.compiler.set_stance(stance):
        for rows in (8, 4):
            before = run.weight()
            try:
                run.step(rows)
                taken += 1
            except RuntimeError as error:
                assert re.search("without being compiled|did not run, and nothing was trained", str(error))
                assert torch.equal(before, run.weight())
            else:
                assert not torch.equal(before, run.weight())
            assert run.steps_of_the_rule() == taken
    assert taken > 0


@pytest.mark.parametrize("door", DOORS)
def test_a_compilation_that_is_forbidden(door):
    run = Run(door)
    before = run.weight()
    refused = pytest.raises(RuntimeError, match=r"forbids to compile, and this call needs a program that is not there yet")
    with torch.compiler.set_stance("fail_on_recompile"), refused:
        run.step()
    assert torch.equal(before, run.weight()) and run.steps_of_the_rule() == 0
    run.step()
    before = run.weight()
    with torch.compiler.set_stance("fail_on_recompile"):
        run.step()
        assert not torch.equal(before, run.weight())
        before = run.weight()
        with pytest.raises(RuntimeError, match=r"needs another program, since .*expected 8, actual 5. Nothing was changed"):
            run.step(5)
    assert torch.equal(before, run.weight()) and run.steps_of_the_rule() == 2


@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}]
)
def test_cuda_graphs_are_refused_of_a_step_and_left_to_torch_elsewhere(options):
    model = nn.Sequential(nn.Linear(6, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    (asked,) = options
    with pytest.raises(ValueError, match=rf"compile_step with {asked}=.*asks for CUDA graphs.*max-autotune-no-cudagraphs"):
        mkor_fx.compile_step(model, mse_loss, optimizer, **options)
    mkor_fx.compile_step(model, mse_loss, optimizer, mode="max-autotune-no-cudagraphs")
    mkor_fx.compile(model, **options)


@torch._inductor.config.patch({"triton.cudagraphs": True})
def test_a_step_is_compiled_without_them_whatever_torch_is_set_to(monkeypatch):
    seen = []

    def compile_fx_inner(module, examples, cudagraphs, **options):
        assert cudagraphs.value == torch._inductor.config.triton.cudagraphs
        seen.append(cudagraphs.value)
        return lambda args: module(*args)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", compile_fx_inner)
    model = nn.Sequential(nn.Linear(6, 5))
    step = mkor_fx.compile_step(model, mse_loss, torch.optim.AdamW(model.parameters()))
    step(torch.ones(8, 6), torch.ones(8, 5))
    assert seen == [False]
