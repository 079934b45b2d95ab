"""Real data, a model and a loss: what the demo trains and the sweep measures.

Every side of a comparison sees the same batches in the same order, starts from the same weights, and follows the same
cosine schedule over the same number of steps. Inputs are centred with the training set's mean and scaled with its
standard deviation: without that a second-order method is credited with what a line of preprocessing does.

An optimizer's job is to lower the training loss, so that is what is compared, on a fixed set of training examples. The
loss on held-out examples is reported beside it: a lower training loss need not be a better model.

Shapes: B batch, P pixels, T positions, V symbols.
"""

import gzip
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import GPT, cnn, mlp

Batch = tuple[Tensor, Tensor]


class Source(Protocol):
    """One part (training or held out) of a data set."""

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """`size` examples and their targets, chosen by `generator` alone."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Independent examples, drawn without replacement within a batch."""

    inputs: Tensor
    targets: Tensor

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        chosen = torch.randperm(len(self.inputs), generator=generator)[:size]
        return self.inputs[chosen], self.targets[chosen]


@dataclass(frozen=True, eq=False)
class Text:
    """One long run of symbols; an example is a window of it, its target the window one symbol later (both `[T]`)."""

    symbols: Tensor
    window: int

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(self.symbols) - self.window, (size, 1), generator=generator)
        positions = starts + torch.arange(self.window)
        return self.symbols[positions], self.symbols[positions + 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A benchmark. `rates` holds the best learning rate of each side of the demo (benchmarks/convergence.py found
    them)."""

    name: str
    title: str
    load: Callable[[], tuple[Source, Source]]
    architecture: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    batch: int
    steps: int
    evaluate_every: int
    evaluation_size: int
    rates: dict[str, float] = field(default_factory=dict)  # none: not for the demo
    inner: str = "*"  # pattern of the names whose matrices Muon is for
    grid: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)  # rates to begin a search with

    def hidden(self, model: nn.Module) -> list[nn.Parameter]:
        """The matrices that Muon is for: embeddings and heads of a language model are not."""
        return [p for name, p in model.named_parameters() if p.dim() == 2 and fnmatchcase(name, self.inner)]

    def build(self, seed: int) -> nn.Module:
        """A freshly initialised model; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.architecture()

    def batches(self, seed: int, steps: int | None = None) -> Iterator[Batch]:
        """The training batches of one run, in an order fixed by the seed."""
        training, _ = self.load()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps if steps is None else steps):
            yield training.draw(self.batch, generator)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Losses on fixed training examples and on as many held-out ones, the same at every call."""
        parts = evaluation_batches(self.load, self.evaluation_size)
        model.eval()
        training, held_out = (self.loss_fn(model(inputs), targets).item() for inputs, targets in parts)
        model.train()
        return training, held_out


@cache
def evaluation_batches(load: Callable[[], tuple[Source, Source]], size: int) -> list[Batch]:
    """The training and the held-out examples that every evaluation uses."""
    return [part.draw(size, torch.Generator().manual_seed(0)) for part in load()]


def cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: 1 at the start, towards 0 at the end."""
    return 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over the pixels, averaged over the batch: `[B, P], [B, P] -> []`."""
    return (output - target).square().sum(dim=1).mean()


def symbol_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats a symbol: `[B, T, V], [B, T] -> []`."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def normalised(training: np.ndarray, held_out: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both parts, `[*, P]`, less the training mean of each pixel, over one training standard deviation for all."""
    mean = training.mean(axis=0)
    scale = (training - mean).std()
    return torch.from_numpy((training - mean) / scale).float(), torch.from_numpy((held_out - mean) / scale).float()


