"""What a rule means, on hooks and plain torch: calls its functions in the order of the contract, and nothing else.

Of modules: Linear, Conv2d, Embedding (also as the table of a Linear), and Experts. O outputs, I inputs, N rows.
"""

from dataclasses import replace

import torch
from rows import Experts, watch

from mkor_fx.rules import MKOR, Gradient, Shape, Use


class Contract:
    """``step()`` behind a backward; ``optimizer`` is the base optimizer over all of the model's parameters. Statistics are
    ``late`` by some steps."""

    late = 0

    def __init__(self, model, optimizer, rule, refresh_every=1):
        self.optimizer, self.refresh_every, self.count, self.size = optimizer, refresh_every, 0, rule.graft
        if rule.follows_optimizer and isinstance(optimizer, torch.optim.SGD):  # as long as what SGD would have done
            (group,) = optimizer.param_groups
            rule, self.size = replace(rule, momentum=group["momentum"], nesterov=group["nesterov"]), "moment"
        self.rule = rule
        self.state, self.layers = {}, watch(model)

    def members(self, layer, tensor):
        """Views ``[O, I]`` of what is stored like the weight, one a member; writes through them land in it."""
        return list(layer.matrix(tensor)) if layer.kind is Experts else [layer.matrix(tensor)]

    @torch.no_grad()
    def step(self):
        taken, raw = [], []
        for name, layer in self.layers.items():
            weight, bias = layer.weight, layer.bias
            if weight.grad is None:
                continue
            own = bias if bias is not None and self.rule.preconditions_bias(self.shape(layer, True)) else None
            direction, of_bias = weight.grad.clone(), None if own is None else own.grad.clone()
            pairs = zip(self.members(layer, weight.grad), self.members(layer, direction), strict=True)
            for member, (G, D) in enumerate(pairs):
                made = self.member(f"{name}:{member}", layer, member, Gradient(G, None if own is None else own.grad))
                D.copy_(made.weight)
                if own is not None:
                    of_bias.copy_(made.bias)
            pairs = [(weight, direction)] + ([] if own is None else [(own, of_bias)])
            for param, D in pairs:
                raw.append((param, param.grad))
                param.grad = None if self.rule.applies == "update" else D
                taken += [(param, D)] if self.rule.applies == "update" else []
        self.optimizer.step()
        for param, D in taken:
            group = next(g for g in self.optimizer.param_groups if any(p is param for p in g["params"]))
            param.mul_(1 - group["lr"] * group.get("weight_decay", 0)).sub_(D, alpha=group["lr"])
        for param, grad in raw:
            param.grad = grad
        if self.rule.overrides("derive"):
            for key in self.state:
                if self.due(key.rpartition(":")[0], self.rule.derive_every):
                    self.state[key] = self.rule.derive(self.state[key])
        for layer in self.layers.values():
            layer.clear()
        self.count += 1
        self.optimizer.zero_grad()

    def due(self, name, every):
        """Whether something that is done every so many steps is done to a weight now."""
        return self.count % every == 0

    def shape(self, layer, bias):
        outputs, inputs = self.members(layer, layer.weight)[0].shape
        return Shape(outputs, inputs, bias, lookup=layer.lookup)

    def member(self, key, layer, member, grad):
        shape = self.shape(layer, grad.bias is not None)
        state = self.state.get(key) or self.rule.init(shape, torch.device("cpu"))
        uses = []
        for opposite, pairs in sorted(layer.uses.items()):
            seen = shape if not opposite else Shape(shape.I, shape.O, opposite=True)
            rows = [tuple(t[member] for t in pair) if layer.kind is Experts else pair for pair in pairs]
            read = {"state": state} if self.rule.reads_state else {}
            read |= {"key": torch.tensor((self.count - self.late) << 32)} if self.rule.draws else {}
            summary = tuple(s.to(layer.weight.dtype) for s in self.summarize(seen, rows, read))
            uses.append(Use(summary, torch.tensor(float(sum(len(a) for a, _ in rows))), opposite))
        clock = torch.tensor(self.count)
        if self.due(key.rpartition(":")[0], self.refresh_every):
            state = self.rule.update(state, uses, grad, clock)
        made, self.state[key] = self.direction(self.rule.advance(state, grad, clock), grad)
        return made

    def summarize(self, shape, rows, read):
        """Of pairs of rows, one a use."""
        return self.rule.summarize(shape, *map(torch.cat, zip(*rows, strict=True)), **read)

    def direction(self, state, grad):
        if isinstance(self.rule, MKOR) or not self.rule.overrides("precondition"):
            left, right = (None if side is None else side.to(grad.weight.dtype) for side in self.rule.sides(state))
            moved = self.rule.moment(state, grad)
            grad = moved if self.size == "moment" else grad
            weight = moved.weight if left is None else left @ moved.weight
            weight = weight if right is None else weight @ right
            weight, state, *_ = self.rule.normalize(state, weight, moved.weight)
            made = Gradient(weight, moved.bias if moved.bias is None or left is None else left @ moved.bias)
        else:
            made = self.rule.precondition(state, grad)
        bias = None if made.bias is None else self.sized(made.bias, grad.bias)
        return Gradient(self.sized(made.weight, grad.weight), bias), state

    def sized(self, D, G):
        if self.size is None:
            return D
        size = {"gradient": G.norm(), "moment": G.norm(), "rms": 0.2 * D.numel() ** 0.5}[self.size]
        return D * (size / D.norm())
