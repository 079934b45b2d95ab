"""Layers with a weight. Each knows how to draw itself for an input, prints itself, and says to the tape what it did."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tape import by_group, flat, is_recording, one_hot, opaque, patches, positions, saw

SIZES = (1, 2, 3, 4, 5, 6, 8)


class Layer(nn.Module):
    """``rank`` is the number of dimensions that the input needs (None: any of two or more), ``text`` the program's line."""

    rank: int | None = None
    text = ""

    def __init__(self, rng: random.Random, x: Tensor, earlier: list[Layer]) -> None:
        super().__init__()
        self.draw(rng, x)

    def draw(self, rng: random.Random, x: Tensor) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.text


def weight(*shape: int, fan: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / max(1, fan) ** 0.5)


def vector(rng: random.Random, size: int) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(size) / 2) if rng.random() < 0.6 else None


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
            o = i
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


class Attention(Layer):
    rank = 3

    def draw(self, rng, x):
        width = x.shape[-1]
        heads = rng.choice([h for h in (1, 2, 3) if width % h == 0])
        self.cross = rng.choice(("self", "cross", "apart"))
        sizes = {} if self.cross != "apart" else {"kdim": width, "vdim": width + 1}
        self.inner = nn.MultiheadAttention(width, heads, bias=rng.random() < 0.7, batch_first=True, **sizes)
        with torch.no_grad():
            for p in self.inner.parameters():
                p.copy_(torch.randn_like(p) / width**0.5)
        self.weights = rng.random() < 0.3
        self.text = (
            f"x = MultiheadAttention({width}, {heads}), {self.cross}, biases {self.inner.in_proj_bias is not None}"
        )

    def others(self, x):
        if self.cross == "self":
            return x, x
        memory = x.sin()[:, : max(1, x.shape[1] - 1)]
        return (memory, memory) if self.cross == "cross" else (memory, F.pad(memory.cos(), (0, 1), value=0.5))

    def forward(self, x):
        k, v = self.others(x)
        if not is_recording():
            return self.inner(x, k, v, need_weights=self.weights)[0]
        m, e = self.inner, x.shape[-1]
        w, b, every = m.in_proj_weight, m.in_proj_bias, slice(None)
        bias = [None] * 3 if b is None else b.split(e)
        if self.cross == "self":
            q, k, v = saw(F.linear(x, w, b), w, x, "linear").chunk(3, -1)
        elif self.cross == "cross":
            q = saw(F.linear(x, w[:e], bias[0]), w, x, "slice", within=(slice(0, e), every))
            both = F.linear(k, w[e:], None if b is None else b[e:])
            k, v = saw(both, w, k, "slice", within=(slice(e, None), every)).chunk(2, -1)
        else:
            ways = zip((m.q_proj_weight, m.k_proj_weight, m.v_proj_weight), (x, k, v), bias)
            q, k, v = (saw(F.linear(z, p, c), p, z, "linear") for p, z, c in ways)
        q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        y = (scores @ v).transpose(1, 2).flatten(2)
        return saw(m.out_proj(y), m.out_proj.weight, y, "linear")


class Cell(Layer):
    """A recurrent cell over ``[B, T, I]``."""

    rank = 3

    def draw(self, rng, x):
        make = rng.choice((nn.RNNCell, nn.GRUCell, nn.LSTMCell))
        self.inner = make(x.shape[-1], rng.choice((1, 2, 3, 4)), bias=rng.random() < 0.7)
        self.text = f"x = {self.inner} over x[:, :3]"

    def forward(self, x):
        h, outputs = x.new_zeros(x.shape[0], self.inner.hidden_size), []
        state = (h, h) if isinstance(self.inner, nn.LSTMCell) else h
        for t in range(min(3, x.shape[1])):
            state = self.recorded(x[:, t], state) if is_recording() else self.inner(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)

    def recorded(self, x, state):
        m, h = self.inner, state[0] if isinstance(state, tuple) else state
        i = saw(F.linear(x, m.weight_ih, m.bias_ih), m.weight_ih, x, "cell")
        r = saw(F.linear(h, m.weight_hh, m.bias_hh), m.weight_hh, h, "cell")
        if isinstance(m, nn.RNNCell):
            return torch.tanh(i + r)
        if isinstance(m, nn.GRUCell):
            (ir, iz, i_n), (hr, hz, hn) = i.chunk(3, 1), r.chunk(3, 1)
            z = torch.sigmoid(iz + hz)
            return (1 - z) * torch.tanh(i_n + torch.sigmoid(ir + hr) * hn) + z * h
        a, f, g, o = (i + r).chunk(4, 1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(a) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


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
        return saw(y, self.w, x, "linear", inputs="first" if self.flipped else "last")


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


class Norm(Layer):
    def draw(self, rng, x):
        n, c = x.dim(), x.shape[1]
        makes = [
            lambda: nn.LayerNorm(x.shape[-1]),
            lambda: nn.RMSNorm(x.shape[-1]),
            lambda: nn.LayerNorm(x.shape[1:]),
            lambda: nn.GroupNorm(rng.choice([g for g in (1, 2, c) if c % g == 0]), c),
            lambda: (nn.BatchNorm1d if n <= 3 else nn.BatchNorm2d if n == 4 else nn.BatchNorm3d)(c),
        ]
        self.inner = rng.choice(makes)()
        with torch.no_grad():
            for p in self.inner.parameters():
                p.uniform_(0.5, 1.5)
        self.text = f"x = {self.inner}(x)"

    def forward(self, x):
        return self.inner(x)


ELEMENTWISE = ("x * p", "x + p", "x * p.exp()", "torch.lerp(x, p, 0.3)", "x * torch.sigmoid(p) + p")


class Elementwise(Layer):
    """Parameters of one or more dimensions that multiply nothing."""

    def draw(self, rng, x):
        text = rng.choice(ELEMENTWISE)
        shape = rng.choice([x.shape[-1:], x.shape[1:], (1, *x.shape[1:]), (1,) * x.dim()])
        self.p = weight(*shape, fan=1)
        self.function = eval(f"lambda x, p: {text}", {"torch": torch})
        self.text = f"x = {text}  # p {list(shape)}"

    def forward(self, x):
        return self.function(x, self.p)


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


CONVOLUTIONS = {c.__name__: c for c in (convolution(n, t) for n in (1, 2, 3) for t in (False, True))}
LAYERS: dict[str, type[Layer]] = {
    **{c.__name__: c for c in (Linear, Product, HeadsOut, HeadsIn, Experts, Packed, Derived, Attention, Cell, Tied)},
    **CONVOLUTIONS,
    **{c.__name__: c for c in (Norm, Elementwise, Penalty)},
}
