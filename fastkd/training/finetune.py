"""Fine-tuning a student on one of its tasks with the labels alone, keeping its best epoch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import fastkd.students  # noqa: F401  makes the Auto classes know the students
from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.data.glue import TASKS
from fastkd.training.adoption import refuse_missing_heads, refuse_other_labels
from fastkd.training.output import check_output, new_folder
from fastkd.training.parallel import Add, ReportProgress, train_all
from fastkd.training.pretrained import load_tokenizer
from fastkd.training.report import usage
from fastkd.training.teacher import has_fast_bf16
from fastkd.training.trainer import MultiTaskTrainer

LEARNING_RATES = (1e-5, 1.5e-5, 5e-5)
DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 64,
    "weight_decay": 0.0,
    "warmup_steps": 0.06,
    "train_sampling_strategy": "group_by_length",
}
_SCORE = "eval_average"


@dataclass(frozen=True)
class Candidate:
    """The best evaluation of one training; ``epoch`` 0 is the student that it started from, of score ``start``."""

    learning_rate: float
    start: float
    epoch: float
    metrics: Mapping[str, float]
    weights: Mapping[str, Tensor]

    @property
    def score(self) -> float:
        """The task's score on its validation set, 0 to 100."""
        return self.metrics[_SCORE]


class KeepBest(TrainerCallback):
    """Keeps metrics and weights of the best evaluation, and of equal ones of the first."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.best: Candidate | None = None
        self._metrics: dict[str, float] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **logged: Any) -> None:
        logs, model = logged["logs"], logged["model"]
        self._metrics |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        if _SCORE in logs and (self.best is None or logs[_SCORE] > self.best.score):
            start = logs[_SCORE] if self.best is None else self.best.start
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            self.best = Candidate(self.learning_rate, start, state.epoch or 0.0, dict(self._metrics), weights)


def finetune(
    student: str | Path,
    task: str,
    output_dir: str | Path,
    *,
    data_dir: str | Path | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    train_fraction: float | None = None,
    max_train_rows: int | None = None,
    max_length: int = 128,
    seed: int = 0,
    **arguments: Any,
) -> list[Candidate]:
    """Fine-tunes all parameters of a student on one task, once per learning rate, and saves the best epoch of all.

    The student itself takes part as epoch 0, so that what is saved is never worse on the validation set than what
    was given; a training that diverges ends with its best epoch so far. Of equal scores the earlier epoch and the
    first learning rate are kept. What is saved has the head of that task alone, the tokenizer, a model card and
    ``eval_results.json``.

    Args:
        student: a folder with a student and its tokenizer: any classifier with ``config.tasks`` and ``heads``.
        task: one of the student's tasks.
        output_dir: a new or an empty folder; filled at once when training has succeeded, never half written.
        data_dir, train_fraction, max_train_rows: see ``fastkd.data.glue.load_task``.
        learning_rates: peaks to try. The defaults are MKD's as we recall them.
        max_length: tokens of a row, a pair counting as one.
        seed: of subset, order and dropout.
        **arguments: of ``transformers.TrainingArguments``, over ``DEFAULTS``, which are choices of this project but
            for MKD's batches of 128.

    Returns:
        The best evaluation of every training, in the order of ``learning_rates``.

    Raises:
        ValueError: the student has no ``heads``, none for the task, or other labels; a learning rate is not positive.
        FileExistsError: ``output_dir`` holds something.
    """
    if not learning_rates or not all(0 < rate < float("inf") for rate in learning_rates):
        raise ValueError(f"learning_rates are {list(learning_rates)}; they must be positive numbers, at least one")
    check_output(output_dir)
    model, tokenizer = _load(student, task), load_tokenizer(student)
    check_output(output_dir, needed_bytes=4 * model.num_parameters())
    subset: dict[str, Any] = {"train_fraction": train_fraction, "max_train_rows": max_train_rows}
    rows = load_encoded([task], tokenizer, max_length, data_dir, seed=seed, **subset)
    labels = model.config.tasks[task]["labels"]
    refuse_other_labels(f"the student in {student}", task, labels, rows[0].tasks[task].label_names)
    train = partial(train_candidate, student, task, MultiTaskCollator(tokenizer), *rows, {"seed": seed, **arguments})
    done = train_all(train, list(learning_rates), jobs=1, description=f"fine-tuning on {task}")
    best = max(done.values(), key=lambda candidate: candidate.score)
    model.load_state_dict(best.weights)
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "eval_results.json").write_text(json.dumps(best.metrics, indent=2) + "\n")
        (folder / "README.md").write_text(_card(model, Path(student).name, task, best), encoding="utf-8")
    return list(done.values())


def _load(folder: str | Path, task: str) -> PreTrainedModel:
    """The student with the head of one task."""
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"no student in {folder}: make one with `fastkd distill`")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"no student can be loaded from {folder}: {' '.join(str(error).split())}") from error
    tasks = getattr(model.config, "tasks", {})
    refuse_missing_heads(f"the student in {folder}", [task], tasks)
    if not hasattr(model, "heads"):
        raise ValueError(
            f"the student in {folder} is a {type(model).__name__}, which has no heads: fine-tune it by MKDTrainer with "
            "distillation_weight=0 and hard_label_weight=1"
        )
    if task in TASKS:
        refuse_other_labels(f"the student in {folder}", task, tasks[task]["labels"], TASKS[task].label_names)
    model.config.tasks = {task: tasks[task]}
    model.heads = nn.ModuleDict({task: model.heads[task]})
    return model  # type: ignore[no-any-return]


def train_candidate(
    student: str | Path,
    task: str,
    collate: MultiTaskCollator,
    rows: MultiTaskDataset,
    validation: Mapping[str, MultiTaskDataset],
    arguments: Mapping[str, Any],
    learning_rate: float,
    add: Add,
) -> Candidate:
    """Fine-tunes a saved student once and saves nothing.

    Args:
        student, task: see :func:`finetune`.
        rows, validation: encoded, of that task alone.
        arguments: of ``transformers.TrainingArguments``, over ``DEFAULTS`` and the machine's fastest precision.
        add: see :func:`train_all`.
    """
    keep = KeepBest(learning_rate)
    precision = {"bf16": has_fast_bf16(), "use_cpu": not torch.accelerator.is_available()}
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch,
            **{**DEFAULTS, **precision, **arguments, "learning_rate": learning_rate},
            eval_strategy="epoch",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = MultiTaskTrainer(
            _load(student, task), args, collate, rows, validation, callbacks=[keep, ReportProgress(add)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.evaluate()
        with suppress(FloatingPointError):  # diverged; what was best before it did is kept
            trainer.train()
    assert keep.best is not None
    return keep.best


def _card(model: PreTrainedModel, student: str, task: str, best: Candidate) -> str:
    tuned = f"fine-tuned with learning rate {best.learning_rate:g} for {best.epoch:g} epochs"
    change = tuned if best.epoch else "no epoch of fine-tuning being better"
    return f"""---
library_name: transformers
tags: [fastkd, knowledge-distillation]
---

# {type(model).__name__} for {task}

The student `{student}` with the head of {task} alone, {change}.
Its score on the validation set, on which that was chosen, is {best.score:.1f} of 100; before it was {best.start:.1f}.

{usage(task)}
"""
