"""The eager reference over recorded rows: no hooks on modules, and in float64."""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
from reference import Reference
from torch import Tensor

from .tape import Use

#: batches of products in one operation, whose rows may be routed: those without a gradient take no part
ROUTED = {"experts", "broadcast", "einsum-of-one"}


class Failure(Exception):
    """``args``: what failed (kept while a program is made smaller), and the numbers."""


class Recorded(Reference):
    """The eager reference over recorded rows: the equations of ``Reference``, no hooks on modules."""

    def __init__(self, model, optimizer, rule, refresh_every, tolerance):
        super().__init__(
            torch.nn.Module(), optimizer, form=rule.form, statistic=rule.statistic, gamma=rule.gamma, kappa=rule.kappa,
            epsilon=rule.stabiliser_threshold, zeta=rule.pull, rescale=rule.rescale, bias=rule.bias, clamp=rule.clamp,
            max_factor=rule.max_factor, factor_dtype=rule.factor_dtype, refresh_every=refresh_every,
        )  # fmt: skip
        self.names = {p: name for name, p in model.named_parameters()}
        self.math, self.doubtful, self.tolerance = torch.float64, False, tolerance
        self.noise: dict[str, float] = {}  # the length of each gradient if it were bfloat16's rounding alone

    def unless_noise(self, v, rows):
        """Sums that rounding may decide are not for comparing."""
        self.doubtful |= self.form == "scale_free" and bool(0 < v.norm() < 1e-6 * rows.norm())
        return super().unless_noise(v, rows)

    @torch.no_grad()
    def take(self, tape: list[Use], coverage) -> None:
        """One step: statistics off the tape, factors of what ``coverage`` says is a site, directions into ``.grad``."""
        uses = defaultdict(list)
        for use in tape:
            uses[use.weight].append(use)
        biases = {entry.bias_of: entry.name for entry in coverage.covered if entry.bias_of}
        params = {name: p for p, name in self.names.items()}
        for entry in coverage.covered:
            if not entry.bias_of:
                bias = params[biases[entry.name]] if entry.name in biases else None
                self.site(entry.name, params[entry.name], bias, uses[params[entry.name]])
        self.steps += 1

    def site(self, name: str, W: Tensor, b: Tensor | None, uses: list[Use]) -> None:
        if W.grad is None:
            return
        if not uses or any(use.matrix is None for use in uses):
            raise Failure("a site that is no product", name)
        (matrix, *others) = {use.matrix for use in uses}
        if others:
            raise Failure("a site whose uses are different matrices", f"{name}: {[matrix, *others]}")
        self.noise[name] = 2**-8 * sum(float(use.g.norm() * use.a.norm()) for use in uses)
        if b is not None:
            self.noise[self.names[b]] = 2**-8 * sum(float(use.g.norm()) for use in uses)
        flip = all(use.inputs == "first" for use in uses)
        G = matrix.of(W.grad).to(self.math)
        G = G[0] if len(G) == 1 and G.dim() == 3 else G  # a batch of one
        self.doubtful |= self.form == "scale_free" and bool(G.norm() < 1e-9)
        G = G.mT if flip else G
        joint = b is not None and self.bias == "joint"
        base = [use for use in uses if (use.inputs == "first") == flip]
        if b is not None:
            sums = [use.g.double().sum(-2).reshape(b.shape) for use in base]
            some = [sum(chosen) for n in range(len(sums), 0, -1) for chosen in itertools.combinations(sums, n)]
            total = min(some[:4000], key=lambda total: (total - b.grad.double()).norm())
            close(f"bias of {name} is no row sum of g", b.grad.double(), total, self.tolerance)
            if joint:
                G = torch.cat([G, b.grad.reshape(*G.shape[:-1], 1).to(self.math)], -1)
        members = range(G.shape[0]) if G.dim() == 3 else [None]
        sides = {f"{name}.{s}": n for s, n in zip("LR", G.shape[-2:]) if n <= self.max_factor}
        if all(use.kind in ("embedding", "index") for use in uses):
            sides.pop(f"{name}.R", None)
        for key, n in sides.items():
            eye = torch.eye(n, dtype=self.factor_dtype)
            self.state.setdefault(key, eye if G.dim() == 2 else eye.expand(len(G), n, n).clone())
        directions, bias_directions = [], []
        for e in members:
            one = G if e is None else G[e]
            self.rows = self.rows_of(uses, flip, e)
            factors = []
            pairs = list(zip(*self.vectors("w", one), strict=True))
            for key, vs, n in zip((f"{name}.L", f"{name}.R"), pairs, one.shape):
                if key not in self.state:
                    factors.append(torch.eye(n, dtype=self.math))
                    continue
                at = self.state[key] if e is None else self.state[key][e]
                if self.steps % self.refresh_every == 0:
                    at.copy_(self.refreshed(at.to(self.math), vs))
                factors.append(at.to(self.math))
            D = self.rescaled(factors[0] @ one @ factors[1], one)
            directions.append(D[:, :-1] if joint else D)
            if b is not None:
                g = b.grad.reshape(-1, len(D))[e or 0].to(self.math)
                bias_directions.append(D[:, -1] if joint else self.rescaled(factors[0] @ g, g))
        D = directions[0] if G.dim() == 2 else torch.stack(directions)
        W.grad = W.grad.clone().copy_(matrix.back(D.mT if flip else D, W.shape))  # autograd's may be expanded
        if b is not None:
            b.grad = b.grad.clone().copy_(torch.stack(bias_directions).reshape(b.shape))

    def rows_of(self, uses, flip, e):
        """As ``Reference.vectors`` wants them; it calls uses in the opposite orientation embeddings."""
        found = {}
        for use in uses:
            if use.kind in ROUTED and use.g.dim() == 3 and len(use.g) > 1:
                live = (use.g[e] != 0).any(-1)
                pair = [r[e][live].to(self.math).clamp(-self.clamp, self.clamp) for r in (use.a, use.g)]
                found.setdefault(("w", (use.inputs == "first") != flip), []).append(pair)
                continue
            pair = [
                (r if r.dim() == 2 else r[e or 0]).to(self.math).clamp(-self.clamp, self.clamp) for r in (use.a, use.g)
            ]
            found.setdefault(("w", (use.inputs == "first") != flip), []).append(pair)
        return found


def close(what: str, value: Tensor, expected: Tensor, relative: float = 1e-7, absolute: float = 1e-11) -> None:
    if value.shape != expected.shape:
        raise Failure(what, f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    error, bound = (value - expected).norm(), relative * expected.norm() + absolute
    if not error <= bound:
        raise Failure(what, f"off by {error:.3g} of {expected.norm():.3g}")
