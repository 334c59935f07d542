"""What the limits of several ops share: fresh outputs, written once, on the pages that are fastest."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from benchmarks.registry import Case

HUGE_PAGE = 2 * 1024 * 1024


def huge_page_objection(case: Case) -> str | None:
    if case.device != "cpu":
        return "memory of a GPU has large pages anyway"
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system cannot be asked for huge pages"
    if case.dtype.itemsize * torch.Size(case.shape).numel() < HUGE_PAGE:
        return "the output is smaller than a huge page"
    return None


def empty_on_huge_pages(like: Tensor) -> Tensor:
    """A fresh buffer faults at its first touch of every page, so pages of 2 MiB are the faster output."""
    buffer = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=like.dtype).view(like.shape)
