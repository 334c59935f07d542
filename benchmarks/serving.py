"""Benchmarks of answers: what a question costs each system, on so many threads, and how exact its answer is.

A page joins by one file, as an op of registry.py does, which makes a ``Serving`` and decorates its systems.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import results
from benchmarks.effort import Effort
from benchmarks.latency import Call, bursts
from benchmarks.measure import WrongResult
from benchmarks.results import Row
from benchmarks.roofline import Peaks, peaks_of

ENOUGH_FOR_P99 = 200
"""Samples; with fewer, tails are left out."""


@dataclass(frozen=True)
class Case:
    """A question of sequences of these lengths to a layer or a model of these sizes, with the reason it is here."""

    op: str
    size: str
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    reason: str
    device: str = "cpu"


class Problem(ABC):
    """A case with its weights, its inputs and its answer in float64, made anew for each case."""

    truth: NDArray[np.float64]

    @abstractmethod
    def answer(self, raw: Any) -> NDArray[Any]:
        """What a system returned, in the shape of the truth."""

    @abstractmethod
    def limit(self, precision: str, peaks: Peaks) -> float:
        """Seconds that its products take at least."""


Objection = Callable[[Case], "str | None"]


class System(NamedTuple):
    """``start(problem, threads)`` gives the call that is timed, in the precision of its weights.

    A ``reference`` model answers another way: nobody asks whether it is right.
    """

    name: str
    precision: str
    start: Callable[[Any, int], Call]
    objection: Objection
    reference: bool


SERVINGS: dict[str, Serving] = {}


def no_objection(case: Case) -> str | None:
    return None


class Serving:
    """A page: cases, how to make a problem of one, and for each precision the largest error that is let pass."""

    def __init__(self, op: str, cases: list[Case], prepare: Callable[[Case], Problem], error: dict[str, float]) -> None:
        self.op, self.cases, self.prepare, self.error = op, cases, prepare, error
        self.systems: list[System] = []
        self.extras: list[Callable[[], Iterator[Row]]] = []
        SERVINGS[op] = self

    def system(
        self,
        name: str,
        precision: str,
        *,
        objection: Objection = no_objection,
        reference: bool = False,
    ) -> Callable[[Callable[[Any, int], Call]], Callable[[Any, int], Call]]:
        """Register ``start(problem, threads)``; ``objection(case)`` says why the system cannot."""

        def register(start: Callable[[Any, int], Call]) -> Callable[[Any, int], Call]:
            self.systems.append(System(name, precision, start, objection, reference))
            return start

        return register

    def extra(self, rows: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        """Register what a full run of all cases measures besides."""
        self.extras.append(rows)
        return rows

    def run(self, cases: Sequence[Case], machine: Row, threads: Sequence[int], effort: Effort) -> list[Row]:
        """Rows by case, number of threads and system.

        Raises:
            WrongResult: a system's answer is further from float64 than its precision may be.
        """
        about, rows = machine | results.peer_versions(), []
        with tqdm(total=len(cases) * len(threads), unit="problem") as bar:
            for case in cases:
                problem = self.prepare(case)
                systems = [s for s in self.systems if s.objection(case) is None and (effort.whole or not s.reference)]
                for count in threads:
                    bar.set_description(f"{case.op} {case.size}, {count} threads")
                    rows += [about | row for row in self._measure(case, problem, count, systems, effort)]
                    bar.update()
        if effort.whole and list(cases) == self.cases:
            rows += [about | row for extra in self.extras for row in extra()]
        return rows

    def _measure(
        self, case: Case, problem: Problem, threads: int, systems: Sequence[System], effort: Effort
    ) -> Iterator[Row]:
        peaks, before = peaks_of(threads), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            calls = {system.name: system.start(problem, threads) for system in systems}
            errors = {s.name: self.check(case, problem, s, calls[s.name]) for s in systems if not s.reference}
            samples = bursts(calls, effort.seconds, effort.rounds)
        finally:
            torch.set_num_threads(before)
        for name, precision, _, _, reference in systems:
            known = peaks is not None and not reference and peaks.operations(precision) > 0
            limit = problem.limit(precision, peaks) if known else None
            yield make_row(case.op, case.size, threads, name, samples[name], limit, errors.get(name))

    def check(self, case: Case, problem: Problem, system: System, call: Call) -> float:
        """The largest absolute error; raises WrongResult unless it is within the bound of the system's precision."""
        answer = problem.answer(call())
        error = float(np.abs(answer - problem.truth).max()) if answer.shape == problem.truth.shape else np.inf
        bound = self.error[system.precision]
        if not error <= bound:
            raise WrongResult(f"{system.name} is wrong for {case.op} {case.size}: off by {error:.2g}, above {bound:g}")
        return error


def make_row(
    op: str,
    size: str,
    threads: int,
    system: str,
    seconds: Sequence[float],
    limit: float | None = None,
    error: float | None = None,
    neighbour: str = "",
    resident_bytes: int | None = None,
    file_bytes: int | None = None,
) -> Row:
    """Milliseconds of single calls; ``ratio_to_limit`` divides their median by the limit."""
    median, low, high, p95, p99 = np.percentile(seconds, (50, 20, 80, 95, 99)) * 1e3
    tails = len(seconds) >= ENOUGH_FOR_P99
    return {
        "threads": str(threads),
        "op": op,
        "shape": size,
        "dtype": "",
        "options": f"{neighbour} neighbour" if neighbour else f"{threads} thread{'s' * (threads > 1)}",
        "direction": "",
        "provider": system,
        "median_ms": f"{median:.6g}",
        "p20_ms": f"{low:.6g}",
        "p80_ms": f"{high:.6g}",
        "p95_ms": f"{p95:.6g}" if tails else "",
        "p99_ms": f"{p99:.6g}" if tails else "",
        "rounds": str(len(seconds)),
        "ratio_to_limit": f"{median / 1e3 / limit:.4g}" if limit else "",
        "error": "" if error is None else f"{error:.2g}",
        "resident_bytes": "" if resident_bytes is None else str(resident_bytes),
        "file_bytes": "" if file_bytes is None else str(file_bytes),
    }
