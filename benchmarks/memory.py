"""Peak memory of one call beyond its inputs.

On the CPU it is the growth of the resident set, not a count kept by torch's allocator: an op may allocate
behind torch's back, and a page costs nothing until it is touched. A process of its own measures it, in which
malloc gives every block of 64 KiB or more its own mapping, so that nothing freed earlier is reused unseen; the
peak is reset before the call. Linux counts pages per processor and adds them up lazily: differences below
about half a megabyte mean nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.measure import Call, bind
from benchmarks.registry import Case, load_benchmarks

M_MMAP_THRESHOLD = -3  # of malloc.h
RESET_PEAK = "5"  # of proc(5), clear_refs


Peaks = Callable[[Case, str, list[str]], dict[str, int]]


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _cpu_peak(call: Call) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _cuda_peak(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(case: Case, direction: str, names: list[str]) -> dict[str, int]:
    """Bytes that one call of each named provider takes at its peak beyond its inputs, its results included."""
    benchmark = load_benchmarks()[case.op]
    measure = _cuda_peak if case.device == "cuda" else _cpu_peak
    inputs = benchmark.inputs(case)
    peaks = {}
    for name in names:
        call = bind(benchmark[name], case, inputs, direction)
        call()
        peaks[name] = measure(call)
    return peaks


def _prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)


@contextmanager
def peak_meter(device: str, threads: int) -> Iterator[Peaks]:
    """Yield ``peak_bytes``: in its own process for the CPU, here for a GPU; elsewhere it knows no peaks."""
    if device == "cuda":
        yield peak_bytes
    elif sys.platform != "linux":
        yield lambda *_: {}
    else:
        with ProcessPoolExecutor(1, get_context("spawn"), _prepare_process, (threads,)) as process:
            yield lambda *problem: process.submit(peak_bytes, *problem).result()
