"""The experiment of MaKD: a low-rank student against other students of its size, and without each of its parts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.claims import Claim, beats
from experiments.mkd import TASKS
from experiments.options import add_encoder_options, add_least_steps, check_names, epochs_of, settings_of, several
from experiments.scores import MAJORITY, TEACHER
from experiments.students import Group, learning_rates
from experiments.table import Table
from experiments.teachers import Teacher, make_teacher, write_scores
from fastkd.cli.arguments import fraction, positive
from fastkd.data.glue import check_task
from fastkd.methods.experiment import Experiment, prepare
from fastkd.methods.registry import METHODS
from fastkd.methods.students import LowRankStudent, TransformerStudent
from fastkd.methods.teachers import load_teachers


class Row(NamedTuple):
    """``fields`` are those of the method's configuration; ``calibration_rows`` those of the student's factors."""

    method: str
    fields: Mapping[str, Any]
    low_rank: bool
    calibration_rows: int = 0


MAKD, FINE_TUNED, CALIBRATED = "MaKD", "low-rank fine-tuned", "calibrated"
OTHERS = {"DistilBERT": "distilbert", "PKD": "pkd", "TinyBERT": "tinybert", "MiniLM": "minilm", "MiniLMv2": "minilmv2"}
OPTIONS = {"minilmv2": {"relation_heads": 12}}
"""A MiniLM has 12 heads of 32; the 48 relation heads that suit a width of 768 would be 8 wide."""
PARTS = {"attention": ["attention"], "hidden states": ["hidden"], "matrices": ["mha", "ffn"], "logits": ["logits"]}
WITHOUT = {f"{MAKD} without {part}": {f"{name}_weight": 0.0 for name in names} for part, names in PARTS.items()}
ROWS = {
    FINE_TUNED: Row("makd", METHODS["makd"].without_kd, low_rank=True),
    **{row: Row(name, {"options": OPTIONS.get(name, {})}, low_rank=False) for row, name in OTHERS.items()},
    MAKD: Row("makd", {}, low_rank=True),
    **{row: Row("makd", fields, low_rank=True) for row, fields in WITHOUT.items()},
}
CALIBRATION_ROWS = 512
CALIBRATES = (FINE_TUNED, "DistilBERT", "PKD", MAKD)
ROWS |= {f"{row} {CALIBRATED}": ROWS[row]._replace(calibration_rows=CALIBRATION_ROWS) for row in CALIBRATES}
LEARNING_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
EPOCHS, TEACHER_EPOCHS, BATCH_SIZE = 3.0, 3, 32
TRAINING = {
    "per_device_train_batch_size": BATCH_SIZE,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
}
CLAIMS: tuple[Claim, ...] = tuple(
    beats(MAKD, row, f"MaKD beats {row} at one number of parameters") for row in (FINE_TUNED, *OTHERS)
)
GAINS: tuple[Claim, ...] = tuple(beats(MAKD, f"{MAKD} without {part}", f"MaKD gains by its {part}") for part in PARTS)
CALIBRATIONS: tuple[Claim, ...] = (
    *(beats(f"{row} {CALIBRATED}", row, f"{row} gains by calibration") for row in CALIBRATES),
    *(
        beats(f"{MAKD} {CALIBRATED}", f"{row} {CALIBRATED}", f"{MAKD} beats {row}, both calibrated")
        for row in CALIBRATES
        if row != MAKD
    ),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_encoder_options(parser)
    add_size_options(parser)
    usual = ",".join(TASKS)
    parser.add_argument(
        "--tasks",
        type=several(str),
        default=[*TASKS],
        help=f"the columns (default {usual}, of all of which the teacher of a part learns)",
    )
    add_least_steps(parser, 300, "students")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ratio", type=fraction, default=0.5, help="students' parameters as a part of the teacher's (default 0.5)")
    add(
        "--layers",
        type=positive(int),
        default=3,
        help="of the other methods' students (default 3; fewer for a small ratio)",
    )


def run(args: argparse.Namespace) -> Table:
    """Trains the teacher and the students, and gives the table that is then written."""
    check_names("--rows", args.rows, ROWS)
    for task in args.tasks:
        check_task(task, args.data_dir)
    size = f"{100 * args.ratio:g}"
    table = Table(
        name=f"makd-{size}",
        title=f"MaKD and others in {size} % of the teacher's parameters",
        folder=Path(args.output) / size,
        rows=(MAJORITY, TEACHER, *ROWS),
        columns=list(dict.fromkeys((*TASKS, *args.tasks))),
        claims=(*CLAIMS, *GAINS, *CALIBRATIONS),
        settings=settings_of(args, args.learning_rates or LEARNING_RATES),
    )
    options = {"num_train_epochs": TEACHER_EPOCHS, "sampling_tau": 0.5, **rows_of(args)}
    taught = TASKS if {*args.tasks} <= {*TASKS} else args.tasks  # a part of the usual columns has the usual teacher
    teacher = make_teacher(args.model, taught, Path(args.output) / TEACHER, **options)
    first = load_teachers(teacher.folder, args.tasks).first
    budget = round(args.ratio * first.num_parameters())
    student_of(ROWS["PKD"], budget, args.layers).make(
        first, {task: first.config.tasks[task]["labels"] for task in args.tasks}
    )  # or raises
    groups = [group for task in args.tasks for group in groups_of(table, task, teacher, budget, args)]
    table.fill(groups, args.jobs)
    return table


def groups_of(table: Table, task: str, teacher: Teacher, budget: int, args: argparse.Namespace) -> list[Group]:
    """The groups of a task, a row each, after its teacher's scores."""
    shared = Experiment(
        teacher=teacher.folder,
        tasks=(task,),
        output=str(Path(args.output) / "rows" / task),
        method="makd",
        student=LowRankStudent(parameters=budget, calibration_rows=0),
        seeds=tuple(args.seeds),
        **rows_of(args),
    )
    material, columns = prepare(shared, load_teachers(teacher.folder, shared.tasks)), {task: task}
    write_scores(teacher, material, columns, table.group_folder(TEACHER, task))
    rates = args.learning_rates or LEARNING_RATES
    training = {"num_train_epochs": epochs_of(args, len(material.train), BATCH_SIZE), **TRAINING}
    found = []
    for name in args.rows:
        row = ROWS[name]
        own = replace(
            shared,
            method=row.method,
            student=student_of(row, budget, args.layers),
            output=str(table.group_folder(name, task)),
            arms=learning_rates(rates, row.fields),
            training=training,
        )
        found.append(Group(name, own, material, columns))
    return found


def rows_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides about the rows that teacher and students have."""
    return {"data_dir": args.data_dir, "max_train_rows": args.max_train_rows}


def student_of(row: Row, budget: int, layers: int) -> LowRankStudent | TransformerStudent:
    """The teacher's factors, or its first layers and heads with a word embedding as thin as need be."""
    if row.low_rank:
        return LowRankStudent(parameters=budget, calibration_rows=row.calibration_rows)
    return TransformerStudent(
        layers,
        pooling=None,
        head_size=None,
        parameters=budget,
        keeps_heads=True,
        calibration_rows=row.calibration_rows,
    )
