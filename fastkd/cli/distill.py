"""``fastkd distill``: distil a fine-tuned teacher into a student."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastkd.cli.arguments import fraction, positive
from fastkd.cli.config import CommandParser, comma_separated, write_options
from fastkd.cli.methods import BASELINES, METHODS, Defaults, rank_options

if TYPE_CHECKING:
    from fastkd.methods.students import Student

KINDS = {
    "bilstm": "an LSTM with attention between the sentences",
    "transformer": "the teacher's first layers",
    "low-rank": "the teacher with its matrices in two factors",
}
EPILOG = """{example}
Trains the same student with and without distillation for every seed and ends with one table, a picture and the
student's folder. Teachers of single tasks are given as --teacher sst2=runs/a,mrpc=runs/b. Called again it goes on
where it was stopped: students that are finished are not trained again. Options can come from a file; options.yaml in
the output folder repeats the run:

  fastkd distill {method} --config runs/{method}/options.yaml --seeds 1,2,3,4 --output runs/{method}"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    distill = subparsers.add_parser("distill", help="distil a teacher into a student")
    methods = distill.add_subparsers(dest="method", required=True, metavar="method")
    for name, method in METHODS.items():
        epilog = EPILOG.format(example=method.example, method=name)
        parser: CommandParser = methods.add_parser(
            name, help=method.help, description=method.description, epilog=epilog, takes_config=True
        )
        add_options(parser, method.defaults)
        method.add_options(parser)
        parser.set_defaults(run=run)


def add_options(parser: CommandParser, defaults: Defaults) -> None:
    kinds, add = list(defaults.learning_rates), parser.add_argument
    add("--teacher", required=True, help="folder that `fastkd teacher` made, or one per task: sst2=DIR,mrpc=DIR")
    add("--tasks", required=True, help="comma-separated, of those the teacher knows: sst2,mrpc,...")
    add("--output", required=True, help="folder for table, picture, student, and what a second call reuses")
    what = "; ".join(f"{kind}, {KINDS[kind]}" for kind in kinds)
    add("--student", choices=kinds, default=kinds[0], help=f"kind of student: {what} (default {kinds[0]})")
    add("--data-dir", help="folder of GLUE's files or of your own (docs/data.md); default: from the Hub")
    add("--seeds", default="1,2,3", help="comma-separated; one student of each kind per seed (default 1,2,3)")
    add("--paraphrases", help="folder of tables <task>.csv with paraphrases of training rows (docs/data.md)")
    add("--train-fraction", type=fraction, help="use this part, 0 to 1, of each class of each task's training rows")
    add("--max-train-rows", type=positive(int), help="use a random subset of at most this many rows of each task")
    add("--max-length", type=positive(int), default=128, help="tokens per row, longer ones are cut (default 128)")
    epochs, rows, rates = defaults
    add("--epochs", type=positive(float), default=epochs, help=f"times every row is seen (default {epochs:g})")
    add("--batch-size", type=positive(int), default=rows, help=f"rows per step (default {rows})")
    by_kind = ", ".join(f"{kind} {rate:g}" for kind, rate in rates.items())
    add("--learning-rate", type=positive(float), help=f"peak, after a warm-up (default {by_kind})")
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the same students without distillation too (default: yes)",
    )
    add("--jobs", type=positive(int), help="students trained at a time (default: the number of cores; 1 on a GPU)")


def run(args: argparse.Namespace) -> int:
    from fastkd.data.glue import check_task

    tasks = comma_separated("--tasks", args.tasks)
    for task in tasks:
        check_task(task, args.data_dir)
    seeds = comma_separated("--seeds", args.seeds)
    if not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--seeds is {args.seeds!r}; it must be whole numbers of at least 0")

    from fastkd.methods.experiment import WITHOUT_KD, Experiment, arms_of, run_experiment

    experiment = Experiment(
        teacher=teacher_folders(args.teacher),
        tasks=tuple(tasks),
        output=args.output,
        method=args.method,
        student=student(args),
        arms={arm: fields for arm, fields in arms_of(args.method).items() if args.baseline or arm != WITHOUT_KD},
        data_dir=args.data_dir,
        seeds=tuple(int(seed) for seed in seeds),
        train_fraction=args.train_fraction,
        max_train_rows=args.max_train_rows,
        paraphrases=args.paraphrases,
        augment=getattr(args, "augment", None),
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
    from fastkd.methods.students import BiLSTMStudent, LowRankStudent, TheseusStudent, TransformerStudent

    if args.student == "low-rank":
        return LowRankStudent(**rank_options(args), calibration_rows=args.calibration_rows)
    if args.student == "bilstm":
        if args.layers is not None:
            raise ValueError("--layers is of --student transformer; the size of a bilstm is its --preset")
        return BiLSTMStudent(args.preset or "small")
    layers = args.layers or 3
    if args.method == "theseus":
        return TheseusStudent(layers)
    if args.method in BASELINES:
        return TransformerStudent(layers, None, None, args.parameters)
    if args.preset is not None:
        raise ValueError("--preset is of --student bilstm; the size of a transformer is its --layers")
    return TransformerStudent(layers) if args.method == "mkd" else TransformerStudent(layers, None, None)


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options that are fields of the method's configuration."""
    method = METHODS[args.method]
    return {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": args.learning_rate or method.defaults.learning_rates[args.student],
        "warmup_steps": 0.06,
        "weight_decay": 0.0,
        **{field: getattr(args, field) for field in method.fields},
    }
