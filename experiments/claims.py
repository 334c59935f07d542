"""What the papers claim, against the scores: holds here, does not hold here, or within noise."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.scores import Score, by_pair
from fastkd.training.report import aligned

Pair = tuple[str, int]  # column and seed


@dataclass(frozen=True)
class Claim:
    """``differences`` gives one number per pair of models, above 0 where it speaks for the claim."""

    text: str
    differences: Callable[[Sequence[Score]], list[float]]


@dataclass(frozen=True)
class Verdict:
    """Mean of the ``count`` differences, None of none, and its standard error, None of fewer than two."""

    mean: float | None
    error: float | None
    count: int

    @property
    def words(self) -> str:
        if self.mean is None or self.error is None:
            return "not enough measured"
        if abs(self.mean) > 2 * self.error:
            return "holds here" if self.mean > 0 else "does not hold here"
        return "within noise"


def verdict(differences: Sequence[float]) -> Verdict:
    """More than two standard errors from 0 is a yes or a no; what is nearer is noise."""
    count = len(differences)
    mean = statistics.fmean(differences) if count else None
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return Verdict(mean, error, count)


def gains(scores: Sequence[Score], better: str, worse: str) -> dict[Pair, float]:
    """How far the row ``better`` is above the row ``worse``, for each column and seed that both have."""
    above, below = by_pair(scores, better), by_pair(scores, worse)
    return {pair: above[pair] - below[pair] for pair in above if pair in below}


def beats(better: str, worse: str, text: str) -> Claim:
    """The claim that one row scores above another."""
    return Claim(text, lambda scores: list(gains(scores, better, worse).values()))


def gains_most_with_little_data(better: str, worse: str, text: str, place: Callable[[str], tuple[str, float]]) -> Claim:
    """The claim that the gain is larger on a task's smallest part than on its largest.

    ``place`` gives a column's task and part. Tasks with one part say nothing.
    """

    def differences(scores: Sequence[Score]) -> list[float]:
        by_task: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
        for (column, seed), gain in gains(scores, better, worse).items():
            task, part = place(column)
            by_task[task, seed][part] = gain
        return [parts[min(parts)] - parts[max(parts)] for parts in by_task.values() if len(parts) > 1]

    return Claim(text, differences)


def verdicts(claims: Sequence[Claim], scores: Sequence[Score]) -> str:
    """A markdown table of the claims and what the scores say to them."""
    header = ["claim", "verdict", "mean difference", "standard error", "pairs"]
    body = []
    for claim in claims:
        found = verdict(claim.differences(scores))
        numbers = ["–" if value is None else f"{value:.2f}" for value in (found.mean, found.error)]
        body.append([claim.text, found.words, *numbers, str(found.count)])
    return aligned(header, body)
