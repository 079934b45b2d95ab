"""A random program: a plan drawn from a seed, and the module that a plan builds. Parts of a plan can be left out."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layer import SIZES, Layer
from .layers import LAYERS
from .products import Embedding
from .tape import is_recording

#: weightless lines; those that end in _ change their input
LINES = (
    "torch.tanh(x)", "torch.tanh(x)", "F.silu(x)", "F.gelu(x)", "F.softplus(x)", "F.relu(x)", "x.sin()", "x * 1.5 + 0.1",
    "x.relu_()", "x.add_(0.5)", "x.mul_(0.9)", "x.clone().tanh_()", "F.dropout(x, 0.0)",
    "x.flip(-1)", "x.roll(1, -1)", "x.transpose(1, -1)", "x.transpose(1, -1).contiguous()", "x.flatten(1)",
    "torch.cat(x.chunk(2, -1)[::-1], -1)", "torch.cat([x, x.cos()], -1)", "x[..., :2]", "x[..., ::2]", "x[:, -1:]",
    "x.mean(-1, keepdim=True)", "x.sum(1, keepdim=True)", "x[:, None]", "x.softmax(-1)", "F.normalize(x, dim=-1)",
    "x[:, None].expand(-1, 2, *x.shape[1:]).flatten(1, 2)", "x.reshape(x.shape[0], -1, 1)", "F.pad(x, (1, 0))",
    "x.clamp(-2, 2)", "x * (x > 0)", "torch.where(x > 0, x, x.sin())", "x.cumsum(-1)", "x.sort(-1).values",
)  # fmt: skip
MORE_DIMENSIONS, FEWER_DIMENSIONS = "x.unsqueeze(-1)", "x.flatten(1, 2)"


@dataclass(frozen=True)
class Part:
    """``kind`` and the seed that draws the rest of it; a composite has parts inside."""

    kind: str
    seed: int
    inside: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything about one case but the parts' own draws."""

    seed: int
    parts: tuple[Part, ...]
    door: str
    shape: tuple[int, ...]
    integers: bool
    autocast: bool
    frozen: float
    unused: bool
    sizes: tuple[int, ...]
    refresh_every: int
    rule: dict[str, Any] = field(hash=False)
    dynamic: bool | None = None

    def smaller(self) -> list[Plan]:
        """Plans with one thing less."""
        plans = [replace(self, parts=parts) for parts in _fewer(self.parts) if parts]
        simpler = {"autocast": False, "frozen": 0.0, "unused": False, "sizes": self.sizes[:1], "refresh_every": 1}
        plans += [replace(self, **{k: v}) for k, v in simpler.items() if getattr(self, k) != v]
        plans += [
            replace(self, rule={k: v for k, v in self.rule.items() if k != key}) for key in self.rule if key != "form"
        ]
        return plans + ([replace(self, dynamic=None)] if self.dynamic else [])


def _fewer(parts: tuple[Part, ...]) -> list[tuple[Part, ...]]:
    found = []
    for i, part in enumerate(parts):
        before, after = parts[:i], parts[i + 1 :]
        found.append(before + after)
        if part.inside:
            found.append(before + part.inside + after)
            found += [(*before, replace(part, inside=inside), *after) for inside in _fewer(part.inside) if inside]
    return found


COMPOSITES = ("Residual", "Twice", "Branch", "Checkpoint", "EachChunk")
#: what is drawn more often
OFTEN = ("Linear", "Product", "Conv2d", "Conv1d", "Experts", "Packed", "Derived")
RULES = (
    *({"form": "forgetful"},) * 5, *({"form": "scale_free"},) * 3, {"form": "exact", "epsilon": 50.0},
    {"form": "paper", "epsilon": 50.0}, {"form": "forgetful", "bias": "joint"}, {"form": "forgetful", "bias": "off"},
    {"form": "forgetful", "statistic": "mean+gradient"}, {"form": "scale_free", "statistic": "gradient"},
    {"form": "forgetful", "clamp": 0.5}, {"form": "forgetful", "gamma": 0.8, "rescale": False},
    {"form": "forgetful", "max_factor": 4},
)  # fmt: skip


def draw(seed: int) -> Plan:
    rng = random.Random(seed)
    door = rng.choice(("step", "drop-in"))
    kinds = [*LAYERS, *OFTEN, *["line"] * 10, *COMPOSITES, *["Break"] * (3 * (door == "drop-in"))]

    def parts(count: int, depth: int = 0) -> tuple[Part, ...]:
        drawn = []
        for _ in range(count):
            kind = rng.choice(kinds)
            while depth and kind in COMPOSITES:
                kind = rng.choice(kinds)
            inside = parts(rng.randint(1, 2), depth + 1) if kind in COMPOSITES else ()
            drawn.append(Part(kind, rng.randrange(2**31), inside))
        return tuple(drawn)

    integers = rng.random() < 0.2
    rank = rng.choice((1, 2, 2, 2, 3, 3, 4)) if not integers else 1
    batch = rng.choice((2, 3, 4, 5))
    begin = (Part("Embedding", rng.randrange(2**31)),) if integers else ()
    return Plan(
        seed,
        begin + parts(rng.randint(2, 5)),
        door,
        shape=tuple(rng.choice(SIZES if i == 0 else (1, 2, 3, 4, 5)) for i in range(rank)),
        integers=integers,
        autocast=rng.random() < 0.08,
        frozen=rng.choice((0, 0, 0, 0.3)),
        unused=rng.random() < 0.15,
        sizes=(batch, batch) if rng.random() < 0.8 else (batch, batch + 1, batch + 1),
        refresh_every=rng.choice((1, 1, 1, 2)),
        rule=rng.choice(RULES),
        dynamic=True if rng.random() < 0.05 else None,
    )


