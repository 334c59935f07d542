"""How much of a teacher students keep: their scores above those of always answering the most frequent class."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from experiments.scores import MAJORITY, TEACHER, Score
from fastkd.data.metrics import main_score, task_metrics
from fastkd.data.task import UNLABELLED
from fastkd.methods.experiment import Material
from fastkd.training.report import aligned


def majority_scores(material: Material) -> dict[str, float]:
    """By task, the validation score of the training rows' most frequent class; 0 of a regression."""
    found = {}
    for name, task in material.train.tasks.items():
        if task.is_regression:
            found[name] = 0.0  # a correlation with one and the same answer
            continue
        labels = np.asarray(material.validation[name].datasets[name]["labels"])
        seen = Counter(label for label in material.train.datasets[name]["labels"] if label != UNLABELLED)
        answers = np.zeros((len(labels), task.num_labels))
        answers[:, seen.most_common(1)[0][0]] = 1
        found[name] = main_score(task, task_metrics(task, answers, labels))
    return found


def kept_table(scores: Sequence[Score], parts: Mapping[str, Collection[str]]) -> str:
    """A markdown table: for each row and named part of the columns, how much it keeps of the teacher, in percent.

    That is the sum over the columns of mean score − majority's, over the same sum of the teacher; – where a row has
    not all of them, or the teacher is not above the majority.
    """
    rows = [row for row in dict.fromkeys(score.row for score in scores) if row not in (MAJORITY, TEACHER)]
    body = [[row, *(_kept(scores, row, columns) for columns in parts.values())] for row in rows]
    return aligned(["", *parts], body)


def _kept(scores: Sequence[Score], row: str, columns: Collection[str]) -> str:
    def above(row: str) -> float | None:
        gains = []
        for column in columns:
            of_column = {
                name: [s.score for s in scores if (s.row, s.column) == (name, column)] for name in (row, MAJORITY)
            }
            if not all(of_column.values()):
                return None
            gains.append(statistics.fmean(of_column[row]) - statistics.fmean(of_column[MAJORITY]))
        return sum(gains)

    student, teacher = above(row), above(TEACHER)
    if student is None or not teacher or teacher < 0:
        return "–"
    return f"{100 * student / teacher:.0f} %"