@cache
def load_digits() -> tuple[Source, Source]:
    """Handwritten digits of scikit-learn, 8x8 pixels: 1437 to train on and 360 held out; the target is the input."""
    from sklearn import datasets

    images = datasets.load_digits().data
    order = np.random.default_rng(0).permutation(len(images))
    training, held_out = normalised(images[order[360:]], images[order[:360]])
    return Examples(training, training), Examples(held_out, held_out)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file (big-endian header: two zeros, type, rank, sizes) of unsigned bytes."""
    content = gzip.decompress(path.read_bytes())
    rank = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(np.frombuffer(content, ">i4", rank, offset=4))


@cache
def load_fashion(reconstruct: bool) -> tuple[Source, Source]:
    """Fashion-MNIST, 28x28 pixels, 60 000 to train on and 10 000 held out; targets are classes or the input."""
    folder = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        raise SystemExit(
            f"Fashion-MNIST is not in {folder}. On Debian and Ubuntu `apt-get install dataset-fashion-mnist` puts it "
            "there; elsewhere set FASHION_MNIST to a folder with the four *-ubyte.gz files."
        )
    images = [read_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")]
    classes = [read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]
    inputs = normalised(*(part.reshape(len(part), -1).astype(np.float32) for part in images))
    targets = list(inputs) if reconstruct else [torch.from_numpy(part.astype(np.int64)) for part in classes]
    return Examples(inputs[0], targets[0]), Examples(inputs[1], targets[1])


@cache
def load_library_source(window: int) -> tuple[Source, Source]:
    """Source text of Python's standard library as ASCII codes (V = 128); every tenth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[::10]
    training = [file for file in files if file not in held_out]
    return Text(read_symbols(training), window), Text(read_symbols(held_out), window)


def read_symbols(files: list[Path]) -> Tensor:
    """The files one after the other as ASCII codes (int64, other bytes as 127)."""
    text = b"".join(file.read_bytes() for file in files)
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64)).clamp(max=127)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits",
            title="digits autoencoder 64-256-128-32-128-256-64",
            load=load_digits,
            architecture=partial(mlp, 64, 256, 128, 32, 128, 256, 64),
            loss_fn=squared_error,
            loss_name="reconstruction loss",
            batch=256,
            steps=300,
            evaluate_every=2,
            evaluation_size=360,
            rates={"baseline": 4e-3, "muon": 1.6e-2, "mkor": 1.6e-2},
        ),
        Task(
            name="fashion",
            title="Fashion-MNIST classifier 784-256-128-10",
            load=partial(load_fashion, False),
            architecture=partial(mlp, 784, 256, 128, 10),
            loss_fn=F.cross_entropy,
            loss_name="cross-entropy",
            batch=256,
            steps=300,
            evaluate_every=5,
            evaluation_size=2000,
            rates={"baseline": 8e-3, "muon": 8e-3, "mkor": 4e-3},
        ),
        Task(
            name="fashion-ae",
            title="Fashion-MNIST autoencoder 784-256-64-16-64-256-784",
            load=partial(load_fashion, True),
            architecture=partial(mlp, 784, 256, 64, 16, 64, 256, 784),
            loss_fn=squared_error,
            loss_name="reconstruction loss",
            batch=256,
            steps=300,
            evaluate_every=5,
            evaluation_size=1000,
            rates={"baseline": 4e-3, "muon": 1.6e-2, "mkor": 1.6e-2},
        ),
        Task(
            name="lm",
            title="character model, 2 transformer blocks, on Python's standard library",
            load=partial(load_library_source, 64),
            architecture=partial(GPT, vocabulary=128, context=64, width=128, depth=2, heads=4),
            loss_fn=symbol_entropy,
            loss_name="nats a character",
            batch=16,
            steps=400,
            evaluate_every=10,
            evaluation_size=32,
            rates={"baseline": 4e-3, "muon": 8e-3, "mkor": 8e-3},
            inner="blocks.*",
        ),
        Task(
            name="cnn",
            title="Fashion-MNIST convolutional classifier 1-16-32-64, global mean",
            load=partial(load_fashion, False),
            architecture=cnn,
            loss_fn=F.cross_entropy,
            loss_name="cross-entropy",
            batch=128,
            steps=400,
            evaluate_every=10,
            evaluation_size=1000,
            rates={"baseline": 1.6e-2, "muon": 1.6e-2, "mkor": 1.6e-2},
        ),
        Task(
            name="gpt",
            title="character model, 4 transformer blocks of width 256, on Python's standard library",
            load=partial(load_library_source, 64),
            architecture=partial(GPT, vocabulary=128, context=64, width=256, depth=4, heads=4),
            loss_fn=symbol_entropy,
            loss_name="nats a character",
            batch=8,
            steps=1000,
            evaluate_every=25,
            evaluation_size=64,
            rates={"baseline": 5e-4, "muon": 2e-3, "mkor": 1e-3},
            inner="blocks.*",
            grid=(1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        ),
    )
}
