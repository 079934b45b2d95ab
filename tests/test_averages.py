"""Averages of the weights inside of the program, beside torch's AveragedModel."""

import copy
import warnings

import processes
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mkor_fx
from mkor_fx import MKOR, Communication

DECAY = 0.8
RULES = {
    "none": None,
    "mkor": MKOR(statistic="gradient", factor_dtype=torch.float64),
    "published": MKOR.published(factor_dtype=torch.float64),
}


def build(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
    return model, [(torch.randn(8, 6).to(dtype), torch.randn(8, 3).to(dtype)) for _ in range(6)]


def stepper(model, rule=None, **options):
    several = options.pop("several", False)
    params = [*model.parameters()]
    optimizer = torch.optim.AdamW(params, lr=0.01)
    if several:
        optimizer = [torch.optim.AdamW(params[:2], lr=0.01), torch.optim.SGD(params[2:], lr=0.1)]
    return mkor_fx.compile_step(model, mse_loss, optimizer, rule, **{"ema": DECAY, "backend": "eager", **options})


def beside(model, step, batches):
    """The step's averages and AveragedModel's, which hears of every step."""
    other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for batch in batches:
        step(*batch)
        other.update_parameters(model)
    return step.ema.weights(), dict(other.module.named_parameters())


def same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach().to(found[name]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}, {"accumulate": 3}, {"clip_norm": 0.1}, {"several": True}])
@pytest.mark.parametrize("name", RULES)
def test_they_are_those_of_torch(name, options):
    model, batches = build()
    same(*beside(model, stepper(model, RULES[name], **options), batches))


def test_tied_weights_have_one_average():
    model, batches = build()
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model[1].weight = model[0].weight
    same(*beside(model, stepper(model, MKOR()), batches))


@pytest.mark.parametrize("placement", [pytest.param("replicated", marks=pytest.mark.nightly), "owner"])
def test_ranks_have_the_same(placement):
    model, batches = build()
    step = stepper(model, RULES["mkor"])
    found = processes.values(on_a_rank, 2, placement)
    for batch in batches:
        step(*batch)
    for weights in found:
        same(weights, step.ema.weights(), 1e-9)


def on_a_rank(rank, size, placement):
    model, batches = build()
    options = {"placement": placement, "communication": Communication(padding=9.0, check_replicas_every=2)}
    step = stepper(model, RULES["mkor"], **options)
    for x, y in batches:
        step(x.chunk(size)[rank], y.chunk(size)[rank])
    return step.ema.weights()


def test_half_precision_has_averages_in_float32():
    model, batches = build(torch.bfloat16)
    step, expected = stepper(model, MKOR()), None
    for batch in batches:
        step(*batch)
        now = model[0].weight.detach().float()
        expected = now if expected is None else DECAY * expected + (1 - DECAY) * now
    torch.testing.assert_close(step.ema.weights()["0.weight"], expected, rtol=1e-6, atol=1e-7)


