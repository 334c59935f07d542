"""Training the students of a part of a table: a learning rate chosen on one seed, then the seeds that are reported."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from experiments import scores as csv_file
from experiments.scores import Score, scores_of, surroundings
from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset
from fastkd.methods.experiment import Experiment, Material, train_new_student
from fastkd.methods.publish import single_rows
from fastkd.training import finetune
from fastkd.training.parallel import Add
from fastkd.training.report import count_parameters, measure_latency
from fastkd.training.runs import finished_or
from fastkd.training.signals import COLUMN

TUNING_SEED = 0
"""Never one of the seeds that are reported."""

Key = TypeVar("Key")
Trained = dict[str, Any]  # the fields of a Score but for row, column, seed and score; and the scores by task


@dataclass(frozen=True, eq=False)
class Group:
    """Students of one row that are alike but for learning rate and seed; picklable.

    Args:
        row: of the table.
        experiment: its ``arms`` are the learning rates, its ``output`` is a folder of the group's own.
        material: what the students learn from and are judged by.
        columns: of the table, by the task.
        keeps_weights: the trained students are kept, not their scores alone.
        finetuned: the row of the same students, kept, fine-tuned on each task, if there is to be one.
    """

    row: str
    experiment: Experiment
    material: Material
    columns: Mapping[str, str]
    keeps_weights: bool = False
    finetuned: str | None = None

    @property
    def cost(self) -> float:
        """Rows to train on, over and over, for the estimate of the time that is left."""
        seeds, rates = self.experiment.seeds, len(self.experiment.arms)
        cost = self.student_cost * (len(seeds) + (rates if rates > 1 else 0))
        if self.finetuned is not None:
            rows = len(self.material.train.labelled())
            cost += self.finetuning_epochs * rows * (len(seeds) + len(finetune.LEARNING_RATES))
        return cost

    @property
    def student_cost(self) -> float:
        epochs: float = self.experiment.training["num_train_epochs"]
        return epochs * len(self.material.train)

    @property
    def finetuning_epochs(self) -> int:
        """Half as many as those of the students that are fine-tuned, rounded up."""
        return math.ceil(self.experiment.training["num_train_epochs"] / 2)

    def train(self, scale: float, add: Add) -> None:
        """Trains what of the group is not finished yet, and writes its scores.

        ``add`` is told of ``scale`` · ``cost`` in all.
        """
        experiment = self.experiment

        def train(arm: str, seed: int) -> Trained:
            with part(add, scale * self.student_cost) as step:
                return _student(self, arm, seed, step)

        best, students = tuned(train, list(experiment.arms), experiment.seeds)
        self.write(self.row, _lines(self, self.row, students))
        if self.finetuned is not None:
            by_task = [_finetuned(self, best, task, scale, add) for task in experiment.tasks]
            self.write(self.finetuned, [line for lines in by_task for line in lines])

    def write(self, row: str, scores: Sequence[Score]) -> None:
        """Writes what is finished of a row, in a folder beside those of other groups."""
        name = Path(self.experiment.output).name.replace(folder_name(self.row), folder_name(row))
        csv_file.add(Path(self.experiment.output).with_name(name) / "scores.csv", scores)


def folder_name(*words: str) -> str:
    return "-".join(words).replace(" ", "-")


def learning_rates(rates: Sequence[float], fields: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The arms of a group's experiment; ``fields`` are what its row has of its own."""
    return {f"lr {rate:g}": {**(fields or {}), "learning_rate": rate} for rate in rates}


def mean_score(trained: Trained) -> float:
    return statistics.fmean(trained["scores"].values())


def tuned(
    train: Callable[[Key, int], Trained],
    choices: Sequence[Key],
    seeds: Sequence[int],
    quality: Callable[[Trained], float] = mean_score,
) -> tuple[Key, dict[int, Trained]]:
    """The choice with the best ``quality`` of ``TUNING_SEED``, the first of equals, and what it gives of every seed.

    A choice whose training diverges is the worst there is.
    """

    def quality_of(choice: Key) -> float:
        try:
            return quality(train(choice, TUNING_SEED))
        except FloatingPointError:
            return -math.inf

    best = max(choices, key=quality_of) if len(choices) > 1 else choices[0]
    return best, {seed: train(best, seed) for seed in seeds}


def _student(group: Group, arm: str, seed: int, add: Add) -> Trained:
    """Trains a student unless that is done."""
    experiment, model = group.experiment, group.experiment.student_folder(arm, seed) / "model"

    def train() -> Trained:
        start = time.monotonic()
        scores = train_new_student(experiment, group.material, arm, seed, add)
        trained = facts(start, scores, experiment.arms[arm]["learning_rate"])
        student = AutoModelForSequenceClassification.from_pretrained(model)
        sizes = measure(student, model, group.material.validation)
        if not group.keeps_weights:
            shutil.rmtree(model)
        return trained | sizes

    known = {**experiment.described(arm, seed), **group.material.fingerprints}
    return finished_or(model.parent, known, train)


def _finetuned(group: Group, arm: str, task: str, scale: float, add: Add) -> list[Score]:
    material = group.material
    rows = MultiTaskDataset({task: material.train.datasets[task].remove_columns(COLUMN)}).labelled()
    validation = {task: material.validation[task]}
    epochs = group.finetuning_epochs
    once = scale * epochs * len(rows)

    def train(rate: float, seed: int) -> Trained:
        student = group.experiment.student_folder(arm, seed)
        origin = _student(group, arm, seed, lambda _: None)

        with part(add, once) as step:

            def compute() -> Trained:
                start, model = time.monotonic(), student / "model"
                found = finetune.train_candidate(model, task, _collator(model), rows, validation, own, rate, step)
                return origin | facts(start, {task: found.score}, rate)

            own = {"seed": seed, "num_train_epochs": epochs}
            settings = {**finetune.DEFAULTS, **own, "task": task, "learning_rate": rate}
            return finished_or(student / f"fine-tuned-{task}" / f"lr-{rate:g}", settings, compute)

    _, students = tuned(train, finetune.LEARNING_RATES, group.experiment.seeds)
    assert group.finetuned is not None
    return _lines(group, group.finetuned, students)


def _lines(group: Group, row: str, students: Mapping[int, Trained]) -> list[Score]:
    return [line for seed, trained in students.items() for line in scores_of(row, seed, group.columns, trained)]


def measure(model: PreTrainedModel, folder: Path, validation: Mapping[str, MultiTaskDataset]) -> dict[str, float]:
    """Size of a classifier, and its latency on the validation rows."""
    return size_and_latency(model, single_rows(validation, _collator(folder)))


def size_and_latency(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Latency is that of one row on one thread, which does not depend on how many trainings share the cores."""
    total, inner = count_parameters(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    latency = measure_latency(model, rows)
    torch.set_num_threads(threads)
    return {"parameters": total, "inner_parameters": inner, "latency_ms": 1e3 * latency}


def _collator(folder: Path) -> MultiTaskCollator:
    return MultiTaskCollator(AutoTokenizer.from_pretrained(folder))


def facts(start: float, scores: Mapping[str, float], rate: float) -> Trained:
    """What is known of a training that began at ``start``, but the student's size."""
    return {"scores": scores, "learning_rate": rate, "seconds": time.monotonic() - start, **surroundings()}


@contextmanager
def part(add: Add, size: float) -> Iterator[Add]:
    """Passes on ``size`` times what is done of one training, and at its end what is left, as of one found finished."""
    done = 0.0

    def step(part: float) -> None:
        nonlocal done
        done += part
        add(size * part)

    yield step
    add(size * (1 - done))
