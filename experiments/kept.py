"""How much of a teacher students keep: their scores above those of always answering the most frequent class."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from experiments.scores import MAJORITY, TEACHER, Score
from fastkd.data.metrics import majority_score
from fastkd.methods.experiment import Material
from fastkd.training.report import aligned


def majority_scores(material: Material) -> dict[str, float]:
    """By task, the validation score of the training rows' most frequent class; 0 of a regression."""
    train, validation = material.train, material.validation
    return {
        name: majority_score(task, train.datasets[name]["labels"], validation[name].datasets[name]["labels"])
        for name, task in train.tasks.items()
    }


def kept_table(scores: Sequence[Score], parts: Mapping[str, Collection[str]]) -> str:
    """A markdown table: for each row and named part of the columns, how much it keeps of the teacher, in percent.

    That is the sum over the columns of mean score − majority's, over the same sum of the teacher; – where a row has
    not all of them, or the teacher is not above the majority.
    """
    cells = defaultdict(list)
    for score in scores:
        cells[score.row, score.column].append(score.score)
    means = {cell: statistics.fmean(values) for cell, values in cells.items()}
    rows = dict.fromkeys(score.row for score in scores if score.row not in (MAJORITY, TEACHER))
    return aligned(["", *parts], [[row, *(_kept(means, row, columns) for columns in parts.values())] for row in rows])


def _kept(means: Mapping[tuple[str, str], float], row: str, columns: Collection[str]) -> str:
    if any((name, column) not in means for name in (MAJORITY, TEACHER, row) for column in columns):
        return "–"
    majority, teacher, student = (sum(means[name, column] for column in columns) for name in (MAJORITY, TEACHER, row))
    return f"{100 * (student - majority) / (teacher - majority):.0f} %" if teacher > majority else "–"
