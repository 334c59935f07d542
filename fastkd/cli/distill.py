"""``fastkd distill``: distil a fine-tuned teacher into a student."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkd.cli.arguments import fraction, positive
from fastkd.cli.config import CommandParser, comma_separated, write_options

if TYPE_CHECKING:
    from fastkd.methods.students import Student

MKD = """example:
  fastkd distill mkd --teacher runs/teacher --tasks sst2,mrpc --student bilstm --output runs/mkd
"""
MIXKD = """example:
  fastkd distill mixkd --teacher runs/teacher --tasks sst2 --student transformer --layers 3 --output runs/mixkd
"""
EPILOG = """{example}
Trains the same student with and without distillation for every seed and ends with one table, a picture and the
student's folder. A transformer student is made of the teacher's first layers. Teachers of single tasks are given as
--teacher sst2=runs/a,mrpc=runs/b. Called again it goes on where it was stopped: students that are finished are
not trained again. Options can come from a file; options.yaml in the output folder repeats the run:

  fastkd distill {method} --config runs/{method}/options.yaml --seeds 1,2,3,4 --output runs/{method}"""


class Defaults(NamedTuple):
    """What a method trains with unless told otherwise; the first kind of student is the default one."""

    epochs: float
    batch_size: int
    learning_rates: Mapping[str, float]


DEFAULTS = {
    "mkd": Defaults(10.0, 128, {"bilstm": 2e-3, "transformer": 1e-4}),
    "mixkd": Defaults(3.0, 32, {"transformer": 1e-4, "bilstm": 1e-3}),
}
OWN_FIELDS = {
    "mkd": ("loss", "temperature", "hard_label_weight"),
    "mixkd": (
        *("loss", "temperature", "alpha_mle", "alpha_sm", "alpha_tmkd", "alpha_kd", "n_mix", "beta_alpha"),
        *("lambda_per_batch", "mix_stage", "mix_mask", "mix_pads"),
    ),
}


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    distill = subparsers.add_parser("distill", help="distil a teacher into a student")
    methods = distill.add_subparsers(dest="method", required=True, metavar="method")

    def method(name: str, example: str, help: str, description: str) -> CommandParser:
        epilog = EPILOG.format(example=example, method=name)
        parser: CommandParser = methods.add_parser(
            name, help=help, description=description, epilog=epilog, takes_config=True
        )
        add_options(parser, DEFAULTS[name])
        parser.set_defaults(run=run)
        return parser

    mkd = method(
        "mkd",
        MKD,
        "multi-task distillation into one student (Liu et al., arXiv 1911.03588)",
        "MKD: one multi-task student learns the logits of a fine-tuned multi-task teacher.",
    )
    mkd.add_argument("--hard-label-weight", type=float, default=0.0, help="weight of the labels (default 0)")
    mkd.add_argument(
        "--augment",
        type=positive(int),
        help="unlabelled variants to try per row, for the teacher to label (default: none)",
    )
    mixkd = method(
        "mixkd",
        MIXKD,
        "distillation on mixtures of examples too (Liang et al., arXiv 2011.00593)",
        "MixKD: a student also learns the teacher's answers to mixtures of training examples.",
    )
    add_mixing_options(mixkd)


def add_options(parser: CommandParser, defaults: Defaults) -> None:
    kinds, add = list(defaults.learning_rates), parser.add_argument
    add("--teacher", required=True, help="folder that `fastkd teacher` made, or one per task: sst2=DIR,mrpc=DIR")
    add("--tasks", required=True, help="comma-separated, of those the teacher knows: sst2,mrpc,...")
    add("--output", required=True, help="folder for table, picture, student, and what a second call reuses")
    add("--student", choices=kinds, default=kinds[0], help=f"kind of student (default {kinds[0]})")
    add("--preset", choices=("small", "mkd"), help="size of a bilstm (default small)")
    add("--layers", type=positive(int), help="of the teacher's layers, those that make a transformer (default 3)")
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
    add("--loss", choices=("mse", "kl"), default="mse", help="distance of the logits (default mse)")
    add("--temperature", type=float, default=1.0, help="of kl (default 1)")
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the same students without distillation too (default: yes)",
    )
    add("--jobs", type=positive(int), help="students trained at a time (default: the number of cores; 1 on a GPU)")


def add_mixing_options(parser: CommandParser) -> None:
    add = parser.add_argument
    add("--alpha-mle", type=float, default=1.0, help="weight of the examples' labels (default 1)")
    add("--alpha-sm", type=float, default=1.0, help="weight of the mixtures' labels (default 1)")
    add("--alpha-tmkd", type=float, default=1.0, help="weight of the teacher's answers to mixtures (default 1)")
    add("--alpha-kd", type=float, default=0.0, help="weight of the teacher's answers to examples (default 0)")
    add("--n-mix", type=positive(int), default=1, help="mixtures of each example (default 1)")
    add("--beta-alpha", type=float, default=0.4, help="α of λ ~ Beta(α, α) (default 0.4)")
    add(
        "--lambda-per-batch",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="one λ per batch, not per example (default: no)",
    )
    add("--mix-stage", choices=("word", "sum", "post_ln"), default="word", help="what is mixed (default word)")
    add("--mix-mask", choices=("union", "first"), default="union", help="tokens of a mixture (default union)")
    add("--mix-pads", choices=("embed", "zero"), default="embed", help="a pad in a mixture (default embed)")


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
    from fastkd.methods.students import BiLSTMStudent, TransformerStudent

    if args.student == "bilstm":
        if args.layers is not None:
            raise ValueError("--layers is of --student transformer; the size of a bilstm is its --preset")
        return BiLSTMStudent(args.preset or "small")
    if args.preset is not None:
        raise ValueError("--preset is of --student bilstm; the size of a transformer is its --layers")
    layers = args.layers or 3
    return TransformerStudent(layers) if args.method == "mkd" else TransformerStudent(layers, None, None)


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options that are fields of the method's configuration."""
    return {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": args.learning_rate or DEFAULTS[args.method].learning_rates[args.student],
        "warmup_steps": 0.06,
        "weight_decay": 0.0,
        **{field: getattr(args, field) for field in OWN_FIELDS[args.method]},
    }
