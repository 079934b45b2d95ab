"""K-FAC's factors are those of curvlinops-for-pytorch where definitions coincide: the empirical Fisher, every use of a
weight a row (``expand``), a loss that is the mean over rows."""

import pytest
import torch
from stepping import stepper
from torch import nn

import mkor_fx

curvlinops = pytest.importorskip("curvlinops", reason="installed by make test")


class TokensLast(nn.Module):
    """``[N, T, C] -> [N, C, T]``, as cross-entropy wants them."""

    def forward(self, x):
        return x.mT


CLASSES = 5
MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, CLASSES)),
        lambda: (torch.randn(8, 6), torch.randint(0, CLASSES, (8,))),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES), TokensLast()),
        lambda: (torch.randn(8, 3, 6), torch.randint(0, CLASSES, (8, 3))),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2, bias=False)),
            *(nn.Flatten(), nn.Linear(12, CLASSES)),
        ),
        lambda: (torch.randn(8, 2, 6, 6), torch.randint(0, CLASSES, (8,))),
    ),
}
#: a mean over rows is one over examples times positions here, and one over examples there
POSITIONS = {"0": 36, "2": 4}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("door", ["compile_step", "compile"])
def test_factors_are_those_of_curvlinops(name, door):
    build, draw = MODELS[name]
    model, batch = build(), draw()
    operator = curvlinops.KFACLinearOperator(
        *(model, nn.CrossEntropyLoss(), list(model.parameters()), [batch]),
        fisher_type=curvlinops.FisherType.EMPIRICAL, kfac_approx=curvlinops.KFACType.EXPAND, check_deterministic=False,
    )  # fmt: skip
    operator.compute_kronecker_factors()
    inputs, outputs = operator._input_covariances, operator._gradient_covariances
    done, step = stepper(
        door, model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.0), mkor_fx.KFAC(), "eager"
    )
    step(*batch)
    state = done.mkor.state_dict()
    assert set(inputs) == {key.removesuffix(".weight.R") for key in state if key.endswith(".R")} and len(inputs) > 1
    for layer, expected in inputs.items():
        torch.testing.assert_close(state[f"{layer}.weight.R"], expected)
        positions = POSITIONS.get(layer, 1) if name == "convolutions" else 1
        torch.testing.assert_close(state[f"{layer}.weight.L"], positions * outputs[layer], rtol=1e-5, atol=1e-8)
