"""Modules of torch with several weights, or with none that multiplies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .layer import Layer, weight
from .tape import is_recording, opaque, saw


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
        for p in self.inner.parameters():
            opaque(p)
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
        opaque(self.p)
        return self.function(x, self.p)
