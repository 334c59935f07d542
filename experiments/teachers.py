"""Fine-tuning the teacher of a table or of a column, once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import scores as csv_file
from experiments.kept import majority_scores
from experiments.scores import MAJORITY, TEACHER, scores_of, surroundings
from experiments.students import TUNING_SEED, folder_name, measure
from fastkd.methods.experiment import Material
from fastkd.methods.teachers import load_teachers
from fastkd.training.runs import finished_or
from fastkd.training.teacher import train_teacher

DROPOUT = 0.0
"""Of all teachers, and so of the students made of their layers: on a CPU the masks take a good part of a step."""
OPTIONS: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 32,
    "pooling": "mean",
    "dropout": DROPOUT,
}
"""Suit a MiniLM; ``docs/experiments.md``."""
NUMBERS = ("learning_rate", "seconds", "parameters", "inner_parameters", "latency_ms")
"""Of a score; all 0 of the most frequent class."""


class Teacher(NamedTuple):
    """A fine-tuned teacher; ``trained`` tells its learning rate, its time and where it was trained."""

    folder: str
    trained: Mapping[str, Any]


def make_teacher(model: str, tasks: Sequence[str], folder: Path, **options: Any) -> Teacher:
    """The teacher in ``folder``, made by ``train_teacher`` unless it is there."""
    settings = {"name_or_path": model, "tasks": list(tasks), **OPTIONS, **options}

    def train() -> dict[str, Any]:
        start = time.monotonic()
        shutil.rmtree(folder / "model", ignore_errors=True)  # of a run that was killed before it was recorded
        train_teacher(output_dir=folder / "model", **settings)
        return {"learning_rate": settings["learning_rate"], "seconds": time.monotonic() - start, **surroundings()}

    return Teacher(str(folder / "model"), finished_or(folder, settings, train))


def write_scores(teacher: Teacher, material: Material, columns: Mapping[str, str], folder: Path) -> None:
    """The lines of the teacher and of the most frequent class, ``scores.csv`` in a folder of their own."""
    path = Path(teacher.folder)

    def sizes_of() -> dict[str, float]:
        return measure(load_teachers(teacher.folder, list(columns)).first, path, material.validation)

    sizes = finished_or(path.with_name(folder_name("sizes", *columns)), {}, sizes_of)  # latency depends on the texts
    trained = {**teacher.trained, **sizes, "scores": material.teacher_scores}
    nothing = {**teacher.trained, **dict.fromkeys(NUMBERS, 0), "scores": majority_scores(material)}
    rows = ((MAJORITY, nothing), (TEACHER, trained))
    lines = [line for row, known in rows for line in scores_of(row, TUNING_SEED, columns, known)]
    csv_file.write(folder / "scores.csv", lines)
