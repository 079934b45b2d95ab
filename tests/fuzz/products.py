"""Layers that multiply by a weight as it is stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layer import SIZES, Layer, vector, weight
from .tape import by_group, flat, is_recording, one_hot, patches, positions, saw


class Linear(Layer):
    def draw(self, rng, x):
        self.inner = nn.Linear(x.shape[-1], rng.choice(SIZES), bias=rng.random() < 0.6)
        self.text = f"x = {self.inner}(x)"

    def forward(self, x):
        return saw(self.inner(x), self.inner.weight, x, "linear")


SPELLINGS = {
    # text: (inputs, smallest rank)
    "F.linear(x, w)": ("last", 2),
    "x @ w": ("first", 2),
    "x @ w.T": ("last", 2),
    "x.matmul(w.t())": ("last", 2),
    "(w @ x.mT).mT": ("last", 2),
    "torch.addmm(torch.ones_like(w[0]), x.flatten(0, -2), w).unflatten(0, x.shape[:-1])": ("first", 2),
    "torch.mm(x.flatten(0, -2), w).unflatten(0, x.shape[:-1])": ("first", 2),
    "torch.einsum('...i,io->...o', x, w)": ("first", 2),
    "torch.einsum('...i,oi->...o', x, w)": ("last", 2),
    "torch.einsum('oi,...i->...o', w, x)": ("last", 2),
    "torch.einsum('bti,io->bto', x, w)": ("first", 3),
    "torch.einsum('bti,oi->bot', x, w).mT": ("last", 3),
    "torch.tensordot(x, w, dims=([-1], [0]))": ("first", 2),
    "(x[..., None, :] * 1 @ w)[..., 0, :]": ("first", 2),
    "F.linear(x, w.t().contiguous().t())": ("last", 2),
    "F.conv1d(x.flatten(0, -2)[..., None], w[..., None])[..., 0].unflatten(0, x.shape[:-1])": ("last", 2),
}


class Product(Layer):
    def draw(self, rng, x):
        self.text = rng.choice([text for text, (_, rank) in SPELLINGS.items() if x.dim() >= rank])
        self.inputs, i, o = SPELLINGS[self.text][0], x.shape[-1], rng.choice(SIZES)
        self.w = weight(*((o, i) if self.inputs == "last" else (i, o)), fan=i)
        self.b = vector(rng, o)
        self.kind = "product" if "einsum" not in self.text else "einsum" if i > 1 else "einsum-of-one"
        self.function = eval(f"lambda x, w: {self.text}", {"F": F, "torch": torch})
        self.text = f"x = {self.text}{' + b' * (self.b is not None)}  # w {list(self.w.shape)}"

    def forward(self, x):
        y = saw(self.function(x, self.w), self.w, x, self.kind, inputs=self.inputs)
        return y if self.b is None else y + self.b


class HeadsOut(Layer):
    """``[B, T, I]`` with ``[H, I, K]`` to ``[B, T, H K]``: a matrix ``[I, H K]`` that is not stored as one."""

    rank = 3

    def draw(self, rng, x):
        h, k, i = rng.choice((1, 2, 3)), rng.choice((1, 2, 4)), x.shape[-1]
        self.equation, self.last = rng.choice((("bti,hik->bthk", True), ("bti,hik->bhtk", False)))
        self.w = weight(h, i, k, fan=i)
        self.text = f"x = torch.einsum('{self.equation}', x, w), heads flat  # w {list(self.w.shape)}"

    def forward(self, x):
        y = torch.einsum(self.equation, x, self.w)
        y = (y if self.last else y.transpose(1, 2)).flatten(2)
        return saw(
            y, self.w, x, "heads" if x.shape[-1] > 1 else "einsum-of-one", inputs="first", dims=((), (1,), (0, 2))
        )


class HeadsIn(Layer):
    """``[B, T, H K]`` with ``[H, K, O]`` to ``[B, T, O]``"""

    rank = 3

    def draw(self, rng, x):
        h = rng.choice([h for h in (1, 2, 3, 4) if x.shape[-1] % h == 0])
        k, o = x.shape[-1] // h, rng.choice(SIZES)
        self.w = weight(h, k, o, fan=h * k)
        self.text = f"x = torch.einsum('bthk,hko->bto', x.unflatten(-1, ({h}, {k})), w)  # w {list(self.w.shape)}"

    def forward(self, x):
        y = torch.einsum("bthk,hko->bto", x.unflatten(-1, self.w.shape[:2]), self.w)
        return saw(
            y, self.w, x, "heads" if x.shape[-1] > 1 else "einsum-of-one", inputs="first", dims=((), (0, 1), (2,))
        )


EXPERTS = {
    # x [N, E, I]; text: ("last" for [E, O, I])
    "torch.bmm(x.transpose(0, 1), w).transpose(0, 1)": "first",
    "torch.bmm(x.transpose(0, 1), w.mT).transpose(0, 1)": "last",
    "torch.bmm(w, x.permute(1, 2, 0)).permute(2, 0, 1)": "last",
    "torch.baddbmm(torch.ones_like(w[:, :1]), x.transpose(0, 1), w).transpose(0, 1)": "first",
    "torch.einsum('nei,eio->neo', x, w)": "first",
    "torch.einsum('nei,eoi->neo', x, w)": "last",
    "torch.einsum('eoi,nei->neo', w, x)": "last",
    "(x[..., None, :] @ w)[..., 0, :]": "first",
    "(x.transpose(0, 1) @ w).transpose(0, 1)": "first",
    "torch.stack([x[:, e] @ w[e] for e in range(w.shape[0])], 1)": "first",
    "torch.stack([F.linear(v, m) for v, m in zip(x.unbind(1), w.unbind(0))], 1)": "last",
}


class Experts(Layer):
    def draw(self, rng, x):
        e = rng.choice([e for e in (1, 2, 3, 4) if x.shape[-1] % e == 0])
        text = rng.choice(list(EXPERTS))
        self.e, self.inputs, i, o = e, EXPERTS[text], x.shape[-1] // e, rng.choice((1, 2, 3, 4))
        self.kind = "stack" if text.startswith("torch.stack") else "broadcast" if "None" in text else "experts"
        if "einsum" in text and i == 1:  # torch multiplies and sums: no product
            self.kind = "einsum-of-one"
        self.w = weight(*((e, o, i) if self.inputs == "last" else (e, i, o)), fan=i)
        self.function = eval(f"lambda x, w: {text}", {"F": F, "torch": torch})
        self.text = f"x = flat(({text})(x as [N, {e}, {i}]))  # w {list(self.w.shape)}"

    def forward(self, x):
        split = x.flatten(0, -2).unflatten(-1, (self.e, -1))
        y = self.function(split, self.w)
        by_expert = lambda rows: rows.transpose(0, 1)
        y = saw(y, self.w, split, self.kind, inputs=self.inputs, a=by_expert, g=by_expert, dims=((0,), (1,), (2,)))
        return y.flatten(1).unflatten(0, x.shape[:-1])


class Conv(Layer):
    """Any number of dimensions, transposed or not."""

    dimensions, transposed = 1, False

    def draw(self, rng, x):
        n, c = self.dimensions, x.shape[1]
        groups = rng.choice([1, 1, 1, *(g for g in (2, 3, 4, c) if c % g == 0)])
        out = groups * rng.choice((1, 2, 3))
        kernel = [rng.choice((1, 2, 3)) for _ in range(n)]
        stride, dilation = ([rng.choice((1, 1, 2)) for _ in range(n)] for _ in range(2))
        options: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": rng.random() < 0.6}
        padding: Any = [rng.choice((0, 1, 2)) for _ in range(n)]
        if not self.transposed:
            if rng.random() < 0.25:
                padding, stride = rng.choice(("same", "valid")), [1] * n
            options["padding_mode"] = rng.choice(("zeros", "zeros", "circular", "reflect", "replicate"))
        elif rng.random() < 0.3:
            options["output_padding"] = [rng.randrange(max(s, d)) for s, d in zip(stride, dilation)]
        name = f"Conv{'Transpose' * self.transposed}{n}d"
        self.inner = getattr(nn, name)(c, out, kernel, stride=stride, padding=padding, **options)
        self.groups = groups
        self.kind = f"conv{'-transpose' * self.transposed}{n}d{'-grouped' * (groups > 1)}"
        self.text = f"x = {self.inner}(x)"

    def forward(self, x):
        c, y = self.inner, self.inner(x)
        if not is_recording():
            return y
        n, g = self.dimensions, self.groups
        view = (g, c.weight.shape[0] // g, *c.weight.shape[1:]) if g > 1 else tuple(c.weight.shape)
        dims = ((0,), (1,), tuple(range(2, len(view)))) if g > 1 else ((), (0,), tuple(range(1, len(view))))

        def small(t):
            return by_group(positions(t), g)

        def large(t):
            return by_group(patches(t, c.kernel_size, c.stride, c.dilation), g)

        if self.transposed:
            last = [(x.shape[2 + d] - 1) * c.stride[d] + (c.kernel_size[d] - 1) * c.dilation[d] + 1 for d in range(n)]
            pad = [s for d in reversed(range(n)) for s in (c.padding[d], last[d] - c.padding[d] - y.shape[2 + d])]
            ways = {"inputs": "first", "a": small, "g": lambda t: large(F.pad(t, pad))}
        else:
            mode = "constant" if c.padding_mode == "zeros" else c.padding_mode
            pad = c._reversed_padding_repeated_twice
            ways = {"inputs": "last", "a": lambda t: large(F.pad(t, pad, mode=mode)), "g": small}
        return saw(y, c.weight, x, self.kind, view=view, dims=dims, **ways)


def convolution(n: int, transposed: bool) -> type[Conv]:
    name = f"Conv{'Transpose' * transposed}{n}d"
    return type(name, (Conv,), {"dimensions": n, "transposed": transposed, "rank": n + 2})


class Embedding(Layer):
    """Only at the beginning: ``[B, T]`` integers."""

    rank = 2
    integers = True

    def draw(self, rng, x):
        v, d = rng.choice((5, 6)), rng.choice(SIZES)
        self.way = rng.choice(("module", "padding", "functional", "index"))
        self.padding = 1 if self.way == "padding" else None
        self.inner = nn.Embedding(v, d, padding_idx=self.padding)
        self.text = f"x = {self.inner} by {self.way}"

    def forward(self, x):
        w = self.inner.weight
        y = F.embedding(x, w) if self.way == "functional" else w[x] if self.way == "index" else self.inner(x)
        if not is_recording():
            return y
        kept = (x != self.padding).flatten() if self.padding is not None else slice(None)
        kind = "index" if self.way == "index" else "embedding"
        a = lambda ids: one_hot(ids, w.shape[0], w.dtype, self.padding)
        return saw(y, w, x, kind, inputs="first", a=a, g=lambda t: flat(t)[kept])
