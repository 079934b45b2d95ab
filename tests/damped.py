"""Eager MKOR in its damped form, on hooks, from the equations alone: S is kept whole and inverted at every step.

    S <- gamma S + (1 - gamma) (identity + kappa d C / tr C), the identity as unit vectors in turn
    B <- mu B + G, M = G + mu B, D = S_L^-1 M S_R^-1, its rows, then its columns over their mean squares,
    W <- W (1 - lr wd) - lr s sqrt(O I) / |D| D, s = max(.2, min(|m| / (sqrt(v) c), .03 |W| / lr)) as if m and v were Adam's
    c = max(1/8, <D, M> / |D| |M|)
N rows, O outputs, I inputs, d either; of modules Linear, Conv2d, and Embedding as the table of a Linear.
"""
import math

import torch
import torch.nn.functional as F
from hashed import signs
from torch import nn


class Damped:
    def __init__(self, model, optimizer, *, statistic="rows", rank=8, momentum=0.9, nesterov=True, beta2=0.95, gamma=0.95,
                 kappa=3.0):
        vars(self).update(locals(), steps=0, rows={}, sites={}, S={}, B={}, Q={})
        for use in sorted(model.modules(), key=lambda m: isinstance(m, nn.Embedding)):  # embeddings after heads
            if isinstance(use, nn.Linear | nn.Conv2d):
                self.sites[use.weight] = use.weight.flatten(1).shape
            if getattr(use, "weight", None) in self.sites:
                use.register_forward_hook(lambda use, x, y: self.watch(use, x[0].detach(), y))

    def watch(self, use, x, y):
        def record(g, x=x):
            if isinstance(use, nn.Conv2d):
                x, g = F.unfold(x, use.kernel_size, use.dilation, use.padding, use.stride).mT, g.movedim(1, -1)
            x = F.one_hot(x, len(use.weight)).to(g) if isinstance(use, nn.Embedding) else x
            uses = self.rows.setdefault(use.weight, {}).setdefault(isinstance(use, nn.Embedding), [])
            uses.append((x.flatten(0, -2), g.flatten(0, -2)))
        y.requires_grad and y.register_hook(record)

    def blocks(self, weight, G_OI):  # pairs of [R, O] and [R, I]
        for turned, uses in sorted(self.rows[weight].items()):
            a, g = (torch.cat(rows) for rows in zip(*uses, strict=True))
            if "mean" in self.statistic:
                yield (g.sum(0)[None], a.mean(0)[None])[:: -1 if turned else 1]
            if "rows" in self.statistic:
                s = [signs(self.steps << 32, side, len(a), self.rank).to(a) for side in (0, 1)]
                yield (s[1].T @ g, s[0].T @ a)[:: -1 if turned else 1]
        if "gradient" in self.statistic:
            s = [signs(self.steps, 2 + i, n, self.rank).to(G_OI) for i, n in enumerate(G_OI.shape[::-1])]
            yield (G_OI @ s[0]).T, s[1].T @ G_OI

    def moved(self, S, blocks):
        d, gamma = len(S), self.gamma
        m = min(d, max(8, math.ceil((1 - gamma) * d)))
        visited = F.one_hot((torch.arange(m) + self.steps * m) % d, d).sum(0).to(S) * d / m
        C = sum(V.T @ V / V.norm() ** 2 for V in blocks) / len(blocks)
        return gamma * S + (1 - gamma) * (visited.diag() + self.kappa * d * C)

    def length(self, W, G, M, D, lr):
        beta2, t, n, nesterov = self.beta2, self.steps + 1, G.numel() ** 0.5, self.nesterov
        v = self.Q[W] = beta2 * self.Q.get(W, 0) + (1 - beta2) * (G.norm() / n) ** 2
        m = (1 - self.momentum) / (1 - self.momentum ** (t + nesterov)) * M / max(1 / 8, (D * M).sum() / D.norm() / M.norm())
        return max(0.2, min(m.norm() / n / (v / (1 - beta2**t)).sqrt(), 0.03 * W.norm() / n / lr)) if beta2 else 0.2

    @torch.no_grad()
    def step(self):
        for W, shape in self.sites.items():
            G, (L, R) = W.grad.flatten(1), self.S.get(W, [torch.eye(n).to(W) for n in shape])
            left, right = zip(*self.blocks(W, G), strict=True)
            L, R = self.S[W] = self.moved(L, left), self.moved(R, right)
            B = self.B[W] = self.momentum * self.B.get(W, torch.zeros_like(G)) + G
            M = G + self.momentum * B if self.nesterov else B
            D = L.inverse() @ M @ R.inverse()
            for dim in (1, 0) if self.beta2 else ():
                new = (1 - self.beta2) * (D * D).mean(dim, keepdim=True) / (D * D).mean()
                D = D / self.Q.setdefault((W, dim), torch.zeros_like(new)).mul_(self.beta2).add_(new).sqrt()
            group = next(g for g in self.optimizer.param_groups if {W} & {*g["params"]})
            D *= group["lr"] * self.length(W, G, M, D, group["lr"]) * shape.numel() ** 0.5 / D.norm()
            W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(D.view_as(W)).grad = None
        self.rows, self.steps = {}, self.steps + 1
        self.optimizer.step(), self.optimizer.zero_grad()
