"""SOAP against its equations, written out here without the rule, and beside pytorch_optimizer's."""

import pytest
import torch
from rows import layers
from side_by_side import batched, side_by_side, wide
from stepping import stepper
from torch import nn
from torch.nn.functional import mse_loss

import mkor_fx
from mkor_fx import SOAP
from mkor_fx.rules import Gradient, Shape
from mkor_fx.rules.bases import into_bases, out_of_bases

LR, EPS = 0.01, 1e-8
ADAMW = lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0)


def fresh(rule, size):
    return rule.init(Shape(*size), torch.device("cpu"))


def behind(rule, state, gradients):
    """The state behind some gradients, and the direction of the last, by the rule's functions alone."""
    made = None
    for t, G in enumerate(gradients):
        state = rule.advance(rule.update(state, [], Gradient(G), torch.tensor(t)), Gradient(G), torch.tensor(t))
        made = rule.precondition(state, Gradient(G)).weight
        state = rule.derive(state) if t % rule.derive_every == 0 else state
    return state, made


def test_the_first_gradient_makes_the_bases_and_no_direction():
    rule, G = wide(SOAP)(), torch.randn(4, 6).double()
    state, D = behind(rule, fresh(rule, (4, 6)), [G])
    assert not D.any() and not state["m"].any() and not state["v"].any()
    for name, gram in (("L", 0.05 * G @ G.T), ("R", 0.05 * G.T @ G)):
        torch.testing.assert_close(state[name], gram, rtol=1e-12, atol=0)
        inside = state[f"{name}_basis"].T @ gram @ state[f"{name}_basis"]
        torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-12)
        assert (inside.diagonal().diff() <= 1e-12).all()


def test_the_second_is_a_matrix_of_signs_in_these_bases():
    rule, gradients = wide(SOAP)(eps=1e-30), [torch.randn(4, 6).double() for _ in range(2)]
    state, D = behind(rule, fresh(rule, (4, 6)), gradients)
    expected = out_of_bases(state, into_bases(state, gradients[1]).sign())
    torch.testing.assert_close(D, expected, rtol=1e-10, atol=1e-10)


def test_without_bases_it_is_adam():
    rule, gradients = wide(SOAP)(max_factor=0, beta1=0.9, beta2=0.99, eps=1e-30), torch.randn(8, 4, 6).double()
    weight = nn.Parameter(torch.zeros(4, 6).double())
    adam, state = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.99), eps=1e-30), fresh(rule, (4, 6))
    assert set(state) == {"m", "v", "count", "derived"}
    for t in range(1, 8):
        before, weight.grad = weight.detach().clone(), gradients[t]
        adam.step()
        _, D = behind(rule, state, gradients[: t + 1])
        torch.testing.assert_close(D, before - weight.detach(), rtol=1e-10, atol=1e-12)


def test_new_bases_are_sorted_and_moments_follow():
    rule = wide(SOAP)(derive_every=100)
    state, _ = behind(rule, fresh(rule, (4, 6)), torch.randn(6, 4, 6).double())
    state["L"] = state["L"] + 10 * torch.outer(*[state["L_basis"][:, 3]] * 2)  # the last column becomes the first
    new = rule.derive(state)
    order = torch.argsort((state["L_basis"].T @ state["L"] @ state["L_basis"]).diagonal(), descending=True)
    assert order[0] == 3
    other = torch.argsort((state["R_basis"].T @ state["R"] @ state["R_basis"]).diagonal(), descending=True)
    assert torch.equal(new["v"], state["v"][order][:, other])
    torch.testing.assert_close(out_of_bases(new, new["m"]), out_of_bases(state, state["m"]), rtol=0, atol=1e-12)
    for name in ("L", "R"):
        Q = new[f"{name}_basis"]
        torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q)).double(), rtol=0, atol=1e-12)
    for _ in range(300):
        new = rule.derive(new)
    inside = new["L_basis"].T @ state["L"] @ new["L_basis"]
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-8)
    assert (inside.diagonal().diff() < 0).all()


def test_a_batch_of_bases_is_each_of_its_bases():
    rule = wide(SOAP)()
    for steps in (1, 4, None):
        counts = [steps] * 3 if steps else [0, 1, 12]  # a member that has seen no row is as it was
        states = [behind(rule, fresh(rule, (4, 6)), torch.randn(n, 4, 6).double())[0] for n in counts]
        together = torch.vmap(rule.derive)({key: torch.stack([s[key] for s in states]) for key in states[0]})
        for i, state in enumerate(states):
            for key, tensor in rule.derive(state).items():
                torch.testing.assert_close(together[key][i], tensor, rtol=0, atol=1e-12, msg=key)


