"""The kinds of student of an experiment, each of which makes new students that start from a teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel

from fastkd.data.glue import TASKS
from fastkd.data.task import custom_task
from fastkd.methods.baselines.theseus import theseus
from fastkd.students import (
    BiAttentiveLSTM,
    BiAttentiveLSTMConfig,
    factorize,
    fit_embedding,
    plan_factorization,
    transformer_student,
)
from fastkd.students.transformer import HEAD_SIZE
from fastkd.training.classifiers import MultiTaskEncoder

Labels = Mapping[str, Sequence[str]]  # of each task, in the order of the outputs; none for a regression
Batches = Iterable[Mapping[str, Any]]  # keyword arguments of a MultiTaskEncoder


class Student(Protocol):
    """A kind of student: a dataclass of JSON values, picklable."""

    @property
    def title(self) -> str:
        """What tables and pictures call it."""

    def make(self, teacher: MultiTaskEncoder, labels: Labels, batches: Batches = ()) -> PreTrainedModel:
        """A new student; what of it is random follows torch's generator.

        ``batches`` of rows to be learned from, in random order, are what a student is calibrated on; without any it
        is of the same form.
        """


@dataclass(frozen=True)
class BiLSTMStudent:
    """A ``BiAttentiveLSTM`` of the preset, with the teacher's word embeddings where the widths agree."""

    preset: str = "small"

    @property
    def title(self) -> str:
        return f"BiLSTM student ({self.preset})"

    def make(self, teacher: MultiTaskEncoder, labels: Labels, batches: Batches = ()) -> BiAttentiveLSTM:
        table: torch.Tensor = teacher.get_input_embeddings().get_parameter("weight").detach()
        vocab_size, width = table.shape
        sizes = {"embedding_size": width} if self.preset == "small" else {}
        tasks = {task: {"labels": list(names)} for task, names in labels.items()}
        config = BiAttentiveLSTMConfig.preset(self.preset, vocab_size=vocab_size, tasks=tasks, **sizes)
        student = BiAttentiveLSTM(config)
        if config.embedding_size == width:
            student.use_embeddings(table)
        return student


@dataclass(frozen=True)
class TransformerStudent:
    """The teacher's first layers: ``transformer_student`` documents the options; ``pooling`` None is the teacher's.

    ``parameters``: the word embedding becomes two factors, so that the student has so many at most; they keep most of
    the words of ``calibration_rows`` rows, or with 0 of all words alike. ``keeps_heads``: it begins with the teacher's
    heads of the tasks, whose form it must have.
    """

    layers: int = 3
    pooling: str | None = "cls_of_layers"
    head_size: int | None = HEAD_SIZE
    parameters: int | None = None
    keeps_heads: bool = False
    calibration_rows: int = 0

    @property
    def title(self) -> str:
        return f"Transformer student ({self.layers} layer{'s' if self.layers > 1 else ''})"

    def make(self, teacher: MultiTaskEncoder, labels: Labels, batches: Batches = ()) -> MultiTaskEncoder:
        pooling = self.pooling or teacher.config.pooling
        tasks = [TASKS.get(name) or custom_task(name, (), tuple(names)) for name, names in labels.items()]
        student = transformer_student(teacher, self.layers, tasks, pooling=pooling, head_size=self.head_size)
        if self.keeps_heads:
            student.heads.load_state_dict(
                {name: teacher.heads.state_dict()[name] for name in student.heads.state_dict()}
            )
        if self.parameters is None:
            return student
        return fit_embedding(student, self.parameters, _first(self.calibration_rows, batches))


@dataclass(frozen=True)
class TheseusStudent:
    """The teacher's first layers, trained in the teacher by BERT-of-Theseus: ``theseus`` documents it."""

    layers: int = 3

    @property
    def title(self) -> str:
        return f"Theseus student ({self.layers} layer{'s' if self.layers > 1 else ''})"

    def make(self, teacher: MultiTaskEncoder, labels: Labels, batches: Batches = ()) -> MultiTaskEncoder:
        model = copy.deepcopy(teacher)
        model.keep_tasks(list(labels))
        return theseus(model, self.layers)


@dataclass(frozen=True)
class LowRankStudent:
    """The teacher with its matrices in two factors: ``plan_factorization`` documents the options.

    ``calibration_rows``: the factors keep most of what the matrices give on so many rows, or with 0 of the weights.

    It keeps the teacher's heads of the tasks. Teachers of single tasks cannot share one.
    """

    ratio: float | None = None
    parameters: int | None = None
    rank: int | None = None
    embedding: bool | None = None
    allocation: Literal["uniform", "spectrum"] = "uniform"
    calibration_rows: int = 512

    @property
    def title(self) -> str:
        if self.rank is not None:
            return f"low-rank student (rank {self.rank})"
        budget = f"{self.ratio:.0%} of the teacher" if self.parameters is None else f"{self.parameters / 1e6:.3g} M"
        return f"low-rank student ({budget})"

    def make(self, teacher: MultiTaskEncoder, labels: Labels, batches: Batches = ()) -> MultiTaskEncoder:
        model = copy.deepcopy(teacher)
        model.keep_tasks(list(labels))
        options = asdict(self)
        sample = _first(options.pop("calibration_rows"), batches)
        return factorize(model, plan_factorization(model, **options), sample)


def _first(rows: int, batches: Batches) -> list[Mapping[str, Any]] | None:
    """Batches of so many rows or a few more; None where none are asked for, or there are none to be had."""
    if rows < 0:
        raise ValueError(f"calibration_rows is {rows}; it must be at least 0")
    found, count = [], 0
    for batch in batches if rows else ():
        found.append(batch)
        count += len(batch["input_ids"])
        if count >= rows:
            break
    return found or None