class Line(Layer):
    """A line of code without weights."""

    def __init__(self, text: str) -> None:
        nn.Module.__init__(self)
        self.function, self.text = eval(f"lambda x: {text}", {"F": F, "torch": torch}), f"x = {text}"

    def forward(self, x):
        return self.function(x)


class Break(Layer):
    text = "torch._dynamo.graph_break()"

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x):
        torch._dynamo.graph_break()
        return x


class Composite(Layer):
    """Parts that are run in another way than one after the other."""

    def __init__(self, kind: str, body: Chain) -> None:
        nn.Module.__init__(self)
        self.kind, self.body = kind, body

    def forward(self, x):
        if self.kind == "Residual":
            y = self.body(x.clone())
            return x + y if x.shape == y.shape else y
        if self.kind == "Twice":
            return self.body(torch.tanh(self.body(x.clone())) + x)
        if self.kind == "Branch":
            return self.body(x.clone()) * self.body(x.cos())
        if self.kind == "EachChunk":
            return torch.cat([self.body(part) for part in x.clone().split(1, 1)[:3]], 1)
        if is_recording():
            return self.body(x.clone())
        return checkpoint(self.body, x.clone(), use_reentrant=False)

    def __repr__(self) -> str:
        return f"{self.kind}:\n" + "\n".join("    " + line for line in repr(self.body).splitlines())


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList()

    def forward(self, x):
        for item in self.items:
            x = item(x)
        return x

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.items))


class Program(nn.Module):
    """The chain, with what surrounds it; returns a vector of losses per example, ``[B]``."""

    def __init__(self, chain: Chain, autocast: bool, unused: bool) -> None:
        super().__init__()
        self.chain, self.autocast = chain, autocast
        self.unused = nn.Linear(2, 3) if unused else None

    def forward(self, x):
        if not self.autocast:
            return self.chain(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.chain(x).float()


def build(plan: Plan) -> tuple[Program, list[tuple[Tensor, Tensor]]]:
    """The module of a plan and its batches. Parts that do not fit what comes before them are left out."""
    dtype = torch.float32 if plan.autocast else torch.float64
    with torch.random.fork_rng(devices=[]), default_dtype(dtype):
        torch.manual_seed(plan.seed)
        size = plan.sizes[0]
        inputs = [_input(plan, max(size, n), dtype)[:n] for n in plan.sizes]
        earlier: list[Layer] = []
        chain, y = _grow(plan.parts, inputs[0].clone(), earlier, plan.autocast)
        if not any(p.requires_grad for p in chain.parameters()):
            layer = LAYERS["Linear"](random.Random(plan.seed), y, earlier)
            chain.items.append(layer)
        program = Program(chain, plan.autocast, plan.unused)
        rng = random.Random(plan.seed + 1)
        for p in program.parameters():
            if p.is_floating_point() and rng.random() < plan.frozen:
                p.requires_grad_(False)
        batches = []
        for x in inputs:
            with torch.no_grad():
                y = copy.deepcopy(program)(x.clone())
            batches.append((x, torch.randn_like(y)))
    return program, batches


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _input(plan: Plan, size: int, dtype: torch.dtype) -> Tensor:
    shape = (size, *plan.shape)
    return torch.randint(0, 5, shape) if plan.integers else torch.randn(shape, dtype=dtype) + 0.3


def _grow(parts: tuple[Part, ...], x: Tensor, earlier: list[Layer], autocast: bool) -> tuple[Chain, Tensor]:
    """Builds part after part, running each on what the last one has returned."""
    chain = Chain()
    for part in parts:
        fitted = _make(part, x, earlier, autocast)
        for layer in fitted:
            try:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = copy.deepcopy(layer)(x.clone())
                fits = y.dim() >= 2 and 0 < y[0].numel() <= 120 and bool(y.isfinite().all()) and len(y) == len(x)
            except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, NotImplementedError):
                fits = False
            if not fits:
                break
            chain.items.append(layer)
            earlier.append(layer)
            x = y
    return chain, x


def _make(part: Part, x: Tensor, earlier: list[Layer], autocast: bool) -> list[Layer]:
    rng = random.Random(part.seed)
    torch.manual_seed(part.seed)
    if part.kind == "line":
        return [Line(rng.choice(LINES))]
    if part.kind == "Break":
        return [Break()]
    if part.kind in COMPOSITES:
        sample = x[:, :1] if part.kind == "EachChunk" else x
        return [Composite(part.kind, _grow(part.inside, sample.clone(), list(earlier), autocast)[0])]
    kind = Embedding if part.kind == "Embedding" else LAYERS[part.kind]
    before: list[Layer] = []
    while kind.rank is not None and x.dim() != kind.rank:
        before.append(Line(MORE_DIMENSIONS if x.dim() < kind.rank else FEWER_DIMENSIONS))
        x = before[-1](x)
    try:
        return [*before, kind(rng, x, earlier)]
    except (ValueError, IndexError):
        return []
