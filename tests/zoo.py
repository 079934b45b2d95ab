"""Tiny models that between them hold every supported kind of use, with hand-made labels of what each parameter becomes.

`build(name)` gives `(model, loss_fn, batches)`; a batch is `(input, target)`, a step `loss_fn(model(input), target)`.
`EXPECTED[name]` maps every parameter to "site", "bias of <weight>" or "declined".

Made for comparing two programs closely: activations are smooth (no kink to fall on either side of), widths differ where
the model allows (no transposition goes unseen), and no statistic is zero but for rounding, which `scale_free` blows
up to full size: no layer feeds a batch norm directly, no batch norm of zero shift feeds a layer, no attention key is a
layer of its own, and classes are many (a softmax's gradients sum to zero over the classes, so a sketch whose few signs
all agree is rounding too).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Module):
    """[B, T, 12] -> [B, 11]; the first layer sees three dimensions."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(12, 16)
        self.hidden = nn.Linear(16, 14, bias=False)
        self.head = nn.Linear(14, 11)

    def forward(self, x):
        return self.head(F.gelu(self.hidden(torch.tanh(self.tokens(x)).mean(1))))


class CNN(nn.Module):
    """[B, 3, 11, 9] -> [B, 10]"""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=2, dilation=2, bias=False)
        self.conv3 = nn.Conv2d(6, 7, 1)
        self.head = nn.Linear(7, 10)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.uniform_(0.2, 0.8)

    def forward(self, x):
        x = F.silu(self.norm(F.silu(self.conv1(x))))
        return self.head(F.silu(self.conv3(F.silu(self.conv2(x)))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """[B, T] -> [B, T, 23]; the head is the token embedding."""

    def __init__(self, vocabulary=23, length=10, width=16, heads=2, blocks=1):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.token.weight, std=0.2)
        nn.init.normal_(self.position.weight, std=0.2)
        self.head.weight = self.token.weight

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class Checkpointed(nn.Module):
    """[B, 9] -> [B, 11]; the middle is run twice."""

    def __init__(self, dropout):
        super().__init__()
        self.enter = nn.Linear(9, 12)
        self.block = nn.Sequential(
            nn.LayerNorm(12), nn.Linear(12, 18), nn.GELU(), nn.Dropout(dropout), nn.Linear(18, 12)
        )
        self.head = nn.Linear(12, 11)

    def forward(self, x):
        x = torch.tanh(self.enter(x))
        return self.head(x + checkpoint(self.block, x, use_reentrant=False))


class Broken(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        y = self.linear(x)
        torch._dynamo.graph_break()
        return x + torch.tanh(y)


class InOut(nn.Module):
    """[B, 4, 6] -> [B, 10]; no weight but one belongs to a layer, and that layer is called twice."""

    def __init__(self):
        super().__init__()
        self.enter_IO = nn.Parameter(torch.randn(6, 9) / 3)  # x @ W on three dimensions
        self.wide_IO = nn.Parameter(torch.randn(9, 11) / 3)  # x @ W + b on three dimensions
        self.wide_bias = nn.Parameter(torch.randn(11) / 3)
        self.conv1d_IO = nn.Parameter(torch.randn(11, 8) / 3)  # addmm, as GPT-2's Conv1D
        self.conv1d_bias = nn.Parameter(torch.randn(8) / 3)
        self.twice = nn.Linear(8, 8)
        self.last_OI = nn.Parameter(torch.randn(10, 8) / 3)  # F.linear
        self.last_bias = nn.Parameter(torch.randn(10) / 3)

    def forward(self, x):
        x = torch.tanh(x @ self.enter_IO)
        x = torch.tanh(x @ self.wide_IO + self.wide_bias).mean(1)
        x = torch.tanh(torch.addmm(self.conv1d_bias, x, self.conv1d_IO))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return F.linear(x, self.last_OI, self.last_bias)


def cross_entropy(logits, target):
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


MODELS = {
    # name: (model, shape of an input, number of classes or None for regression onto the output's shape)
    "mlp": (MLP, (6, 4, 12), 11),
    "cnn": (CNN, (6, 3, 11, 9), 10),
    "gpt": (GPT, (4, 10), 23),
    "checkpointed": (Checkpointed, (6, 9), 11),
    "breaks": (lambda: nn.Sequential(*(Broken(8) for _ in range(6))), (6, 8), None),
    "in_out": (InOut, (6, 4, 6), 10),
}


def build(name, *, seed=0, dtype=torch.float32, steps=20, dropout=0.0):
    """Same seed, same model and batches, whatever the dtype; the caller's random state is left as it was.
    `dropout` is for "checkpointed" alone."""
    make, shape, classes = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (make(dropout) if name == "checkpointed" else make()).to(dtype)
        batches = []
        for _ in range(steps):
            if name == "gpt":
                ids = torch.randint(classes, (shape[0], shape[1] + 1))
                batches.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
            else:
                x = torch.randn(shape).to(dtype) + 0.3
                y = torch.randn(shape).to(dtype) if classes is None else torch.randint(classes, shape[:1])
                batches.append((x, y))
    return model, F.mse_loss if classes is None else cross_entropy, batches


def _sites(*names, bias=True):
    labels = {f"{name}.weight": "site" for name in names}
    return labels | ({f"{name}.bias": f"bias of {name}.weight" for name in names} if bias else {})


def _norms(*names):
    return {f"{name}.{parameter}": "declined" for name in names for parameter in ("weight", "bias")}


EXPECTED = {
    "mlp": _sites("tokens", "head") | _sites("hidden", bias=False),
    "cnn": _sites("conv1", "conv3", "head") | _sites("conv2", bias=False) | _norms("norm"),
    "gpt": {
        **_sites("token", "blocks.0.attention.qkv", bias=False),
        **_sites("blocks.0.attention.out", "blocks.0.up", "blocks.0.down"),
        **_norms("blocks.0.norm1", "blocks.0.norm2", "norm"),
        "position.weight": "site",
    },
    "checkpointed": _sites("enter", "block.1", "block.4", "head") | _norms("block.0"),
    "breaks": _sites(*(f"{i}.linear" for i in range(6))),
    "in_out": {
        "enter_IO": "site",
        "wide_IO": "site",
        "wide_bias": "bias of wide_IO",
        "conv1d_IO": "site",
        "conv1d_bias": "bias of conv1d_IO",
        **_sites("twice"),
        "last_OI": "site",
        "last_bias": "bias of last_OI",
    },
}
