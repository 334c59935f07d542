"""The experiment of MixKD: its terms apart and together, with more and with less training data."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from experiments.claims import beats, gains_most_with_little_data
from experiments.options import add_encoder_options, add_least_steps, check_names, epochs_of, settings_of, several
from experiments.scores import MAJORITY, TEACHER
from experiments.students import Group, learning_rates
from experiments.table import Table
from experiments.teachers import make_teacher, write_scores
from fastkd.data.glue import check_task, load_task
from fastkd.methods.experiment import Experiment, prepare
from fastkd.methods.students import TransformerStudent
from fastkd.methods.teachers import load_teachers

_ALONE = {"alpha_sm": 0.0, "alpha_tmkd": 0.0, "alpha_kd": 0.0}
ROWS = {
    "fine-tuned": _ALONE,
    "KD": {**_ALONE, "alpha_kd": 1.0},
    "SM": {**_ALONE, "alpha_sm": 1.0},
    "TMKD": {**_ALONE, "alpha_tmkd": 1.0},
    "SM+TMKD": {**_ALONE, "alpha_sm": 1.0, "alpha_tmkd": 1.0},
}
"""The weights of each row's terms; that of the labels is 1 in all."""
CELLS = ("sst2:1%", "sst2:10%", "rte:10%", "rte:100%", "mrpc:10%", "mrpc:100%")
LEARNING_RATES = (5e-5, 1e-4, 2e-4)
EPOCHS, BATCH_SIZE = 3.0, 32
TRAINING = {
    "per_device_train_batch_size": BATCH_SIZE,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
}
STUDENT = TransformerStudent(layers=3, pooling=None, head_size=None)


class Cell(NamedTuple):
    """A column: a task, and the part of its training rows that teacher and students have."""

    task: str
    fraction: float

    @classmethod
    def parse(cls, name: str) -> Cell:
        """Of ``sst2:10%``."""
        found = re.fullmatch(r"([\w-]+):(\d+(?:\.\d+)?)%", name)
        if found is None or not 0 < float(found[2]) <= 100:
            raise ValueError(f"--cells has {name!r}; a cell is a task and a part of its rows, as sst2:10%")
        return cls(found[1], float(found[2]) / 100)


CLAIMS = (
    beats("SM+TMKD", "KD", "MixKD (SM + TMKD) beats KD"),
    gains_most_with_little_data("SM+TMKD", "KD", "MixKD gains most over KD with little data", Cell.parse),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_encoder_options(parser)
    add, default = parser.add_argument, ",".join(CELLS).replace("%", "%%")
    add("--cells", type=several(str), default=[*CELLS], help=f"the columns (default {default})")
    add_least_steps(parser, 300, "teacher and students")


def run(args: argparse.Namespace) -> Table:
    """Trains the teachers and the students, and gives the table that is then written."""
    check_names("--rows", args.rows, ROWS)
    cells = {name: Cell.parse(name) for name in args.cells}
    for cell in cells.values():
        check_task(cell.task, args.data_dir)
    table = Table(
        name="mixkd",
        title=f"MixKD into the {STUDENT.title}",
        folder=Path(args.output),
        rows=(MAJORITY, TEACHER, *ROWS),
        columns=list(dict.fromkeys((*CELLS, *args.cells))),
        claims=CLAIMS,
        settings=settings_of(args, args.learning_rates or LEARNING_RATES),
    )
    groups = [group for name, cell in cells.items() for group in groups_of(table, name, cell, args)]
    table.fill(groups, args.jobs)
    return table


def groups_of(table: Table, name: str, cell: Cell, args: argparse.Namespace) -> list[Group]:
    """The groups of a cell, a row each, after its teacher."""
    place, output = f"{cell.task}-{100 * cell.fraction:g}", Path(args.output)
    rows = {"data_dir": args.data_dir, "train_fraction": cell.fraction, "max_train_rows": args.max_train_rows}
    count = len(load_task(cell.task, **rows)["train"])
    epochs = epochs_of(args, count, BATCH_SIZE)
    teacher = make_teacher(args.model, [cell.task], output / "teachers" / place, num_train_epochs=epochs, **rows)
    rates = args.learning_rates or LEARNING_RATES
    shared = Experiment(
        teacher=teacher.folder,
        tasks=(cell.task,),
        output=str(output / "rows" / place),
        method="mixkd",
        student=STUDENT,
        seeds=tuple(args.seeds),
        training={"num_train_epochs": epochs, **TRAINING},
        **rows,
    )
    material, columns = prepare(shared, load_teachers(teacher.folder, shared.tasks)), {cell.task: name}
    write_scores(teacher, material, columns, table.group_folder(place, TEACHER))
    found = []
    for row in args.rows:
        own = replace(shared, output=str(table.group_folder(place, row)), arms=learning_rates(rates, ROWS[row]))
        found.append(Group(row, own, material, columns))
    return found