def check_eigenvectors(state):
    for side in "LR":
        Q = state[f"{side}_basis"].double()
        inside, size = Q.T @ state[side].double() @ Q, state[side].norm()
        assert (inside - inside.diagonal().diag()).norm() < 1e-5 * size and (inside.diagonal().diff() < 1e-5 * size).all()
    return state


@pytest.mark.parametrize("first", ["none", "zero"])
def test_bases_that_no_gradient_could_make_are_made_later_and_moments_go_along(first):
    """Until then Adam; a second moment of independent entries is what it would have been in the new bases."""
    rule = wide(SOAP)(derive_every=5, eps=1e-30)
    adam, gradients = wide(SOAP)(max_factor=0, eps=1e-30), torch.randn(6, 4, 6).double()
    state = rule.derive(fresh(rule, (4, 6)))  # behind a step that was not taken
    if first == "zero":
        state, made = behind(rule, fresh(rule, (4, 6)), torch.zeros(1, 4, 6).double())
        assert not made.any()
    assert state["derived"] == 0 and not state["L"].any() and not state["m"].any()
    plain = fresh(adam, (4, 6)) | {"count": state["count"]}
    for t, G in enumerate(gradients[:5], 1):
        grads, clock = Gradient(G), torch.tensor(t)
        state, plain = rule.advance(state, grads, clock), adam.advance(plain, grads, clock)
        made, expected = rule.precondition(state, grads).weight, adam.precondition(plain, grads).weight
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
    new = check_eigenvectors(rule.derive(state))
    assert new["derived"] == 1
    torch.testing.assert_close(out_of_bases(new, new["m"]), plain["m"], rtol=1e-10, atol=1e-12)
    Q, P = new["L_basis"], new["R_basis"]
    expected = torch.einsum("oa,ib,oi->ab", Q**2, P**2, plain["v"])
    torch.testing.assert_close(new["v"], expected, rtol=1e-10, atol=1e-12)
    again = rule.derive(rule.advance(new, Gradient(gradients[5]), torch.tensor(6)))
    order = torch.argsort((Q.T @ again["L"] @ Q).diagonal(), descending=True)
    assert torch.equal(again["L_basis"], torch.linalg.qr(again["L"] @ Q[:, order])[0])


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("first", ["zero", "not finite"])
def test_so_it_is_behind_both_doors(door, first):
    torch.manual_seed(0)
    model, base = nn.Linear(6, 4, bias=False), lambda params: torch.optim.SGD(params, lr=LR)
    done, step = stepper(door, model, mse_loss, base(model.parameters()), SOAP(derive_every=3))
    before = model.weight.detach().clone()
    step(torch.full((16, 6), 0.0 if first == "zero" else torch.nan), torch.randn(16, 4))
    state = lambda: {key.removeprefix("weight."): t.clone() for key, t in done.mkor.state_dict().items()}
    assert int(state()["derived"]) == 0 and not state()["L"].any()
    if door == "compile" and first == "not finite":  # there the step is the user's to skip
        model.weight.data.copy_(before)
    torch.testing.assert_close(model.weight.detach(), before)
    for _ in range(2):
        step(torch.randn(16, 6), torch.randn(16, 4))
    assert int(state()["derived"]) == 0 and state()["v"].any()
    step(torch.randn(16, 6), torch.randn(16, 4))
    assert int(check_eigenvectors(state())["derived"]) == 1 and torch.isfinite(model.weight).all()
    assert not torch.equal(model.weight, before)


def test_eigenvectors_are_computed_once(monkeypatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(len(matrix)) or eigh(matrix))
    model = nn.Linear(6, 4)
    step = mkor_fx.compile_step(model, mse_loss, ADAMW(model.parameters()), SOAP(derive_every=2), backend="eager")
    for _ in range(6):
        step(torch.randn(8, 6), torch.randn(8, 4))
    assert calls == [4, 6]


