"""A small BERT (transformers) that learns masked words of real English text, and then to rate sentences.

The text is the King James Bible of the Debian packages `bible-kjv` and `bible-kjv-text` (820 000 words); where they are not
installed, the language reference that comes with Python (`pydoc_data.topics`). Words and marks are tokens, of which the
most frequent are known. Shapes: B batch, T positions, K of them asked for, V words.
"""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import minilm
from benchmarks.tasks import Batch, Examples, Source, Task, Text

VOCABULARY, CONTEXT = 5000, 64
ASKED = 10  # words of a window
MASK, UNKNOWN, PADDING = 0, 1, 2
FIRST_WORD = 3


@cache
def words() -> list[str]:
    """The text in lower case, cut into words and marks."""
    if shutil.which("bible"):
        call = ["bible", "-f", "gen1:1-rev22:21"]
        text = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
        text = re.sub(r"^\S+ ", "", text, flags=re.M)  # chapter and verse
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    return tokens(text)


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[^\sa-z]", text.lower())


@cache
def vocabulary() -> dict[str, int]:
    """The ids of the most frequent words."""
    frequent = Counter(words()).most_common(VOCABULARY - FIRST_WORD)
    return {word: FIRST_WORD + i for i, (word, _) in enumerate(frequent)}


def encoded(text: list[str]) -> Tensor:
    known = vocabulary()
    return torch.tensor([known.get(word, UNKNOWN) for word in text])


@dataclass(frozen=True, eq=False)
class MaskedText:
    """Windows of one long text in which ``ASKED`` words are asked for: of these eight in ten are masked, one is another
    word, one is left. A batch is windows with the places asked for behind them, ``[B, T + K]``, and the words there,
    ``[B, K]``."""

    text: Text

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        ids, _ = self.text.draw(size, generator)
        places = torch.rand(ids.shape, generator=generator).argsort(1)[:, :ASKED]
        asked = ids.gather(1, places)
        kind = torch.rand(asked.shape, generator=generator)
        other = torch.randint(FIRST_WORD, VOCABULARY, asked.shape, generator=generator)
        shown = torch.where(kind < 0.8, torch.full_like(asked, MASK), torch.where(kind < 0.9, other, asked))
        return torch.cat([ids.scatter(1, places, shown), places], 1), asked


@cache
def load_masked() -> tuple[Source, Source]:
    """Nine tenths of the text to train on, the last to hold out."""
    ids = encoded(words())
    cut = 9 * len(ids) // 10
    return MaskedText(Text(ids[:cut], CONTEXT)), MaskedText(Text(ids[cut:], CONTEXT))


@cache
def load_rated() -> tuple[Source, Source]:
    """Sentences of film reviews, cut or padded to half the context, with the sign of their rating."""
    rated = minilm.rated_sentences(minilm.DATA)
    ids = torch.full((len(rated), CONTEXT // 2), PADDING)
    for row, (_, text) in zip(ids, rated, strict=True):
        found = encoded(tokens(text)[: len(row)])
        row[: len(found)] = found
    signs, held_out = minilm.labelled(rated)
    training, rest = (Examples(ids[part], signs[part]) for part in (~held_out, held_out))
    return training, rest


class Masked(nn.Module):
    """``[B, T + K] -> [B, K, V]``: as BERT was trained, the head sees the words that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
            max_position_embeddings=CONTEXT, pad_token_id=PADDING, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = transformers.BertForMaskedLM(config)

    def forward(self, batch: Tensor) -> Tensor:
        ids, places = batch.split([CONTEXT, ASKED], 1)
        states = self.bert.bert(input_ids=ids).last_hidden_state
        return self.bert.cls(states.gather(1, places[..., None].expand(-1, -1, states.shape[-1])))


class Rated(nn.Module):
    """The encoder of a ``Masked``, the mean of its outputs over a sentence, two classes: ``[B, T] -> [B, 2]``."""

    def __init__(self, encoder: Any = None) -> None:
        super().__init__()
        self.encoder = Masked().bert.bert if encoder is None else encoder
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor) -> Tensor:
        kept = (ids != PADDING).to(torch.float32)
        states = self.encoder(input_ids=ids, attention_mask=kept).last_hidden_state
        return self.head(minilm.mean_of_words(states, kept))


def masked_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats a word that is asked for."""
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


PRETRAINING = Task(
    name="bert-asked",  # `bert` in a ledger: the head saw every word of a window
    title="BERT (4 layers of width 256) on masked words of the King James Bible",
    load=load_masked,
    architecture=Masked,
    loss_fn=masked_entropy,
    loss_name="nats a masked word",
    batch=16,
    steps=150,
    evaluate_every=12,
    evaluation_size=64,
    inner="bert.bert.encoder.*",
    grid=(2e-3, 4e-3),  # in the middle, so that the best of a side is a few factors of two away
)
FINE_TUNING = Task(
    name="bert-rated",
    title="that BERT fine-tuned on rated sentences",
    load=load_rated,
    architecture=Rated,
    loss_fn=functional.cross_entropy,
    loss_name="cross-entropy",
    batch=32,
    steps=80,
    evaluate_every=80,  # at the end alone: benchmarks.paper asks all held-out sentences then
    evaluation_size=32,
    inner="encoder.encoder.*",
)
