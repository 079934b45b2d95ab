"""A few steps of ``make minilm``: trained weights, real sentences. ``make test`` installs both."""

import argparse
import importlib.util
import math

import pytest
import torch

from mkor_fx import MKOR

minilm = pytest.importorskip("benchmarks.minilm", reason="transformers is not installed")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None or not minilm.DATA.is_file(), reason="make test installs MiniLM"
)


def test_sentences_and_labels():
    rated = minilm.rated_sentences(minilm.DATA)
    assert len(rated) == 10_605 and all(-4 <= rating <= 4 and text for rating, text in rated)
    training, held_out = minilm.examples(minilm.DATA, 12)
    assert len(training.labels) + len(held_out.labels) == len(rated)
    assert training.ids.shape[1] == 12 and 0.4 < training.labels.float().mean() < 0.6


def test_a_few_steps():
    training, held_out = minilm.examples(minilm.DATA, 12)
    few = minilm.Examples(*held_out.at(torch.arange(24)))
    options = argparse.Namespace(steps=3, batch=4, refresh=1, seed=0, backend="eager")
    outcome = minilm.fine_tune(MKOR.published(), 1e-4, (training, few), options)
    assert len(outcome.losses) == 3 and all(map(math.isfinite, outcome.losses)) and 0 <= outcome.accuracy <= 1
    # 36 layers of the encoder, 3 tables and the head, with the biases of the layers; norms are declined
    assert (len(outcome.coverage.covered), len(list(outcome.coverage))) == (77, 103)
