"""Fifty wrong calls, as people make them: each names the thing, where it is and what to do, and changes nothing."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import KFAC, MKOR, Eva

X, Y = torch.randn(4, 6), torch.randn(4, 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def make(model=None, loss_fn=mse_loss, optimizer=None, **options):
    model = net() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters()) if optimizer is None else optimizer
    return mkor_fx.compile_step(model, loss_fn, optimizer, **{"backend": "eager", **options})


def swapped():
    model = net()
    return mkor_fx.compile_step(model, torch.optim.AdamW(model.parameters()), mse_loss)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x), self.layer(x)


def trained():
    step = make()
    step(X, Y)
    return step


WRONG = {
    "loss by name": (
        lambda: make(loss_fn="mse"),
        r"loss_fn='mse': must be callable as loss_fn\(outputs, target\), e\.g\.",
    ),
    "class of a loss": (lambda: make(loss_fn=nn.MSELoss), r"loss_fn=MSELoss: a class\. Pass an instance, MSELoss\(\)"),
    "computed loss": (
        lambda: make(loss_fn=torch.tensor(1.0)),
        r"loss_fn: a tensor.*Pass the function that computes it",
    ),
    "swapped": (swapped, r"loss_fn=AdamW: an optimizer\. The order is compile_step\(model, loss_fn, optimizer\)"),
    "function for a model": (lambda: mkor_fx.compile(mse_loss), r"model: must be a torch\.nn\.Module, got a function"),
    "class of a model": (lambda: mkor_fx.compile(Pair), r"got the class Pair: pass an instance"),
    "name of a model": (lambda: mkor_fx.explain("net", X), r"must be a torch\.nn\.Module, got a str"),
    "class of an optimizer": (lambda: make(optimizer=torch.optim.AdamW), r"optimizer: must .*got the class AdamW"),
    "parameters": (lambda: make(optimizer=[*net().parameters()]), r"optimizer\[0\]: must .*got a Parameter"),
    "another model's": (
        lambda: make(optimizer=torch.optim.SGD(net().parameters())),
        r"4 of the optimizer's 4 parameters are not",
    ),
    "L-BFGS": (
        lambda: make(m := net(), optimizer=torch.optim.LBFGS(m.parameters())),
        r"LBFGS cannot be compiled into a step",
    ),
    "frozen": (lambda: make(net().requires_grad_(False)), r"Sequential has no trainable parameter"),
    "meta": (
        lambda: make(nn.Linear(6, 3, device="meta")),
        r"weight is on the meta device.*model\.to_empty\(device=\.\.\.\)",
    ),
    "already compiled": (
        lambda: mkor_fx.compile(torch.compile(net(), backend="eager")),
        r"compiled by torch\.compile already",
    ),
    # calls
    "no argument": (lambda: make()(), r"called with the target as its last positional argument: step\(x, y\)"),
    "one argument": (lambda: make()(X), r"1 positional arguments: the last positional argument is the target"),
    "three": (
        lambda: make()(X, Y, Y),
        r"the last positional argument is the target, and Sequential\.forward cannot take the rest",
    ),
    "a keyword": (lambda: make()(X, Y, mask=Y), r"2 positional arguments and mask"),
    "no loss": (
        lambda: make(loss_fn=None)(X, Y),
        r"called with 2 positional arguments: Sequential\.forward cannot take the rest",
    ),
    "outputs for a loss": (
        lambda: make(loss_fn=None)(X),
        r"the loss has shape \(4, 3\), it must be a scalar: return loss\.mean\(\)",
    ),
    "loss of each": (lambda: make(loss_fn=lambda o, t: (o - t) ** 2)(X, Y), r"the loss has shape \(4, 3\)"),
    "a number": (lambda: make(loss_fn=lambda o, t: 1.0)(X, Y), r"the loss is not a tensor of the captured graph"),
    "detached": (
        lambda: make(loss_fn=lambda o, t: o.detach().mean())(X, Y),
        r"the loss depends on no trainable parameter",
    ),
    "width": (
        lambda: make()(torch.randn(4, 7), Y),
        r"called with float32 \[4, 7\], float32 \[4, 3\]: a and b must have same red.*linear\.py",
    ),
    "integers": (
        lambda: make()(torch.ones(4, 6, dtype=torch.int64), Y),
        r"0\.weight multiplies an input of torch\.int64",
    ),
    "target": (
        lambda: make()(X, torch.randn(5, 3)),
        r"called with float32 \[4, 6\], float32 \[5, 3\]: .*broadcast.*loss_fn",
    ),
    "lists": (
        lambda: make()(X.tolist(), Y),
        r"called with a list, float32 \[4, 3\]: linear\(\): argument 'input'.*must be Tensor",
    ),
    "two outputs": (lambda: make(Pair())(X, Y), r"'tuple' object has no attribute 'size'"),
    "device": (lambda: make()(X.to("meta"), Y), r"called with float32 \[4, 6\] on meta.*same device"),
    "no gradients": (lambda: torch.no_grad()(trained)(), r"a compiled step trains: call it with gradients enabled"),
    "explained width": (
        lambda: mkor_fx.explain(net(), torch.randn(4, 9)),
        r"called with float32 \[4, 9\]: a and b must have same",
    ),
    "explained nothing": (lambda: mkor_fx.explain(net()), r"pass an example batch, explain\(model, \*batch\)"),
    "too early": (lambda: make().graphs, r"nothing is compiled yet: call the step once"),
    # options
    "class of a rule": (lambda: make(rule=MKOR), r"rule=the class MKOR, which needs its brackets"),
    "name of a rule": (
        lambda: make(rule="mkor"),
        r"rule='mkor': must be an update rule such as mkor_fx\.MKOR\(\), or None",
    ),
    "name of what is no rule": (lambda: make(rule="fosi"), r"rule='fosi': FOSI \(arXiv 2302.*differentiated again.*CGFAC"),
    "in a dict": (lambda: make(rule={"*": "mkor"}), r"rule='mkor' for '\*': must be an update rule"),
    "pattern": (
        lambda: make(rule={"heads.*": MKOR()}),
        r"rule pattern 'heads\.\*' matches no parameter\. Parameters: 0\.weight",
    ),
    "skip a number": (lambda: make(skip=[1]), r"skip=\[1\]: 1 is no pattern of parameter names, such as 'head\.\*'"),
    "skip nothing": (lambda: make(skip=["head.*"]), r"skip pattern 'head\.\*' matches no parameter"),
    "refresh never": (lambda: make(refresh_every=0), r"refresh_every=0: must be an integer of at least 1"),
    "refresh by name": (lambda: make(refresh_every="2"), r"refresh_every='2': must be an integer"),
    "backend": (lambda: make(backend="indctor"), r"backend='indctor': must be one of inductor, eager"),
    "communication": (lambda: make(communication=25), r"communication=25: must be a mkor_fx\.Communication"),
    "mode": (lambda: make(mode="fastest", backend="inductor"), r"mode='fastest': must be one of default"),
    "both": (lambda: make(mode="default", options={"a": 1}), r"give either mode or options"),
    "text": (
        lambda: MKOR(gamma="0.9"),
        r"MKOR\(gamma='0\.9'\): must be a number, a 0-dim tensor, or a function of the step",
    ),
    "too much": (lambda: MKOR(gamma=2.0), r"MKOR\(gamma=2\.0\): the factor momentum must lie inside \(0, 1\)"),
    "half a rank": (lambda: MKOR(rank=1.5), r"MKOR\(rank=1\.5\): must be an integer of at least 1"),
    "form": (lambda: MKOR(form="dampd"), r"MKOR\(form='dampd'\): must be one of damped"),
    "dtype by name": (lambda: MKOR(factor_dtype="bf16"), r"MKOR\(factor_dtype='bf16'\): must be one of torch\.float32"),
    "damping": (lambda: KFAC(damping=0), r"KFAC\(damping=0\): must be positive, e\.g\. 1e-3"),
    "inverse": (lambda: KFAC(inverse="lu"), r"KFAC\(inverse='lu'\): must be 'cholesky', 'eigen' or 'newton'"),
    "decay": (lambda: Eva(decay=1.5), r"Eva\(decay=1\.5\): the weight of the old average must lie in \[0, 1\)"),
    # state
    "no state": (
        lambda: make().mkor.load_state_dict(None),
        r"state=None: must be a dict of tensors, as state_dict\(\) returns it",
    ),
    "a list": (lambda: make().mkor.load_state_dict([1]), r"state=\[1\]: must be a dict of tensors"),
    "the model's": (
        lambda: trained().mkor.load_state_dict(net().state_dict()),
        r"no 'step': it is no mkor_fx state_dict",
    ),
    "a stranger": (
        lambda: make().mkor.of(nn.Parameter(torch.ones(2, 2))),
        r"shape \(2, 2\) is not one of the compiled model's",
    ),
    "a copy": (lambda: copy.deepcopy(make()), r"cannot be copied or pickled: make another one with compile_step"),
    "pickled": (lambda: pickle.dumps(make()), r"cannot be copied or pickled"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_says_what_is_wrong(what):
    call, message = WRONG[what]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
            call()
    assert "TORCHDYNAMO_VERBOSE" not in str(caught.value) and len(str(caught.value)) < 500


def test_there_are_fifty():
    assert len(WRONG) >= 50


@pytest.mark.parametrize(
    "args",
    [(torch.randn(4, 7), Y), (X,), (X.tolist(), Y), (X, torch.randn(5, 3))],
    ids=["width", "one", "lists", "rows"],
)
def test_a_wrong_call_between_others_changes_nothing(args):
    step, other = trained(), trained()
    state = copy.deepcopy(step.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, TypeError)):
            step(*args)
    assert str(step.state_dict()) == str(state)
    assert torch.equal(step(X, Y), other(X, Y))
