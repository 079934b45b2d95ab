"""Behind Inductor, on a GPU where there is one: both doors go the way of graphs that are not compiled, and nothing in a step
waits for the device."""

import copy

import pytest
import torch
import zoo
from stepping import stepper

import mkor_fx
from mkor_fx import EKFAC, KFAC, MKOR, SINGD, SOAP, Eva, Shampoo

GPU = torch.cuda.is_available()
DEVICE, BACKEND = torch.device("cuda" if GPU else "cpu"), "inductor"
DOORS = ("compile_step", "compile")
RULES = {"mkor": MKOR, "published": MKOR.published, "kfac": KFAC, "eva": Eva, "ekfac": EKFAC, "singd": SINGD, "soap": SOAP,
         "shampoo": Shampoo, "newton": lambda: KFAC(inverse="newton"), "none": lambda: None}  # fmt: skip
#: two devices need not agree on vectors of nearly equal eigenvalues
BASES = ("ekfac", "soap", "shampoo")
CASES = [
    *((door, "mlp", rule) for rule in RULES for door in DOORS if (door, rule) != ("compile", "none")),
    *((door, model, "mkor") for model in ("cnn", "gpt") for door in DOORS),
]
EVERY_RUN = (("compile_step", "mlp", "eva"), ("compile_step", "gpt", "mkor"))
nightly = pytest.mark.nightly
on_a_gpu = pytest.mark.skipif(not GPU, reason="no GPU")


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def on_gpu(model, batches):
    return copy.deepcopy(model).to(DEVICE), [tuple(t.to(DEVICE) for t in batch) for batch in batches]


@pytest.mark.parametrize(
    "door, model, rule", [pytest.param(*case, marks=() if GPU or case in EVERY_RUN else nightly) for case in CASES]
)
def test_it_goes_the_way_of_the_host(door, model, rule):
    if GPU and rule in BASES:
        pytest.skip("bases differ between devices")
    here, loss_fn, batches = zoo.build(model, dtype=torch.float64, steps=5)
    there, sent = on_gpu(here, batches)
    for where, data, backend in ((here, batches, "eager"), (there, sent, BACKEND)):
        _, step = stepper(door, where, loss_fn, adamw(where), RULES[rule](), backend)
        for batch in data:
            step(*batch)
    for (name, ours), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@on_a_gpu
@pytest.mark.parametrize("rule", ["mkor", "published", "newton", "eva"])
@pytest.mark.parametrize("door", DOORS)
def test_no_step_waits_for_the_device(door, rule):
    model, loss_fn, batches = zoo.build("mlp", steps=24)
    model, batches = on_gpu(model, batches)
    optimizer = adamw(model, fused=door == "compile")
    _, step = stepper(door, model, loss_fn, optimizer, RULES[rule](), BACKEND, refresh_every=2)
    for batch in batches[:12]:
        step(*batch)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[12:]:
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_a_gpu
@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_every_form_of_the_optimizer(door, options):
    start, loss_fn, batches = zoo.build("mlp", steps=5)
    ends = []
    for form in ({}, options):
        model, data = on_gpu(start, batches)
        _, step = stepper(door, model, loss_fn, adamw(model, **form), MKOR(), BACKEND)
        for batch in data:
            step(*batch)
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_loss_scaler(dtype):
    model, loss_fn, batches = zoo.build("mlp", steps=8)
    model, batches = on_gpu(model, batches)
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    compiled, losses = mkor_fx.compile(model, backend=BACKEND), []
    for x, y in batches * 3:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = loss_fn(compiled(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    first, last = torch.stack(losses)[:4].mean().item(), torch.stack(losses)[-4:].mean().item()
    assert last < first
    assert all(torch.isfinite(p).all() for p in model.parameters())


@on_a_gpu
def test_a_checkpoint_made_on_a_gpu_goes_on_on_the_host():
    start, loss_fn, batches = zoo.build("mlp", dtype=torch.float64, steps=6)
    there, sent = on_gpu(start, batches)
    done, step = stepper("compile_step", there, loss_fn, adamw(there), MKOR(), BACKEND)
    for batch in sent[:3]:
        step(*batch)
    saved = copy.deepcopy(done.state_dict())
    here = copy.deepcopy(there).cpu()
    resumed, go_on = stepper("compile_step", here, loss_fn, adamw(here), MKOR(), "eager")
    resumed.load_state_dict(saved)
    for x, y in batches[3:]:
        go_on(x, y)
        step(x.to(DEVICE), y.to(DEVICE))
    for ours, theirs in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-6, atol=1e-8)
