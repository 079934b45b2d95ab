"""Fixtures for all tests: one seed, and compilers that begin each test with nothing remembered."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_start():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