def test_a_step_that_is_skipped_is_in_no_average():
    model, batches = build()
    step = stepper(model, MKOR())
    with pytest.warns(UserWarning, match="a step was skipped, since its loss or a gradient was not finite"):
        step(batches[0][0] / 0, batches[0][1])
    assert step.ema.steps == 0
    step(*batches[0])
    same(step.ema.weights(), dict(model.named_parameters()))  # the first that counts
    before = copy.deepcopy(step.ema.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        step(batches[0][0] / 0, batches[0][1])
    assert all(map(torch.equal, before.values(), step.ema.state_dict().values())) and step.skipped == 2


def test_the_model_has_them_within_a_block():
    model, batches = build()
    step = stepper(model, MKOR())
    for batch in batches:
        step(*batch)
    saved = step.state_dict()
    own, averages = copy.deepcopy(model.state_dict()), copy.deepcopy(step.ema.weights())
    with step.ema.applied() as averaged:
        assert averaged is model
        same(dict(model.named_parameters()), averages)
        with pytest.raises(RuntimeError, match="leave that block first"):
            step(*batches[0])
        with pytest.raises(RuntimeError, match="does not nest"), step.ema.applied():
            pass
        with pytest.raises(RuntimeError, match="leave that block first"):
            step.state_dict()  # whose model would be the averages
        with pytest.raises(RuntimeError, match="leave that block first"):
            step.load_state_dict(saved)
    assert all(map(torch.equal, own.values(), model.state_dict().values()))
    step(*batches[0])
    assert step.compilations == 1  # nothing was compiled again


def test_it_is_in_the_checkpoint():
    (model, batches), (other, _) = build(), build()
    step, again = stepper(model, MKOR(), refresh_every=2), stepper(other, MKOR(), refresh_every=2)
    for batch in batches[:3]:
        step(*batch)
    saved = copy.deepcopy(step.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(saved)
        for batch in batches[3:]:
            assert torch.equal(step(*batch), again(*batch))
    assert step.ema.steps == again.ema.steps == 6
    assert all(map(torch.equal, step.ema.weights().values(), again.ema.weights().values()))

    plain = stepper(build()[0], MKOR(), ema=None)
    with pytest.warns(UserWarning, match="averages of the weights, and this step keeps none"):
        plain.load_state_dict(saved)
    with pytest.warns(UserWarning, match="no averages of the weights: they start afresh"):
        again.load_state_dict(plain.state_dict())
    assert again.ema.steps == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"average.9.weight": torch.ones(2)}), r"another model's: average\.9\.weight is no weight's"),
        (lambda s: s.update({"average.0.bias": torch.ones(2)}), r"average\.0\.bias is \[2\], the weight \[5\]"),
        (lambda s: s.pop("steps"), r"must be a dict as step\.ema\.state_dict\(\) returns it"),
        (lambda s: s.pop("average.0.weight"), r"another model's: average\.0\.weight is missing"),
        (lambda s: s.update({"average.0.bias": [1.0]}), r"average\.0\.bias is a list and no tensor"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model, batches = build()
    step = stepper(model, MKOR())
    step(*batches[0])
    saved = copy.deepcopy(step.state_dict())
    step(*batches[1])
    before = copy.deepcopy(torch.utils._pytree.tree_leaves(step.state_dict()))
    change(saved["ema"])
    with pytest.raises(ValueError, match=message):
        step.load_state_dict(saved)
    after = torch.utils._pytree.tree_leaves(step.state_dict())
    assert all(map(torch.equal, *([t for t in leaves if isinstance(t, torch.Tensor)] for leaves in (before, after))))


@pytest.mark.parametrize("wrong", [1.0, -0.1, "0.9", True])
def test_what_is_no_decay_is_refused(wrong):
    with pytest.raises(ValueError, match=r"ema=.*: must be in \[0, 1\), how much of an average a step keeps"):
        stepper(build()[0], ema=wrong)


def test_a_weight_that_is_frozen_for_a_while_is_averaged_on():
    model, batches = build()
    step = stepper(model, MKOR())
    other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for number in range(12):
        model[0].requires_grad_(not 3 <= number < 8)
        step(*batches[number % 6])
        other.update_parameters(model)
        if number in (5, 7, 8, 11):  # asked in between, or not
            same(step.ema.weights(), dict(other.module.named_parameters()), 1e-10)


def test_a_model_that_changes_takes_its_averages_with_it():
    model, batches = build()
    step = stepper(model)
    for batch in batches[:3]:
        step(*batch)
    kept = step.ema.weights()["0.weight"].clone()
    model[3] = nn.Linear(5, 3).double()
    step.optimizer.add_param_group({"params": [*model[3].parameters()]})
    with step.ema.applied():  # before anybody has looked at the new one, which is its own average
        assert torch.equal(model[0].weight, kept)
    with pytest.warns(UserWarning, match=r"start afresh, of weights that are others than before: 3\.weight, 3\.bias"):
        step(*batches[3])
    assert (step.ema.weights()["3.weight"] - model[3].weight).abs().max() < 0.02
    model[3] = nn.Sequential(nn.Linear(5, 3).double())
    step.optimizer.add_param_group({"params": [*model[3].parameters()]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(*batches[4])
    assert set(step.ema.weights()) == {name for name, _ in model.named_parameters()}
    step.load_state_dict(copy.deepcopy(step.state_dict()))


def test_it_is_not_copied():
    step = stepper(build()[0])
    with pytest.raises(TypeError, match=r"keep copy\.deepcopy\(step\.ema\.state_dict\(\)\)"):
        copy.deepcopy(step.ema)


@pytest.mark.nightly
def test_inductor():
    torch._dynamo.reset()
    model, batches = build(torch.float32)
    same(*beside(model, stepper(model, MKOR(), backend="inductor"), batches), 1e-6)
