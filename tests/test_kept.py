"""How much of a teacher is kept: the majority class below, and the table."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
from datasets import Dataset

from experiments.kept import kept_table, majority_scores
from experiments.scores import MAJORITY, Score
from fastkd.data.task import UNLABELLED, Task
from fastkd.methods.experiment import Material


def test_the_majority_is_that_of_the_training_rows():
    classes, correlation = Task("c", ("text",), ("a", "b"), ("accuracy", "f1")), Task("r", ("text",), (), ("pearson",))

    def rows(labels):
        return SimpleNamespace(
            tasks={"c": classes, "r": correlation},
            datasets={"c": Dataset.from_dict({"labels": labels}), "r": Dataset.from_dict({"labels": [0.5, 1.0]})},
        )

    material = Material(rows([UNLABELLED] * 4 + [0, 0, 1]), {"c": rows([1, 1, 1, 0]), "r": rows([0, 1])}, {}, {})
    assert majority_scores(material) == {"c": pytest.approx(100 * (0.25 + 0) / 2), "r": 0.0}


def test_kept_is_a_part_of_the_teachers_distance_from_the_majority():
    values = {MAJORITY: (50, 60, 70), "teacher": (90, 80, 60), "half": (70, 70, 65), "b": (100, 80, 60)}
    lines = [
        score(row, column, value) for row, cells in values.items() for column, value in zip("xyz", cells, strict=True)
    ]
    lines += [score("half", "x", 78.0), score("lone", "x", 90.0)]
    table = kept_table(lines, {"x": ["x"], "both": ["x", "y"], "below": ["z"]}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells == [["half", "60 %", "57 %", "–"], ["b", "125 %", "117 %", "–"], ["lone", "100 %", "–", "–"]]


def score(row, column, value):
    rest = dict.fromkeys(field.name for field in fields(Score))
    return Score(**{**rest, "row": row, "column": column, "score": value})
