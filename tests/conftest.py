"""Fixtures for all tests: one seed, and compilers that begin each test with nothing remembered."""

import gc

import pytest
import torch

# Graphs are millions of small objects that live on: to look through them all the time takes a tenth of the tests' time.
gc.set_threshold(200_000, 20, 100)
torch._dynamo.config.run_gc_after_compile = False


@pytest.fixture(autouse=True)
def fresh_start():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
