"""What an experiment leaves: the table and picture of its models, and the best student with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset
from fastkd.methods.registry import get_method
from fastkd.training.output import new_folder
from fastkd.training.report import ModelResult, count_parameters, measure_latency, usage, write_report

if TYPE_CHECKING:
    from fastkd.methods.experiment import Experiment, Material, Scores
    from fastkd.methods.teachers import Teachers

LATENCY_ROWS = 20


def report(experiment: Experiment, teachers: Teachers, scores: Scores, material: Material) -> str:
    """Writes table and picture into the experiment's folder and gives the table."""
    single = single_rows(material.validation, MultiTaskCollator(teachers.tokenizer))
    known = [batch for batch in single if batch["task"] in teachers.first.heads]
    results = [_result(teachers.title, [material.teacher_scores], teachers.first.cpu(), known)]
    for arm, by_seed in scores.items():
        folder = experiment.student_folder(arm, experiment.seeds[0])
        student = AutoModelForSequenceClassification.from_pretrained(folder / "model")
        results.append(_result(arm, list(by_seed.values()), student, single))
    count = len(experiment.seeds)
    method = get_method(experiment.method).title
    title = f"{method} into the {experiment.student.title}, {count} seed{'s' if count > 1 else ''}"
    return write_report(Path(experiment.output), results, experiment.tasks, title)


def single_rows(validation: Mapping[str, MultiTaskDataset], collate: MultiTaskCollator) -> list[dict[str, Any]]:
    """Batches of one row to measure latency with, from all lengths of every validation set."""
    return [collate([rows[i]]) for rows in validation.values() for i in _evenly(len(rows))]


def publish(experiment: Experiment, scores: Scores, table: str) -> None:
    """Copies the last row's student with the best validation average to ``student``, with a model card."""
    arm, by_seed = list(scores.items())[-1]
    best = max(experiment.seeds, key=lambda seed: sum(by_seed[seed].values()))
    with new_folder(Path(experiment.output) / "student", replace=True) as folder:
        shutil.copytree(experiment.student_folder(arm, best) / "model", folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(_card(experiment, arm, table), encoding="utf-8")


def _evenly(count: int) -> range:
    return range(0, count, max(1, count // LATENCY_ROWS))


def _result(
    name: str, scores: Sequence[Mapping[str, float]], model: PreTrainedModel, batches: list[dict[str, Any]]
) -> ModelResult:
    return ModelResult(name, scores, *count_parameters(model), measure_latency(model, batches))


def _card(experiment: Experiment, arm: str, table: str) -> str:
    settings = {**experiment.training, **experiment.arms[arm]}
    options = "\n".join(f"- {name}: {value}" for name, value in sorted(settings.items()))
    method, teacher = get_method(experiment.method).title, experiment.teacher
    if isinstance(teacher, str):
        taught = f"the multi-task teacher `{Path(teacher).name}`"
    else:
        taught = "a teacher per task: " + ", ".join(f"{task} from `{Path(teacher[task]).name}`" for task in teacher)
    return f"""---
library_name: transformers
tags: [fastkd, knowledge-distillation, {experiment.method}]
---

# {experiment.student.title} distilled by {method}

A student for {", ".join(experiment.tasks)}, distilled with `fastkd distill {experiment.method}` from {taught}.
Of the seeds trained this is the one with the best average on the validation sets.

{usage(experiment.tasks[0])}

Validation scores (0 to 100, mean ± standard deviation over {len(experiment.seeds)} seeds; latency of one row).
This student is of the row "{arm}":

{table}

Training:

{options}
- seeds: {", ".join(map(str, experiment.seeds))}
- rows per task: {_rows_per_task(experiment)}
- tokens per row: {experiment.max_length}
"""


def _rows_per_task(experiment: Experiment) -> str:
    part = "all" if experiment.train_fraction is None else f"{100 * experiment.train_fraction:g} %"
    if experiment.max_train_rows is not None:
        part += f", at most {experiment.max_train_rows}"
    return part if experiment.augment is None else f"{part}, with up to {experiment.augment} variants of each"
