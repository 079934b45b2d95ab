"""MKOR's damped form: beside an eager reference, in closed form, behind each kind of optimizer, and over long runs."""

import copy

import pytest
import torch
import zoo
from damped import Damped
from torch import nn

import mkor_fx
from mkor_fx import MKOR
from mkor_fx.hardware import multiplies
from mkor_fx.prims import precondition, signs
from mkor_fx.rules.inverse_updates import damped_update
from mkor_fx.runtime.base_step import base_step_of
from mkor_fx.runtime.draws import Draws, draw_of

DOORS = ("step", "drop-in")


def trainer(door, model, loss_fn, optimizer, rule, **options):
    """``step(x, y) -> loss``, and the factors."""
    if door == "step":
        step = mkor_fx.compile_step(model, loss_fn, optimizer, rule, **options)
        return step, step.mkor
    compiled = mkor_fx.compile(model, rule, **options)

    def step(x, y):
        optimizer.zero_grad()
        loss = loss_fn(compiled(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, compiled.mkor


def lockstep(name, door, backend="eager", tolerance=1e-10, steps=20, **options):
    exact = {"factor_dtype": torch.float64 if backend == "eager" else torch.float32, "product_dtype": None}
    dtype = torch.float64 if backend == "eager" else torch.float32
    model, loss_fn, batches = zoo.build(name, dtype=dtype, steps=steps)
    twin = copy.deepcopy(model)
    own, other = (torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (model, twin))
    reference = Damped(twin, other, **options)
    step, mkor = trainer(door, model, loss_fn, own, MKOR(**exact, **options), backend=backend)
    for x, y in batches:
        loss, expected = step(x, y), loss_fn(twin(x), y)
        expected.backward()
        reference.step()
        pairs = [(loss, expected.detach()), *zip(model.parameters(), twin.parameters(), strict=True)]
        assert all((p - q).norm() <= tolerance * q.norm() for p, q in pairs)
    names = {p: name for name, p in twin.named_parameters()}
    for weight, sides in reference.S.items():
        for side, S in zip("LR", sides, strict=True):
            factor = mkor.state_dict()[f"{names[weight]}.{side}"]
            assert (factor @ S - torch.eye(len(S)).to(S)).norm() <= 100 * tolerance * S.norm()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_the_reference_goes_the_same_way(name, door):
    lockstep(name, door)


@pytest.mark.parametrize(
    "name, options",
    [("gpt", {"statistic": "mean+rows+gradient", "rank": 30, "nesterov": False}),
     ("cnn", {"statistic": "gradient", "rank": 2}),
     ("mlp", {"statistic": "mean", "gamma": 0.9, "kappa": 3.0, "momentum": 0.5, "beta2": 0}),
     ("mlp", {"momentum": 0.9, "beta2": 0.8, "nesterov": False})],
    ids=["sums", "gradient", "mean", "rows"],
)  # fmt: skip
@pytest.mark.parametrize("door", DOORS)
def test_so_it_does_with_other_options(name, options, door):
    lockstep(name, door, **options)


@pytest.mark.parametrize("door, name", [("step", "cnn"), pytest.param("drop-in", "mlp", marks=pytest.mark.nightly)])
def test_compiled_in_float32(door, name):
    lockstep(name, door, "inductor", 1e-4, steps=10)


# ---- closed forms -----------------------------------------------------------------------------------------------------


def test_with_all_rows_and_the_whole_identity_it_is_the_inverse():
    torch.manual_seed(0)
    d, gamma, kappa = 12, 0.9, 10.0
    F = S = torch.eye(d, dtype=torch.float64)
    for step in range(200):
        rows = torch.randn(30, d, dtype=torch.float64) * torch.logspace(-3, 3, d, dtype=torch.float64)
        C = rows.T @ rows
        S = gamma * S + (1 - gamma) * (torch.eye(d).double() + kappa * d * C / C.trace())
        F = damped_update(F, [1e-9 * rows], torch.tensor(step), gamma, kappa, d)
    torch.testing.assert_close(F @ S, torch.eye(d).double(), rtol=0, atol=1e-10)


def test_unit_vectors_in_turn_are_the_identity_over_a_cycle():
    torch.manual_seed(0)
    d, gamma, probes = 64, 0.99, 8
    F, seen = torch.eye(d, dtype=torch.float64), []
    for step in range(1200):
        F = damped_update(F, [torch.zeros(1, d).double()], torch.tensor(step), gamma, 10.0, probes)
        if step >= 1200 - d // probes:
            seen.append(F)
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(mean, torch.eye(d).double(), rtol=0.05, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_stay_positive_definite(dtype):
    torch.manual_seed(0)
    d = 48
    F, scales = torch.eye(d, dtype=dtype), torch.logspace(0, -4, d)
    basis = torch.linalg.qr(torch.randn(d, d)).Q
    for step in range(10_000):
        F = damped_update(F, [(torch.randn(4, d) * scales) @ basis], torch.tensor(step), 0.99, 10.0, 8)
        if step % 500 == 0 or step == 9999:
            assert torch.equal(F, F.T) or (F - F.T).abs().max() <= 1e-6
            assert torch.linalg.eigvalsh(F.double())[0] > 0


# ---- the size of a step -----------------------------------------------------------------------------------------------


def moved(optimizer, door="step", steps=4):
    """By what the last step has moved a weight, the gradients of all, and how large the weight was."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False).double()
    optimizer = optimizer(model.parameters())
    step, _ = trainer(door, model, nn.functional.mse_loss, optimizer, MKOR(), backend="eager")
    gradients = []
    for _ in range(steps):
        x, y = torch.randn(8, 6).double(), torch.randn(8, 5).double()
        before = model.weight.detach().clone()
        gradients.append(torch.autograd.grad(nn.functional.mse_loss(model(x), y), model.weight)[0])
        step(x, y)
    return before - model.weight.detach(), gradients, before.norm()


@pytest.mark.parametrize("door", DOORS)
def test_behind_adam_a_step_has_the_size_of_adams(door):
    """It gains what Adam's would with one second moment for the matrix, where that moves the weight by no more than 3 % of
    its norm."""
    for lr in (1e-4, 5e-3, 0.1):
        step, gradients, weight = moved(lambda p, lr=lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0), door=door)
        m, v = torch.zeros(5, 6).double(), 0.0
        for gradient in gradients:
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient.norm() ** 2
        steps, length = len(gradients), step.norm()
        ahead = (0.9 * m + 0.1 * gradients[-1]) / (1 - 0.9 ** (steps + 1))
        adam = lr * 30**0.5 * ahead.norm() / (v / (1 - 0.95**steps)) ** 0.5
        smallest = lr * 0.2 * 30**0.5
        cosine = (step * ahead).sum() / length / ahead.norm()
        assert adam > 2 * smallest and 1 / 8 < cosine < 0.95
        assert length == pytest.approx(max(smallest, min(adam.item() / cosine.item(), 0.03 * weight.item())))
    assert length == pytest.approx(smallest)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_behind_sgd_it_is_as_long_as_sgds(door, nesterov):
    make = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=nesterov)
    step, gradients, _ = moved(make, door=door)
    momentum = sum(0.9**age * g for age, g in enumerate(reversed(gradients)))
    expected = gradients[-1] + 0.9 * momentum if nesterov else momentum
    assert step.norm() == pytest.approx(0.1 * expected.norm().item())
    step, gradients, _ = moved(lambda p: torch.optim.SGD(p, lr=0.1), door=door)
    assert step.norm() == pytest.approx(0.1 * gradients[-1].norm().item())


class Lamb(torch.optim.SGD):
    """By its name: the size of a step is that of the weight."""


@pytest.mark.parametrize("door", DOORS)
def test_behind_lamb_it_is_as_long_as_the_weight(door):
    step, _, weight = moved(lambda p: Lamb(p, lr=0.01), door=door)
    assert step.norm() == pytest.approx(0.01 * weight.item())


@pytest.mark.parametrize("door", DOORS)
def test_behind_others_the_direction_goes_in_as_a_gradient(door):
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    step, _ = trainer(door, model, nn.functional.mse_loss, optimizer, MKOR(), backend="eager")
    x, y = torch.randn(8, 6), torch.randn(8, 5)
    gradient = torch.autograd.grad(nn.functional.mse_loss(model(x), y), model.weight)[0]
    step(x, y)
    direction = optimizer.state[model.weight]["sum"].sqrt()
    torch.testing.assert_close(direction.norm(), gradient.norm())
    assert (direction - gradient.abs()).norm() > 1e-3 * gradient.norm()


def test_optimizers_are_told_apart():
    model = nn.Linear(3, 2)
    kinds = {
        torch.optim.AdamW(model.parameters()): "adam",
        torch.optim.NAdam(model.parameters()): "adam",
        type("FusedAdam", (torch.optim.SGD,), {})(model.parameters()): "adam",
        torch.optim.Muon([model.weight], adjust_lr_fn="match_rms_adamw"): "adam",
        torch.optim.Muon([model.weight]): "other",
        torch.optim.SGD(model.parameters(), momentum=0.9, dampening=0.1): "other",
        torch.optim.RMSprop(model.parameters()): "other",
    }
    assert {o: base_step_of(o, 0).kind for o in kinds} == kinds


def test_a_momentum_that_changes_compiles_nothing_again():
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = mkor_fx.compile_step(model, nn.functional.mse_loss, optimizer, MKOR(), backend="eager")
    for momentum in (0.9, 0.8, 0.7):
        optimizer.param_groups[0]["momentum"] = momentum
        step(torch.randn(8, 6), torch.randn(8, 5))
    assert step.compilations == 1


def test_fast_products_are_bfloat16_where_that_is_native():
    for gradient, native in ((torch.float32, multiplies(torch.device("cpu"), torch.bfloat16)), (torch.float64, False)):
        model = nn.Linear(6, 5).to(gradient)
        step = mkor_fx.compile_step(
            model, nn.functional.mse_loss, torch.optim.AdamW(model.parameters()), MKOR(), backend="eager"
        )
        step(torch.randn(8, 6, dtype=gradient), torch.randn(8, 5, dtype=gradient))
        (product,) = step.graphs["rewrite"].graph.find_nodes(op="call_function", target=precondition)
        assert product.meta["val"].dtype == (torch.bfloat16 if native else gradient)


@pytest.mark.parametrize("door", DOORS)
def test_a_gradient_that_is_not_finite_changes_no_moment(door):
    model = nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step, mkor = trainer(door, model, nn.functional.mse_loss, optimizer, MKOR(), backend="eager")
    for _ in range(3):
        step(torch.randn(8, 6), torch.randn(8, 5))
    before = copy.deepcopy(mkor.state_dict())
    step(torch.randn(8, 6) * torch.inf, torch.randn(8, 5))
    after = mkor.state_dict()
    kept = [key for key in before if key.split(".")[-1] in ("momentum", "row_squares", "column_squares", "L", "R")]
    assert len(kept) == 5 and all(torch.equal(before[key], after[key]) for key in kept)
    assert all(before[key].abs().min() > 0 for key in kept if "squares" in key)


def test_rows_and_columns_of_a_direction_come_to_one_size():
    torch.manual_seed(0)
    state = {"row_squares": torch.zeros(5), "column_squares": torch.zeros(7)}
    sizes = torch.logspace(-3, 3, 5)[:, None] * torch.logspace(-2, 2, 7)
    product, moment = torch.randn(5, 7).sign() * sizes, torch.randn(5, 7)
    made, new, rms, gain = MKOR().normalize(state, product, moment)
    torch.testing.assert_close(gain, (made * moment).sum())
    torch.testing.assert_close(made.abs() / made.abs().mean(), torch.ones(5, 7), rtol=1e-4, atol=0)
    torch.testing.assert_close(rms, made.square().mean().sqrt())
    made, kept, rms, _ = MKOR().normalize(new, torch.zeros(5, 7), moment)
    assert torch.equal(made, torch.zeros(5, 7)) and rms == 0
    assert all(torch.equal(kept[key], new[key]) for key in new)
    assert torch.isfinite(MKOR().normalize(new, torch.full((5, 7), 1e-30), moment).direction).all()


# ---- signs ------------------------------------------------------------------------------------------------------------


def test_signs_are_independent_of_each_other():
    drawn = [
        signs(draw_of(step, use, None, torch.device("cpu")) + rank, side, 4000, 30).double()
        for step, use, rank, side in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    ]
    together = torch.cat(drawn, 1)
    assert {*together.unique().tolist()} == {-1.0, 1.0}
    correlation = together.T @ together / 4000 - torch.eye(150)
    assert correlation.abs().max() < 6 / 4000**0.5 and together.mean(0).abs().max() < 5 / 4000**0.5
    shifted = (drawn[0][1:].T @ drawn[0][:-1] / 4000).abs().max()
    assert shifted < 6 / 4000**0.5


def test_each_use_of_a_weight_in_a_step_draws_anew():
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    draws = Draws()
    assert [draws.next([first], 0), draws.next([second], 0), draws.next([first, second], 0)] == [0, 0, 1]
    assert draws.next([second], 0) == 2 and draws.next([first], 1) == 0


def test_micro_batches_and_a_resumed_run_draw_as_one_run():
    def run(stop=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        handle, data = mkor_fx.compile(model, MKOR(), backend="eager"), torch.randn(6, 2, 8, 6)
        for step, micro_batches in enumerate(data):
            if step == stop:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.mkor.state_dict()))
                model = copy.deepcopy(model)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
                handle = mkor_fx.compile(model, MKOR(), backend="eager")
                for part, state in zip((model, optimizer, handle.mkor), saved, strict=True):
                    part.load_state_dict(state)
            optimizer.zero_grad()
            for x in micro_batches:
                handle(x).square().mean().backward()
            optimizer.step()
        return model.state_dict() | handle.mkor.state_dict()

    whole, resumed = run(), run(stop=3)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# ---- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"statistic": "median"}, r"MKOR\(statistic='median'\): must be one of mean, rows, gradient"),
        ({"form": "exact", "statistic": "rows"}, r"statistic='rows'.*mean, gradient with form='exact'"),
        ({"rank": 0}, r"MKOR\(rank=0\): must be an integer of at least 1"),
        ({"form": "paper", "rank": 2}, r"MKOR\(rank=2\): must be 1 with form='paper'"),
        ({"momentum": 1.0}, r"MKOR\(momentum=1.0\): must be a number in \[0, 1\)"),
        ({"beta2": -0.1}, r"MKOR\(beta2=-0.1\): must be a number in \[0, 1\)"),
        ({"beta2": 0.9, "momentum": 0}, r"MKOR\(beta2=0.9\): divides what becomes of a momentum"),
        ({"bias": "joint"}, r"MKOR\(bias='joint'\): has no meaning for form='damped'"),
        ({"epsilon": 3.0}, r"MKOR\(epsilon\): has no meaning for form='damped'"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        MKOR(**options)
    with pytest.raises(ValueError, match="must be one of scale_free"):
        MKOR.published("damped")


def test_embeddings_and_biases_are_the_base_optimizers():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5))
    found = mkor_fx.explain(model, torch.randint(0, 9, (4, 3)), rule=MKOR())
    assert "embedding, which this form leaves to the base optimizer" in str(found["0.weight"].declined)
    assert "leaves the bias" in str(found["1.bias"].declined) and found["1.weight"].declined is None
