"""What the benchmarks of several ops ask of the libraries that they compare with."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.registry import Case


def liger_objection(case: Case) -> str | None:
    """Of its Triton kernels."""
    return "liger-kernel's Triton kernels run on GPUs only" if case.device != "cuda" else liger_missing(case)


def liger_missing(case: Case) -> str | None:
    """Of what it writes in plain torch."""
    return None if find_spec("liger_kernel") else "liger-kernel is not installed: pip install liger-kernel"
