"""``fastkd distill``: distil a fine-tuned teacher into a student."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastkd.cli.arguments import positive
from fastkd.cli.config import CommandParser, comma_separated, write_options

if TYPE_CHECKING:
    from fastkd.methods.students import Student

EXAMPLE = """example:
  fastkd distill mkd --teacher runs/teacher --tasks sst2,mrpc --student bilstm --output runs/mkd

Trains the same student with and without distillation for every seed and ends with one table, a picture and the
student's folder. A transformer student is made of the teacher's first layers. Teachers of single tasks are given as
--teacher sst2=runs/a,mrpc=runs/b. Called again it goes on where it was stopped: students that are
finished are not trained again. Options can come from a file; options.yaml in the output folder repeats the run:

  fastkd distill mkd --config runs/mkd/options.yaml --seeds 1,2,3,4 --output runs/mkd"""


LEARNING_RATES = {"bilstm": 2e-3, "transformer": 1e-4}


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    distill = subparsers.add_parser("distill", help="distil a teacher into a student")
    methods = distill.add_subparsers(dest="method", required=True, metavar="method")
    parser = methods.add_parser(
        "mkd",
        help="multi-task distillation into one student (Liu et al., arXiv 1911.03588)",
        description="MKD: one multi-task student learns the logits of a fine-tuned multi-task teacher.",
        epilog=EXAMPLE,
        takes_config=True,
    )
    add = parser.add_argument
    add("--teacher", required=True, help="folder that `fastkd teacher` made, or one per task: sst2=DIR,mrpc=DIR")
    add("--tasks", required=True, help="comma-separated, of those the teacher knows: sst2,mrpc,...")
    add("--output", required=True, help="folder for table, picture, student, and what a second call reuses")
    add("--student", choices=tuple(LEARNING_RATES), default="bilstm", help="kind of student (default bilstm)")
    add("--preset", choices=("small", "mkd"), help="size of a bilstm (default small)")
    add("--layers", type=positive(int), help="of the teacher's layers, those that make a transformer (default 3)")
    add("--data-dir", help="folder of official-layout GLUE files; default: nyu-mll/glue from the Hub")
    add("--seeds", default="1,2,3", help="comma-separated; one student of each kind per seed (default 1,2,3)")
    add("--max-train-rows", type=positive(int), help="use a random subset of at most this many rows of each task")
    add("--max-length", type=positive(int), default=128, help="tokens per row, longer ones are cut (default 128)")
    add("--epochs", type=positive(float), default=10.0, help="times every row is seen (default 10)")
    add("--batch-size", type=positive(int), default=128, help="rows per step (default 128)")
    add(
        "--learning-rate",
        type=positive(float),
        help="peak, after a warm-up (default "
        + ", ".join(f"{kind} {rate}" for kind, rate in LEARNING_RATES.items())
        + ")",
    )
    add("--loss", choices=("mse", "kl"), default="mse", help="distance of the logits (default mse)")
    add("--temperature", type=float, default=1.0, help="of kl (default 1)")
    add("--hard-label-weight", type=float, default=0.0, help="weight of the labels beside the teacher (default 0)")
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the same students without distillation too (default: yes)",
    )
    add("--jobs", type=positive(int), help="students trained at a time (default: the number of cores; 1 on a GPU)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastkd.data.glue import get_task

    tasks = comma_separated("--tasks", args.tasks)
    for task in tasks:
        get_task(task)
    seeds = comma_separated("--seeds", args.seeds)
    if not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--seeds is {args.seeds!r}; it must be whole numbers of at least 0")

    from fastkd.methods.experiment import ARMS, WITHOUT_KD, Experiment, run_experiment

    experiment = Experiment(
        teacher=teacher_folders(args.teacher),
        tasks=tuple(tasks),
        output=args.output,
        method=args.method,
        student=student(args),
        arms={arm: fields for arm, fields in ARMS.items() if args.baseline or arm != WITHOUT_KD},
        data_dir=args.data_dir,
        seeds=tuple(int(seed) for seed in seeds),
        max_train_rows=args.max_train_rows,
        max_length=args.max_length,
        training=training_arguments(args),
    )
    table = run_experiment(experiment, args.jobs)
    write_options(args.output, f"distill {args.method}", vars(args))
    print(f"{table}\n\ntable, picture and student are in {args.output}")
    return 0


def teacher_folders(text: str) -> str | dict[str, str]:
    """The folder of one teacher, or from ``task=folder,...`` each task's."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in comma_separated("--teacher", text)]
    folders = {task.strip(): folder.strip() for task, _, folder in pairs}
    if len(folders) < len(pairs) or not all(task and folder for task, folder in folders.items()):
        raise ValueError(f"--teacher is {text!r}; it must be a folder, or task=folder,... with each task once")
    return folders


def student(args: argparse.Namespace) -> Student:
    from fastkd.methods.students import BiLSTMStudent, TransformerStudent

    if args.student == "bilstm":
        if args.layers is not None:
            raise ValueError("--layers is of --student transformer; the size of a bilstm is its --preset")
        return BiLSTMStudent(args.preset or "small")
    if args.preset is not None:
        raise ValueError("--preset is of --student bilstm; the size of a transformer is its --layers")
    return TransformerStudent(args.layers or 3)


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options that are fields of ``MKDConfig``."""
    return {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": args.learning_rate or LEARNING_RATES[args.student],
        "warmup_steps": 0.06,
        "weight_decay": 0.0,
        "loss": args.loss,
        "temperature": args.temperature,
        "hard_label_weight": args.hard_label_weight,
    }
