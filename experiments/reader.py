"""The experiment of MaKD on SQuAD: a low-rank reader against other readers of its size."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
)

from experiments import scores as csv_file
from experiments.makd import CALIBRATIONS, CLAIMS, LEARNING_RATES, WITHOUT, Row, add_size_options
from experiments.makd import ROWS as ALL_ROWS
from experiments.options import add_encoder_options, check_names, settings_of
from experiments.runs import Runs
from experiments.scores import TEACHER, surroundings
from experiments.students import Trained, facts, size_and_latency
from experiments.table import Table
from experiments.teachers import DROPOUT
from fastkd.cli.arguments import positive
from fastkd.data.batches import sample_batches, span_collator
from fastkd.data.squad import load_squad, split_by_title
from fastkd.data.squad_windows import encode_squad
from fastkd.methods.baselines.training import BaselineConfig
from fastkd.methods.feature_distillation import SpanDistillationTrainer
from fastkd.methods.makd import MaKDObjective
from fastkd.methods.objective import Objective
from fastkd.students import factorize, fit_embedding, plan_factorization, shallow
from fastkd.training.parallel import Add, ReportProgress
from fastkd.training.pretrained import config_with_dropout
from fastkd.training.runs import finished_or
from fastkd.training.spans import SpanTrainer
from fastkd.training.teacher import has_fast_bf16

ROWS = {name: row for name, row in ALL_ROWS.items() if name not in WITHOUT}
EPOCHS, TEACHER_EPOCHS = 2.0, 2.0
TRAINING = {"warmup_steps": 0.06, "weight_decay": 0.0}
COLUMNS = {"exact match": "eval_exact_match", "F1": "eval_f1"}
SIZES = {"max_length": 256, "doc_stride": 96}


@dataclass(frozen=True)
class Reading:
    """Windows to train on, and to evaluate with their questions."""

    train: Dataset
    windows: Dataset
    questions: Dataset


def add_options(parser: argparse.ArgumentParser) -> None:
    add_encoder_options(parser)
    add_size_options(parser)
    parser.add_argument(
        "--held-out", type=positive(int), help="test on so many articles of the dev file, train on its others too"
    )


def run(args: argparse.Namespace) -> Table:
    """Trains the teacher and the students, and gives the table that is then written."""
    check_names("--rows", args.rows, ROWS)
    size = f"{100 * args.ratio:g}"
    table = Table(
        name=f"makd-squad-{size}",
        title=f"MaKD and others on SQuAD in {size} % of the teacher's parameters",
        folder=Path(args.output) / size,
        rows=(TEACHER, *ROWS),
        columns=list(COLUMNS),
        claims=(*CLAIMS, *CALIBRATIONS),
        settings=settings_of(args, args.learning_rates or LEARNING_RATES),
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    reading = load(args.data_dir, tokenizer, args.held_out, args.max_train_rows)
    teacher = Path(args.output) / TEACHER
    training = {"num_train_epochs": args.epochs, **TRAINING}
    rows = {"data_dir": args.data_dir, "max_train_rows": args.max_train_rows, "held_out": args.held_out}
    make_teacher(args.model, reading, teacher, rows, table)
    shared = {"model": args.model, "ratio": args.ratio, "layers": args.layers, **rows, **training}
    groups = []
    for row in args.rows:
        student = partial(train_student, ROWS[row], str(teacher / "model"), args.ratio, args.layers, reading, training)
        rates, settings = tuple(args.learning_rates or LEARNING_RATES), {"row": row, **shared}
        groups.append(Runs(row, table.group_folder(row), settings, student, rates, tuple(args.seeds)))
    table.fill(groups, args.jobs)
    return table


def load(data_dir: str | None, tokenizer: Any, held_out: int | None, max_train_rows: int | None) -> Reading:
    """SQuAD 1.1; with ``held_out`` only so many articles of its dev file are for testing."""
    splits = load_squad("squad", data_dir)
    train, questions = splits["train"], splits["validation"]
    if held_out is not None:
        more, questions = split_by_title(questions, held_out)
        train = concatenate_datasets([train, more])
    train = train.shuffle(seed=0).select(range(min(len(train), max_train_rows or len(train))))
    return Reading(encode_squad(train, tokenizer, **SIZES), encode_squad(questions, tokenizer, **SIZES), questions)


def make_teacher(model: str, reading: Reading, folder: Path, rows: dict[str, Any], table: Table) -> None:
    """The teacher, fine-tuned unless it is there, and its lines. ``rows`` tells which ``reading`` it is."""
    training = {"num_train_epochs": TEACHER_EPOCHS, **TRAINING}

    def train() -> Trained:
        start = time.monotonic()
        torch.manual_seed(0)
        config = config_with_dropout(model, DROPOUT)
        teacher = AutoModelForQuestionAnswering.from_pretrained(model, config=config, dtype=torch.float32)
        args = arguments(folder / "trainer", learning_rate=1e-4, seed=0, **training)
        trainer = reader(SpanTrainer, teacher, args, model, reading)
        trainer.train()
        found = finish(trainer, start, 1e-4, reading, model)
        teacher.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / "model")
        return found

    trained = finished_or(folder, {"model": model, "dropout": DROPOUT, **rows, **training}, train)
    lines = csv_file.scores_of(TEACHER, 0, {name: name for name in COLUMNS}, trained)
    csv_file.write(table.group_folder(TEACHER) / "scores.csv", lines)


def train_student(
    row: Row,
    teacher: str,
    ratio: float,
    layers: int,
    reading: Reading,
    training: dict[str, Any],
    rate: float,
    seed: int,
    add: Add,
) -> Trained:
    start = time.monotonic()
    model = AutoModelForQuestionAnswering.from_pretrained(teacher)
    torch.manual_seed(seed)
    collate = span_collator(AutoTokenizer.from_pretrained(teacher))
    sample = sample_batches(reading.train, collate, row.calibration_rows) if row.calibration_rows else None
    student = student_of(model, row, round(ratio * model.num_parameters()), layers, sample)
    args = arguments(Path(teacher).with_name("trainer"), learning_rate=rate, seed=seed, disable_tqdm=True, **training)
    own = {"objective": objective_of(row, args), "teacher": model, "callbacks": [ReportProgress(add)]}
    trainer = reader(SpanDistillationTrainer, student, args, teacher, reading, **own)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return finish(trainer, start, rate, reading, teacher)


def student_of(
    teacher: PreTrainedModel, row: Row, budget: int, layers: int, sample: Iterable[Mapping[str, Any]] | None
) -> PreTrainedModel:
    """A student of at most so many parameters: the teacher's factors, or its first layers and a thin embedding.

    They are calibrated on a ``sample`` of batches, if there is one.
    """
    if row.low_rank:
        return factorize(teacher, plan_factorization(teacher, parameters=budget), sample)
    return fit_embedding(shallow(teacher, layers), budget, sample)


def objective_of(row: Row, args: TrainingArguments) -> Objective:
    if row.method == "makd":
        return MaKDObjective(**row.fields)
    return BaselineConfig(args.output_dir or "", baseline=row.method, use_cpu=args.use_cpu, **row.fields).objective()


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32}
    defaults |= {"save_strategy": "no", "logging_steps": 100, "train_sampling_strategy": "group_by_length"}
    precision = {"bf16": has_fast_bf16(), "use_cpu": not torch.cuda.is_available()}
    return TrainingArguments(str(folder), **{**defaults, **precision, **options})


def reader(kind: Any, model: Any, args: TrainingArguments, tokenizer: str, reading: Reading, **options: Any) -> Any:
    collate = span_collator(AutoTokenizer.from_pretrained(tokenizer))
    return kind(model, args, collate, reading.train, reading.windows, eval_questions=reading.questions, **options)


def finish(trainer: Any, start: float, rate: float, reading: Reading, tokenizer: str) -> Trained:
    """Scores, size and time of a trained reader."""
    metrics = trainer.evaluate()
    trained = facts(start, {name: metrics[metric] for name, metric in COLUMNS.items()}, rate)
    collate = span_collator(AutoTokenizer.from_pretrained(tokenizer))
    names = ("input_ids", "attention_mask")
    rows = [{name: collate([row])[name] for name in names} for row in reading.windows.select(range(10))]
    return {**trained, **size_and_latency(trainer.model.cpu().eval(), rows), **surroundings()}
