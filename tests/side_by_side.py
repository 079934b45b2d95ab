"""A rule through a door, beside a reference that takes over behind each backward."""

import copy

import torch
import zoo
from rows import watch
from stepping import stepper
from torch import nn


def wide(rule_class):
    """The rule with its floating-point state in float64, so that equations can be told from rounding."""

    def init(self, shape, device):
        made = rule_class.init(self, shape, device)
        return {name: t.double() if t.is_floating_point() else t for name, t in made.items()}

    return type(rule_class.__name__, (rule_class,), {"init": init})


class Transformer(nn.Module):
    """Of one layer: tokens ``[N, T]`` -> logits ``[N, T, 11]``."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def small(kind, steps=6):
    """``(model, loss_fn, batches)`` in float64: "mlp", "cnn" or "transformer"."""
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    if kind == "transformer":
        ids = lambda: torch.randint(0, 11, (4, 6))
        return Transformer().double(), zoo.cross_entropy, [(ids(), ids()) for _ in range(steps)]
    if kind == "cnn":
        model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5))
        return model.double(), nn.functional.mse_loss, [(randn(6, 2, 5, 5), randn(6, 5)) for _ in range(steps)]
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))
    return model.double(), nn.functional.mse_loss, [(randn(16, 7), randn(16, 5)) for _ in range(steps)]


def batched(name, steps, together):
    """A zoo model in float64, with several of its batches as one."""
    model, loss_fn, batches = zoo.build(name, dtype=torch.float64, steps=steps * together)
    groups = [batches[at : at + together] for at in range(0, len(batches), together)]
    return model, loss_fn, [tuple(map(torch.cat, zip(*group, strict=True))) for group in groups]


class Directed:
    """In front of a base optimizer what ``direct(name, t, a_NI, g_NO, G_OI, b)`` makes of the gradients of each Linear and
    Conv2d: its weight's and bias' directions; behind it ``derive(t)``. Embeddings are the optimizer's."""

    def __init__(self, model, optimizer, direct, derive=lambda t: None):
        vars(self).update(layers=watch(model), optimizer=optimizer, direct=direct, derive=derive, t=0)

    @torch.no_grad()
    def step(self, state):
        for name, layer in self.layers.items():
            if not layer.lookup:
                W, b = layer.weight, layer.bias
                made = self.direct(name, self.t, *layer.rows(), layer.matrix(W.grad), None if b is None else b.grad)
                for p, D in ((W, layer.stored(made[0])), (b, made[1])):
                    if p is not None:
                        p.grad.copy_(D)
            layer.clear()
        self.optimizer.step()
        self.derive(self.t)
        self.t += 1


def side_by_side(built, rule, door, optimizer, reference, tolerance, rates=None, **options):
    """Hold every parameter to the reference's at every step, by how far it has moved since the start.

    ``built`` is ``(model, loss_fn, batches)``, ``rates`` are those of each step, or as in ``optimizer(parameters)``;
    ``reference(model, optimizer)`` makes an object whose ``step(state)`` acts behind a backward: ``state`` is what the
    library's is after the step. Returns the state at the end, and that object.
    """
    model, loss_fn, batches = built
    twin, start = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    own, other = optimizer(model.parameters()), optimizer(twin.parameters())
    beside, state = reference(twin, other), {}
    done, step = stepper(door, model, loss_fn, own, rule, **options)
    for number, (x, y) in enumerate(batches):
        for group in () if rates is None else (*own.param_groups, *other.param_groups):
            group["lr"] = rates[number]
        step(x, y)
        other.zero_grad()
        loss_fn(twin(x), y).backward()
        state = done.mkor.state_dict()
        beside.step(state)
        moved = [float((q.detach() - old).norm()) for q, old in zip(twin.parameters(), start, strict=True)]
        for (name, p), q, far in zip(model.named_parameters(), twin.parameters(), moved, strict=True):
            apart = float((p.detach() - q.detach()).norm())
            assert apart <= tolerance * far, f"step {number}: {name} moved by {far} and is {apart} apart"
    assert all(moved)
    return state, beside
