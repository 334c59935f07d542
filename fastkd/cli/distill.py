"""``fastkd distill``: distil a fine-tuned teacher into a student."""

from __future__ import annotations

import argparse
from typing import Any

from fastkd.cli.arguments import fraction, positive
from fastkd.cli.config import CommandParser, comma_separated, write_options

EXAMPLE = """example:
  fastkd distill mkd --teacher runs/teacher --tasks sst2,mrpc --student bilstm --output runs/mkd

Trains the same student with and without distillation for every seed and ends with one table, a picture and the
student's folder. Called again it goes on where it was stopped: students that are finished are not trained again.
Options can come from a file; options.yaml in the output folder repeats the run:

  fastkd distill mkd --config runs/mkd/options.yaml --seeds 1,2,3,4 --output runs/mkd"""


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
    add("--teacher", required=True, help="folder that `fastkd teacher` made")
    add("--tasks", required=True, help="comma-separated, of those the teacher knows: sst2,mrpc,...")
    add("--output", required=True, help="folder for table, picture, student, and what a second call reuses")
    add("--student", choices=("bilstm",), default="bilstm", help="kind of student (default bilstm)")
    add("--preset", choices=("small", "mkd"), default="small", help="size of the student (default small)")
    add("--data-dir", help="folder of GLUE's files or of your own (docs/data.md); default: from the Hub")
    add("--seeds", default="1,2,3", help="comma-separated; one student of each kind per seed (default 1,2,3)")
    add("--paraphrases", help="folder of tables <task>.csv with paraphrases of training rows (docs/data.md)")
    add(
        "--train-fraction",
        type=fraction,
        help="use a random part of each task's training rows, of each class this fraction (0 to 1)",
    )
    add("--max-train-rows", type=positive(int), help="use a random subset of at most this many rows of each task")
    add(
        "--augment",
        type=positive(int),
        help="unlabelled variants to try per row, for the teacher to label (default: none)",
    )
    add("--max-length", type=positive(int), default=128, help="tokens per row, longer ones are cut (default 128)")
    add("--epochs", type=positive(float), default=10.0, help="times every row is seen (default 10)")
    add("--batch-size", type=positive(int), default=128, help="rows per step (default 128)")
    add("--learning-rate", type=positive(float), default=2e-3, help="peak, after a warm-up (default 2e-3)")
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
    from fastkd.data.glue import check_task

    tasks = comma_separated("--tasks", args.tasks)
    for task in tasks:
        check_task(task, args.data_dir)
    seeds = comma_separated("--seeds", args.seeds)
    if not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--seeds is {args.seeds!r}; it must be whole numbers of at least 0")

    from fastkd.methods.experiment import MKDExperiment, run_mkd

    experiment = MKDExperiment(
        teacher=args.teacher,
        tasks=tuple(tasks),
        output=args.output,
        data_dir=args.data_dir,
        preset=args.preset,
        seeds=tuple(int(seed) for seed in seeds),
        baseline=args.baseline,
        train_fraction=args.train_fraction,
        max_train_rows=args.max_train_rows,
        paraphrases=args.paraphrases,
        augment=args.augment,
        max_length=args.max_length,
        training=training_arguments(args),
    )
    table = run_mkd(experiment, args.jobs)
    write_options(args.output, "distill mkd", vars(args))
    print(f"{table}\n\ntable, picture and student are in {args.output}")
    return 0


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options that are fields of ``MKDConfig``."""
    return {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": args.learning_rate,
        "warmup_steps": 0.06,
        "weight_decay": 0.0,
        "loss": args.loss,
        "temperature": args.temperature,
        "hard_label_weight": args.hard_label_weight,
    }
