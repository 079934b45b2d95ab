"""What a rule means, on hooks and plain torch: calls its functions in the order of the contract, and nothing else.

Of modules: Linear, Conv2d, Embedding (also as the table of a Linear), and Experts below. O outputs, I inputs, N rows.
"""

from dataclasses import replace

import torch
from torch import nn

from mkor_fx.rules import MKOR, Gradient, Shape, Use


class Experts(nn.Module):
    """[E, N, I] -> [E, N, O], a matrix each."""

    def __init__(self, members, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(members, inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return torch.bmm(x, self.weight)


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
        self.rows, self.state, self.sites = {}, {}, {}
        names = {p: name for name, p in model.named_parameters()}
        for module in sorted(model.modules(), key=lambda m: isinstance(m, nn.Embedding)):
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | Experts):
                name = names[module.weight]
                self.sites.setdefault(name, (module.weight, getattr(module, "bias", None), type(module)))
                module.register_forward_hook(lambda m, x, y, name=name: self.watch(name, m, x[0].detach(), y))

    def watch(self, name, module, x, y):
        def record(g, x=x):
            if isinstance(module, Experts):
                pairs = list(zip(x, g, strict=True))
            elif isinstance(module, nn.Conv2d):
                x = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                pairs = [(x.mT.flatten(0, 1), g.movedim(1, -1).flatten(0, -2))]
            elif isinstance(module, nn.Embedding):
                pairs = [(nn.functional.one_hot(x, len(module.weight)).to(g.dtype).flatten(0, -2), g.flatten(0, -2))]
            else:
                pairs = [(x.flatten(0, -2), g.flatten(0, -2))]
            self.rows.setdefault(name, {}).setdefault(type(module) is nn.Embedding, []).append(pairs)
        if y.requires_grad:
            y.register_hook(record)

    def matrices(self, weight, kind):
        """Views ``[O, I]`` of what is stored like the weight, one a member; writes through them land in it."""
        if kind is Experts:
            return [part.T for part in weight]
        return [weight.T] if kind is nn.Embedding else [weight.flatten(1)]

    @torch.no_grad()
    def step(self):
        taken, raw = [], []
        for name, (weight, bias, kind) in self.sites.items():
            if weight.grad is None:
                continue
            own = bias if bias is not None and self.rule.preconditions_bias(self.shape(weight, kind, True)) else None
            direction, of_bias = weight.grad.clone(), None if own is None else own.grad.clone()
            pairs = zip(self.matrices(weight.grad, kind), self.matrices(direction, kind), strict=True)
            for member, (G, D) in enumerate(pairs):
                made = self.member(f"{name}:{member}", name, member, Gradient(G, None if own is None else own.grad))
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
        self.rows, self.count = {}, self.count + 1
        self.optimizer.zero_grad()

    def due(self, name, every):
        """Whether something that is done every so many steps is done to a weight now."""
        return self.count % every == 0

    def shape(self, weight, kind, bias):
        outputs, inputs = self.matrices(weight, kind)[0].shape
        return Shape(outputs, inputs, bias, lookup=kind is nn.Embedding)

    def member(self, key, name, member, grad):
        weight, _, kind = self.sites[name]
        shape = self.shape(weight, kind, grad.bias is not None)
        state = self.state.get(key) or self.rule.init(shape, torch.device("cpu"))
        uses = []
        for opposite, groups in sorted(self.rows[name].items()):
            a, g = (torch.cat(part) for part in zip(*(pairs[member] for pairs in groups), strict=True))
            turned = opposite and kind is not nn.Embedding
            seen = shape if not turned else Shape(shape.I, shape.O, opposite=True)
            read = {"state": state} if self.rule.reads_state else {}
            read |= {"key": torch.tensor((self.count - self.late) << 32)} if self.rule.draws else {}
            summary = tuple(s.to(a.dtype) for s in self.rule.summarize(seen, a, g, **read))
            uses.append(Use(summary, torch.tensor(float(len(a))), turned))
        clock = torch.tensor(self.count)
        if self.due(name, self.refresh_every):
            state = self.rule.update(state, uses, grad, clock)
        made, self.state[key] = self.direction(self.rule.advance(state, grad, clock), grad)
        return made

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
