"""Sentences of random words, marked by whether a word of one half of the vocabulary comes more often."""

import torch
from torch.utils.data import Dataset

WORDS, LENGTH = 90, 12


class Sentences(Dataset):
    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
        self.labels = (self.ids > WORDS // 2).float().mean(1).round().long()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, at):
        return {"input_ids": self.ids[at], "labels": self.labels[at]}


def small_bert():
    """A ``BertForSequenceClassification`` without weights to download."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def furthest(one, other):
    """The largest difference of two models' parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)
