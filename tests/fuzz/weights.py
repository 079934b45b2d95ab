"""Layers whose weight is cut, joined, computed or shared before it multiplies, or does something else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .layer import SIZES, Layer, weight
from .tape import is_recording, opaque, saw


class Packed(Layer):
    """One tensor that is read in pieces."""

    rank = 3

    def draw(self, rng, x):
        self.way = rng.choice(("chunk", "rows", "columns", "part", "cat", "split"))
        i, o = x.shape[-1], rng.choice((1, 2, 3, 4))
        self.o, self.i = o, i
        if self.way == "cat":
            self.w, self.v = weight(o, i, fan=i), weight(rng.choice((1, 2, 3)), i, fan=i)
        else:
            shape = {"columns": (o, 2 * i), "part": (o + 2, i + 1)}.get(self.way, (3 * o, i))
            self.w = weight(*shape, fan=i)
        self.text = f"x = weight used by {self.way}  # w {list(self.w.shape)}"

    def piece(self, x, part, first, last):
        return saw(F.linear(x, part), self.w, x, "slice", within=(first, last))

    def forward(self, x):
        o, i, w = self.o, self.i, self.w
        every, cut = slice(None), lambda k: slice(k * o, (k + 1) * o)
        if self.way == "chunk":
            q, k, v = (self.piece(z, p, cut(j), every) for j, (z, p) in enumerate(zip((x, x.flip(1), x), w.chunk(3))))
            return torch.tanh(q) * k + v
        if self.way == "split":
            q, k = w.split([o, 2 * o])
            return torch.cat([self.piece(x, q, cut(0), every), self.piece(x.sin(), k, slice(o, None), every)], -1)
        if self.way == "rows":
            return self.piece(x, w[o:], slice(o, None), every)
        if self.way == "columns":
            return self.piece(x, w[:, :i], every, slice(0, i)) + self.piece(x.cos(), w[:, i:], every, slice(i, None))
        if self.way == "part":
            return self.piece(x, w[1:-1, :-1], slice(1, -1), slice(0, -1))
        y = F.linear(x, torch.cat([w, self.v]))
        if is_recording():
            a, b = y[..., :o], y[..., o:]
            y = torch.cat([saw(a, w, x, "cat"), saw(b, self.v, x, "cat")], -1)
        return y


class Derived(Layer):
    """A weight that is computed before it multiplies."""

    def draw(self, rng, x):
        i, o = x.shape[-1], rng.choice(SIZES)
        self.way = rng.choice(
            (
                "lora",
                "mask",
                "tanh",
                "scaled",
                "centred",
                "weight_norm",
                "weight_norm1",
                "orthogonal",
                "symmetric",
                "cast",
            )
        )
        if self.way == "symmetric":
            o, self.way = i, "symmetric" if i > 1 else "cast"  # one number is its own transpose: either role is right
        self.inner = nn.Linear(i, o, bias=rng.random() < 0.6)
        if self.way == "lora":
            self.down, self.up = weight(2, i, fan=i), weight(o, 2, fan=2)
            self.inner.weight.requires_grad_(rng.random() < 0.5)
        if self.way == "mask":
            self.register_buffer("kept", (torch.rand(o, i) < 0.7).to(torch.get_default_dtype()))
        if self.way.startswith("weight_norm"):
            nn.utils.parametrizations.weight_norm(self.inner, dim=int(self.way.endswith("1")))
        if self.way == "orthogonal":
            nn.utils.parametrizations.orthogonal(self.inner, orthogonal_map="cayley")
        self.text = f"x = Linear({i}, {o}) with a weight by {self.way}, bias {self.inner.bias is not None}"

    def forward(self, x):
        inner = self.inner
        if self.way.startswith("weight_norm"):
            scale, direction = inner.parametrizations.weight.original0, inner.parametrizations.weight.original1
            y = inner(x)
            if scale.shape == direction.shape:  # every element has its own scale: it is the weight as well
                y = saw(y, scale, x, "derived-scale", exact=False)
            elif is_recording():
                opaque(scale, "derived-scale")
            return saw(y, direction, x, "derived", exact=False)
        if self.way == "orthogonal":
            return saw(inner(x), inner.parametrizations.weight.original, x, "cayley", exact=False)
        w = inner.weight
        if self.way == "lora":
            product = saw(self.up @ self.down, self.down, self.up, "lora", inputs="first")
            product = saw(product, self.up, self.down, "lora", a=lambda t: t.mT, g=lambda t: t.mT)
            y = F.linear(x, w + 0.5 * product, inner.bias)
            return saw(y, w, x, "linear") if w.requires_grad else y
        if self.way == "symmetric":
            y = F.linear(x, w + w.T, inner.bias)
            return saw(saw(y, w, x, "symmetric"), w, x, "symmetric", inputs="first")
        effective = {
            "mask": lambda: w * self.kept,
            "tanh": lambda: w.tanh(),
            "scaled": lambda: w * 0.5,
            "centred": lambda: w - w.mean(),
            "cast": lambda: w.to(torch.float64).to(w.dtype),
        }[self.way]()
        exact = self.way == "cast"
        return saw(F.linear(x, effective, inner.bias), w, x, "linear" if exact else "derived", exact=exact)


class Tied(Layer):
    """A weight of an earlier layer once more, as it is or transposed, behind a projection where widths differ."""

    def __init__(self, rng, x, earlier):
        nn.Module.__init__(self)
        owners = [
            (n, p) for layer in earlier for n, p in layer.named_parameters() if p.dim() == 2 and p.is_floating_point()
        ]
        if not owners:
            raise ValueError("nothing to tie to")
        name, self.w = rng.choice(owners)
        self.flipped = rng.random() < 0.5
        i = self.w.shape[0 if self.flipped else 1]
        self.into = nn.Linear(x.shape[-1], i) if x.shape[-1] != i else None
        self.text = (
            f"x = {'project, ' * (self.into is not None)}F.linear(x, {name} {list(self.w.shape)}{'.T' * self.flipped})"
        )

    def forward(self, x):
        if self.into is not None:
            x = saw(self.into(x), self.into.weight, x, "linear")
        y = F.linear(x, self.w.T if self.flipped else self.w)
        return saw(y, self.w, x, "linear", inputs="first" if self.flipped and self.w.numel() > 1 else "last")


class Penalty(Layer):
    """A use of an earlier weight that is no product."""

    def __init__(self, rng, x, earlier):
        nn.Module.__init__(self)
        owners = [(n, p) for layer in earlier for n, p in layer.named_parameters() if p.dim() >= 2]
        if not owners:
            raise ValueError("nothing to penalise")
        name, self.w = rng.choice(owners)
        self.text = f"x = x + 0.1 * {name}.square().mean()"

    def forward(self, x):
        if is_recording():
            opaque(self.w)
        return x + 0.1 * self.w.square().mean()
