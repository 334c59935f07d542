"""The least time that the products of BiLSTM layers can take, from peaks of this machine measured in the same run.

A product takes at least its multiply-adds at the peak rate of the vector units, and at least one reading of its
weights at the speed at which a core reads so many bytes again and again. The input's product happens once, the
recurrent one in each step. Non-linearities, attention and pooling are left out, so no system reaches 1.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from benchmarks.limits import HUGE_PAGE

SOURCE = Path(__file__).parent / "peaks.cpp"
SECONDS, TURNS = 0.004, 25
"""Short turns, of which the best counts: one that the system took the core away from says nothing."""
INPUT_BYTES = {"float32": 4, "bfloat16": 4, "int8": 1}
RECURRENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Of a weight, by precision; bfloat16 stands for weights alone, which are multiplied in float32."""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


class Peaks:
    """Rates of so many threads together; each is measured when first asked for, and the best of some turns counts."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.operations = cache(self._operations)
        self.bandwidth = cache(self._bandwidth)

    def _operations(self, precision: str) -> float:
        """Operations per second, two per multiply-add; 0 where the machine has no instruction for it."""
        library = _library()
        function = library.byte_rate if precision == "int8" else library.float_rate
        return self._best(lambda _: function(SECONDS))

    def _bandwidth(self, size: int) -> float:
        """Bytes per second of reading ``size`` bytes, each thread its own."""
        buffers = [_buffer(size) for _ in range(self.threads)]
        return self._best(lambda thread: _library().read_rate(buffers[thread], size, SECONDS))

    def _best(self, rate: Callable[[int], float]) -> float:
        with ThreadPoolExecutor(self.threads) as pool:  # ctypes releases the GIL
            return max(sum(pool.map(rate, range(self.threads))) for _ in range(TURNS))

    def product(self, rows: int, weights: int, size: int, precision: str) -> float:
        """Seconds of rows through so many weights of ``size`` bytes each."""
        return max(2 * rows * weights / self.operations(precision), weights * size / self.bandwidth(weights * size))

    def bilstm(self, lengths: Sequence[int], inputs: int, hidden: int, precision: str) -> float:
        """Seconds of both directions over sequences of these lengths."""
        active = [sum(length > step for length in lengths) for step in range(max(lengths))]
        recurrent = [self.product(n, 4 * hidden * hidden, RECURRENT_BYTES[precision], precision) for n in active]
        return 2 * (self.product(sum(lengths), 4 * hidden * inputs, INPUT_BYTES[precision], precision) + sum(recurrent))


@cache
def peaks_of(threads: int) -> Peaks | None:
    """Peaks of this process's run; None where no compiler is found."""
    return Peaks(threads) if compiler() else None


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/peaks.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([str(compiler()), *flags, str(SOURCE), "-o", path], check=True)
        library = ctypes.CDLL(path)
    for function, arguments in {
        "float_rate": [],
        "byte_rate": [],
        "read_rate": [ctypes.c_void_p, ctypes.c_int64],
    }.items():
        getattr(library, function).restype = ctypes.c_double
        getattr(library, function).argtypes = [*arguments, ctypes.c_double]
    return library


def _buffer(size: int) -> ctypes.Array[ctypes.c_char]:
    """Memory at the begin of a page, on pages of 2 MiB where the system has them, as a runtime's weights may be."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, whole + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    buffer = (ctypes.c_char * whole).from_buffer(memory, offset)
    ctypes.memset(buffer, 1, whole)
    return buffer