class Reference:
    """Eager SOAP; what is no matrix is the base optimizer's. Of the first bases, which are nobody's choice where eigenvalues
    are equal, those of ``state`` are taken once they are seen to be eigenvectors in order."""

    def __init__(self, model, optimizer, every, beta1=0.95, beta2=0.95, decay=0.95):
        vars(self).update(locals(), t=-1, layers=layers(model), held={})

    @torch.no_grad()
    def step(self, state):
        self.t += 1
        for name, layer in self.layers.items():
            G = layer.matrix(layer.weight.grad)
            if self.t == 0:
                self.held[name] = {"factors": [0.0, 0.0], "m": torch.zeros_like(G), "v": torch.zeros_like(G)}
            else:
                layer.weight -= LR * layer.stored(self.direction(self.held[name], G))
            self.turn(self.held[name], G, [state.get(f"{name}.{side}_basis") for side in "LR"])
            layer.weight.grad = None
        self.optimizer.step()

    def direction(self, held, G):
        (Q, P), t = held["Q"], self.t
        turned = Q.T @ G @ P
        # held in the weight's own axes, so that nothing has to turn with the bases
        held["m"] = self.beta1 * held["m"] + (1 - self.beta1) * G
        held["v"] = self.beta2 * held["v"] + (1 - self.beta2) * turned**2
        adam = (Q.T @ held["m"] @ P) / (held["v"].sqrt() + EPS)
        return (1 - self.beta2**t) ** 0.5 / (1 - self.beta1**t) * (Q @ adam @ P.T)

    def turn(self, held, G, offered):
        for side, gram in enumerate((G @ G.T, G.T @ G)):
            held["factors"][side] = self.decay * held["factors"][side] + (1 - self.decay) * gram
        if self.t == 0:
            held["Q"] = [self.first(F, Q) for F, Q in zip(held["factors"], offered, strict=True)]
        elif self.t % self.every == 0:
            for side in (side for side in (0, 1) if offered[side] is not None):  # else it has none, and stays
                F, Q = held["factors"][side], held["Q"][side]
                order = (Q.T @ F @ Q).diagonal().argsort(descending=True)
                held["v"] = held["v"].index_select(side, order)
                held["Q"][side] = torch.linalg.qr(F @ Q[:, order])[0]

    def first(self, F, Q):
        eye = torch.eye(len(F)).to(F)
        if Q is None:
            return eye
        inside = Q.T @ F @ Q
        assert (Q.T @ Q - eye).abs().max() < 1e-10 and (inside - inside.diagonal().diag()).norm() < 1e-10 * F.norm()
        assert (inside.diagonal().diff() < 1e-10 * F.norm()).all()
        return Q.clone()


@pytest.mark.parametrize("door", ["compile_step", "compile"])
@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("cnn", "gpt"))])
def test_both_doors_follow_the_equations(name, door):
    reference = lambda model, optimizer: Reference(model, optimizer, 3)
    rule = wide(SOAP)(derive_every=3, eps=EPS, max_factor=8 if name == "cnn" else 4096)  # what few gradients fill
    side_by_side(batched(name, 9, 3), rule, door, ADAMW, reference, 1e-6)


def test_it_is_the_soap_of_pytorch_optimizer():
    """A square weight, whose first bases are unique but for signs. There weight decay comes behind the step, and not at the
    first; here there is none."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="installed by make test")
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh())
        batches = [(torch.randn(32, 6), torch.randn(32, 6)) for _ in range(25)]
        if ours:
            step = mkor_fx.compile_step(model, mse_loss, ADAMW(model.parameters()), SOAP(derive_every=5), backend="eager")
        else:
            optimizer = pytorch_optimizer.SOAP(model.parameters(), lr=LR, weight_decay=0.0, precondition_frequency=5)
        for x, y in batches:
            if ours:
                step(x, y)
                continue
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
        found.append(model[0].weight.detach())
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_a_vocabulary_and_a_large_side_stay_as_they_are():
    assert set(SOAP().init(Shape(4, 50, lookup=True), torch.device("cpu"))) == {"L", "L_basis", "m", "v", "count", "derived"}
    assert set(fresh(SOAP(max_factor=8), (9, 8))) == {"R", "R_basis", "m", "v", "count", "derived"}
    assert not SOAP().preconditions_bias(Shape(4, 6, bias=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta1": 1.0}, r"SOAP\(beta1=1\.0\): the weight of the old average"),
        ({"beta2": -0.1}, r"SOAP\(beta2=-0\.1\): the weight of the old average"),
        ({"decay": 2.0}, r"SOAP\(decay=2\.0\): the weight of the old average"),
        ({"eps": 0.0}, r"SOAP\(eps=0\.0\): must be positive"),
        ({"max_factor": 1.5}, r"SOAP\(max_factor=1\.5\): must be an integer, 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SOAP(**options)
