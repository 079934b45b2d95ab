"""The drop-in door on real models, and a few families through Inductor."""

import copy

import pytest
import torch
from catalogue import FAMILIES
from decoders import NanoGPT
from encoders import text
from family import loss_of, made, roles
from vision import Autoencoder

import mkor_fx
from mkor_fx import MKOR


def train(model, batch, optimizer, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize("name", [
    "BERT, sequences", "Mixtral, grouped_mm", *(pytest.param(name, marks=NIGHTLY) for name in ("GPT-2", "U-Net", "nn.LSTM")),
])  # fmt: skip
def test_both_doors_agree(name):
    """One captured graph, the hand-made roles, the compiled step's losses and parameters, and untouched keys."""
    family = FAMILIES[name]
    model, batch = made(family, torch.float64)
    twin, keys, examples = copy.deepcopy(model), list(model.state_dict()), batch()
    rule = MKOR.published(factor_dtype=torch.float64)
    compiled = mkor_fx.compile(model, rule, backend="eager", fullgraph=True)
    own, other = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin))
    step = mkor_fx.compile_step(twin, None, other, rule, backend="eager")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if family.tolerance > 1e-10 else {"rtol": 1e-9, "atol": 1e-12}
    losses = train(compiled, examples, own)
    assert losses == pytest.approx([step(**examples).item() for _ in range(3)], rel=tolerance["rtol"])
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=key)
    assert roles(compiled.coverage) == family.expected(model)
    assert len(compiled.graphs.captured) == 1 and compiled.mkor.step == 3
    assert list(compiled.state_dict()) == keys


def test_generation_and_evaluation_beside_training():
    model, batch = made(FAMILIES["GPT-2"])
    compiled = mkor_fx.compile(model, backend="eager", rule=mkor_fx.MKOR.published())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    examples = batch()
    before = train(compiled, examples, optimizer)
    prompt = examples["input_ids"][:, :4]
    compiled.eval()
    with torch.no_grad():
        outputs = compiled(**examples)
        torch.testing.assert_close(outputs.logits, model(**examples).logits)
        torch.testing.assert_close(
            compiled.generate(prompt, max_new_tokens=3), model.generate(prompt, max_new_tokens=3)
        )
    compiled.train()
    after = train(compiled, examples, optimizer)
    assert after[-1] < before[0] and compiled.mkor.step == 6


def test_settings_hold_during_a_call_alone():
    settings = torch._dynamo.config
    before = settings.allow_rnn, set(settings.ignore_logging_functions)
    model, batch = made(FAMILIES["nn.GRU"])
    compiled = mkor_fx.compile(model, backend="eager", rule=mkor_fx.MKOR.published())
    compiled(**batch()).backward()
    assert (settings.allow_rnn, set(settings.ignore_logging_functions)) == before


def test_a_sequence_that_needs_no_gradient():
    """torch decomposes such an LSTM into a kernel without a backward."""
    model = torch.nn.Sequential(torch.nn.LSTM(5, 7, batch_first=True))
    x = torch.randn(3, 4, 5)
    expected = torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters()))
    compiled = mkor_fx.compile(model, backend="eager", rule=mkor_fx.MKOR.published())
    compiled(x)[0].square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    step = mkor_fx.compile_step(
        model,
        lambda out, y: (out[0] - y).square().mean(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        mkor_fx.MKOR.published(),
        backend="eager",
    )
    losses = [step(x, torch.ones(3, 4, 7)).item() for _ in range(3)]
    assert losses[-1] < losses[0] and not step.coverage.declined


@pytest.mark.parametrize("build", [
    pytest.param(lambda: NanoGPT(blocks=1), marks=NIGHTLY, id="nanoGPT"), pytest.param(Autoencoder, id="autoencoder"),
])  # fmt: skip
def test_inductor(build):
    """The default backend gives the losses of the uncompiled graph."""
    model = build()
    twin = copy.deepcopy(model)
    examples = text() if isinstance(model, NanoGPT) else {"x": torch.randn(16, 20)}
    losses = []
    for each, backend in ((model, "inductor"), (twin, "eager")):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        step = mkor_fx.compile_step(each, None, optimizer, backend=backend, rule=mkor_fx.MKOR.published())
        losses.append([step(**examples).item() for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
