"""The experiment of MKD: a student shared by several tasks against one per task, and against none distilled."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experiments.claims import beats
from experiments.options import add_encoder_options, add_least_steps, check_names, epochs_of, settings_of, several
from experiments.scores import MAJORITY, TEACHER
from experiments.students import Group, learning_rates
from experiments.table import Table
from experiments.teachers import make_teacher, write_scores
from fastkd.cli.arguments import positive
from fastkd.data.encode import MultiTaskDataset
from fastkd.data.glue import check_task
from fastkd.methods.experiment import Experiment, Material, prepare
from fastkd.methods.registry import METHODS
from fastkd.methods.students import BiLSTMStudent, Student, TransformerStudent
from fastkd.methods.teachers import load_teachers

NONE, SINGLE, MULTI, AUGMENTED = "no distillation", "single-task", "multi-task", "augmented"
MORE = "more texts"
FINETUNED = {MULTI: "multi-task fine-tuned", AUGMENTED: "augmented fine-tuned"}
ROWS = (NONE, SINGLE, MULTI, FINETUNED[MULTI], AUGMENTED, FINETUNED[AUGMENTED], MORE)
TASKS = ("sst2", "mrpc", "stsb", "rte", "qnli")
STUDENTS: Mapping[str, Student] = {"bilstm": BiLSTMStudent("small"), "transformer": TransformerStudent(layers=3)}
LEARNING_RATES = {"bilstm": (2.5e-4, 5e-4, 1e-3), "transformer": (5e-5, 1e-4, 2e-4)}
EPOCHS, TEACHER_EPOCHS, BATCH_SIZE = 10.0, 3, 32
TRAINING = {
    "per_device_train_batch_size": BATCH_SIZE,  # MKD's own 128 would leave a small task alone with 20 steps an epoch
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
}
CLAIMS = (
    beats(MULTI, SINGLE, "a shared student learns better from multi-task than from single-task distillation"),
    beats(MULTI, NONE, "a student learns better from distillation than from the labels"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_encoder_options(parser)
    add = parser.add_argument
    add("--student", choices=tuple(STUDENTS), default="bilstm", help="a table for each (default bilstm)")
    add("--tasks", type=several(str), default=[*TASKS], help=f"the columns (default {','.join(TASKS)})")
    add_least_steps(parser, 1000, "single-task students")
    add("--augment", type=positive(int), default=4, help="variants to try per row in the augmented rows (default 4)")
    about = "rows of a task at most in the row of more texts, which has no use for their labels (default 50000)"
    add("--more-texts", type=positive(int), default=50_000, help=about)


def run(args: argparse.Namespace) -> Table:
    """Trains the teacher and the students, and gives the table that is then written."""
    check_names("--rows", args.rows, ROWS)
    if MORE in args.rows and args.more_texts <= args.max_train_rows:
        raise ValueError(f"--more-texts is {args.more_texts}; it must be above --max-train-rows, {args.max_train_rows}")
    for task in args.tasks:
        check_task(task, args.data_dir)
    rows = {"data_dir": args.data_dir, "max_train_rows": args.max_train_rows}
    options = {"num_train_epochs": TEACHER_EPOCHS, "sampling_tau": 0.5, **rows}
    teacher = make_teacher(args.model, args.tasks, Path(args.output) / TEACHER, **options)
    rates = args.learning_rates or LEARNING_RATES[args.student]
    shared = Experiment(
        teacher=teacher.folder,
        tasks=tuple(args.tasks),
        output=str(Path(args.output) / "rows"),
        student=STUDENTS[args.student],
        arms=learning_rates(rates),
        seeds=tuple(args.seeds),
        training={"num_train_epochs": args.epochs, **TRAINING},
        **rows,
    )
    material = prepare(shared, load_teachers(teacher.folder, args.tasks))
    sizes = {"single sentences": 1, "pairs": 2}
    tasks = material.train.tasks
    parts = {part: [name for name, task in tasks.items() if len(task.columns) == n] for part, n in sizes.items()}
    table = Table(
        name=f"mkd-{args.student}",
        title=f"MKD into the {STUDENTS[args.student].title}",
        folder=Path(args.output) / args.student,
        rows=(MAJORITY, TEACHER, *ROWS),
        columns=args.tasks,
        claims=CLAIMS,
        settings=settings_of(args, rates),
        parts={part: columns for part, columns in parts.items() if columns},
    )
    write_scores(teacher, material, {task: task for task in args.tasks}, table.group_folder(TEACHER))
    table.fill(groups(table, shared, material, args), args.jobs)
    return table


def groups(table: Table, shared: Experiment, material: Material, args: argparse.Namespace) -> list[Group]:
    """Of the chosen rows; a row of fine-tuned students brings the one that they come from."""

    chosen = args.rows

    def group(row: str, experiment: Experiment, material: Material, *name: str) -> Group:
        own = replace(experiment, output=str(table.group_folder(row, *name)))
        columns = {task: task for task in experiment.tasks}
        finetuned = FINETUNED[row] if FINETUNED.get(row) in chosen else None
        return Group(row, own, material, columns, keeps_weights=row in FINETUNED, finetuned=finetuned)

    found = []
    if NONE in chosen:
        rates = [arm["learning_rate"] for arm in shared.arms.values()]
        arms = learning_rates(rates, METHODS["mkd"].without_kd)
        found.append(group(NONE, replace(shared, arms=arms), material))
    if SINGLE in chosen:
        for task in shared.tasks:
            own = only(material, task)
            epochs = epochs_of(args, len(own.train), BATCH_SIZE)
            alone = replace(shared, tasks=(task,), training={**shared.training, "num_train_epochs": epochs})
            found.append(group(SINGLE, alone, own, task))
    if {MULTI, FINETUNED[MULTI]} & {*chosen}:
        found.append(group(MULTI, shared, material))
    unlabelled = {
        AUGMENTED: replace(shared, augment=args.augment, output=str(Path(args.output) / "augmented-rows")),
        MORE: replace(shared, max_train_rows=args.more_texts, output=str(Path(args.output) / "more-rows")),
    }
    for row, experiment in unlabelled.items():
        if {row, FINETUNED.get(row)} & {*chosen}:
            found.append(group(row, experiment, prepare(experiment, load_teachers(shared.teacher, shared.tasks))))
    return found


def only(material: Material, task: str) -> Material:
    """What belongs to one task."""
    validation = {name: rows for name, rows in material.validation.items() if task in rows.datasets}
    train = MultiTaskDataset({task: material.train.datasets[task]})
    return material._replace(train=train, validation=validation, teacher_scores={task: material.teacher_scores[task]})
