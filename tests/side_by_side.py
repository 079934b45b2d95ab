"""A rule with float64 state through a door, beside a reference that takes over behind each backward."""

import copy

import torch
import zoo
from stepping import stepper
from torch import nn


def wide(rule_class):
    """The rule with its floating-point state in float64, so that equations can be told from rounding."""

    def init(self, shape, device):
        made = rule_class.init(self, shape, device)
        return {name: t.double() if t.is_floating_point() else t for name, t in made.items()}

    return type(rule_class.__name__, (rule_class,), {"init": init})


def matrices(model):
    """``name: (weight, matrix, lookup)``, the ``matrix`` a function to ``[O, I]`` and its own inverse up to the shape."""
    found = {}
    for module in sorted(model.modules(), key=lambda m: isinstance(m, nn.Embedding)):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            lookup = isinstance(module, nn.Embedding)
            found.setdefault(module.weight, (lookup, (lambda t: t.T) if lookup else (lambda t: t.flatten(1))))
    names = {p: name for name, p in model.named_parameters()}
    return {names[weight]: (weight, matrix, lookup) for weight, (lookup, matrix) in found.items()}


def batched(name, steps, together):
    """A zoo model in float64, with several of its batches as one."""
    model, loss_fn, batches = zoo.build(name, dtype=torch.float64, steps=steps * together)
    groups = [batches[at : at + together] for at in range(0, len(batches), together)]
    return model, loss_fn, [tuple(map(torch.cat, zip(*group, strict=True))) for group in groups]


def side_by_side(built, rule, door, optimizer, reference, tolerance, refresh_every=1):
    """Hold every parameter to the reference's at every step. ``reference(model, optimizer)`` makes an object whose
    ``step(state)`` acts behind a backward; ``state`` is what the library's is after the step. Returns the library's."""
    model, loss_fn, batches = built
    twin = copy.deepcopy(model)
    own, other = optimizer(model.parameters()), optimizer(twin.parameters())
    beside = reference(twin, other)
    done, step = stepper(door, model, loss_fn, own, rule, refresh_every=refresh_every)
    for number, (x, y) in enumerate(batches):
        step(x, y)
        other.zero_grad()
        loss_fn(twin(x), y).backward()
        beside.step(done.mkor.state_dict())
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            apart = (p.detach() - q.detach()).norm() / q.detach().norm()
            assert apart <= tolerance, (number, name, float(apart))
    return done.mkor
