"""Settled before any test module is imported, and fixtures that every op needs."""

import os

# The models of the tests are so small that a second thread is only waited for, on a busy machine for nearly all of the
# time. The kernels' own tests ask for two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that nothing unwritten can pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
