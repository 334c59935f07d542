"""What the papers claim, against the scores: holds here, does not hold here, or within noise."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import ttest_1samp

from experiments.scores import Score, by_pair
from fastkd.training.report import aligned

LEVEL = 0.05
"""A difference whose p-value, two-sided, is below this is no noise."""


@dataclass(frozen=True)
class Claim:
    """``differences`` gives one number per seed, above 0 where it speaks for the claim."""

    text: str
    differences: Callable[[Sequence[Score]], list[float]]


@dataclass(frozen=True)
class Verdict:
    """Mean of the ``count`` differences, None of none; its standard error and p-value, None of fewer than two."""

    mean: float | None
    error: float | None
    p: float | None
    count: int

    @property
    def words(self) -> str:
        if self.mean is None or self.p is None:
            return "not enough measured"
        if self.p < LEVEL:
            return "holds here" if self.mean > 0 else "does not hold here"
        return "within noise"


def verdict(differences: Sequence[float]) -> Verdict:
    """Student's t test of the differences against 0."""
    differences = [round(difference, 9) for difference in differences]  # equal ones may differ by rounding
    count = len(differences)
    mean = statistics.fmean(differences) if count else None
    if count < 2:
        return Verdict(mean, None, None, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    p = float(ttest_1samp(differences, 0).pvalue) if error else float(mean == 0)
    return Verdict(mean, error, p, count)


def gains(scores: Sequence[Score], better: str, worse: str) -> dict[int, dict[str, float]]:
    """How far the row ``better`` is above the row ``worse``, by seed and column: of columns that all these seeds have.

    Columns of one seed are no independent evidence, as a student may be shared by them; seeds are. Where some seeds
    lack columns, those that most seeds have are taken, as many as make most pairs with the seeds that have them all.
    """
    above, below = by_pair(scores, better), by_pair(scores, worse)
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for column, seed in sorted(above.keys() & below.keys()):
        found[seed][column] = above[column, seed] - below[column, seed]
    common = [column for column, _ in Counter(column for own in found.values() for column in own).most_common()]
    choices = []
    for columns in (common[:size] for size in range(1, len(common) + 1)):
        seeds = [seed for seed in sorted(found) if {*columns} <= found[seed].keys()]
        choices.append({seed: {column: found[seed][column] for column in columns} for seed in seeds})
    return max(choices, key=lambda own: sum(map(len, own.values())), default={})


def beats(better: str, worse: str, text: str) -> Claim:
    """The claim that one row scores above another, on an average of the columns that both have."""
    return Claim(text, lambda scores: [statistics.fmean(own.values()) for own in gains(scores, better, worse).values()])


def gains_most_with_little_data(better: str, worse: str, text: str, place: Callable[[str], tuple[str, float]]) -> Claim:
    """The claim that the gain is larger on a task's smallest part than on its largest, on an average of tasks.

    ``place`` gives a column's task and part. Tasks with one part say nothing.
    """

    def of_seed(own: dict[str, float]) -> list[float]:
        by_task: dict[str, dict[float, float]] = defaultdict(dict)
        for column, gain in own.items():
            task, part = place(column)
            by_task[task][part] = gain
        return [parts[min(parts)] - parts[max(parts)] for parts in by_task.values() if len(parts) > 1]

    def differences(scores: Sequence[Score]) -> list[float]:
        found = map(of_seed, gains(scores, better, worse).values())
        return [statistics.fmean(own) for own in found if own]

    return Claim(text, differences)


def verdicts(claims: Sequence[Claim], scores: Sequence[Score]) -> str:
    """A markdown table of what the scores say to the claims; those on rows that are not there are left out."""
    header = ["claim", "verdict", "mean difference", "standard error", "p", "seeds"]
    body = []
    for claim in claims:
        found = verdict(claim.differences(scores))
        if not found.count:
            continue
        numbers = ["–" if value is None else f"{value:.2f}" for value in (found.mean, found.error, found.p)]
        numbers[-1] = numbers[-1].replace("0.00", "< 0.01")
        body.append([claim.text, found.words, *numbers, str(found.count)])
    return aligned(header, body)
