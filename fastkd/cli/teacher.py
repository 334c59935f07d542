"""``fastkd teacher``: fine-tune a teacher on one or several tasks."""

from __future__ import annotations

import argparse

from fastkd.cli.arguments import fraction, positive
from fastkd.cli.config import CommandParser, comma_separated, write_options

EXAMPLE = """example:
  fastkd teacher --model sentence-transformers/all-MiniLM-L6-v2 --tasks sst2,mrpc --output runs/teacher

The folder is what `fastkd distill` takes as --teacher, and fastkd.training.load_teacher loads it.
Options can come from a file; options.yaml in the output folder repeats the run:

  fastkd teacher --config runs/teacher/options.yaml --epochs 5 --output runs/longer"""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    parser = subparsers.add_parser(
        "teacher",
        help="fine-tune a teacher: one encoder, a head per task",
        description="Fine-tune a pretrained encoder on one or several tasks together, a head per task.",
        epilog=EXAMPLE,
        takes_config=True,
    )
    add = parser.add_argument
    add("--model", required=True, help="encoder: a Hub name or a folder")
    add(
        "--tasks",
        required=True,
        help="comma-separated: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, snli, or your own in --data-dir",
    )
    add("--output", required=True, help="folder to save the teacher to; must be new or empty")
    add("--data-dir", help="folder of GLUE's files or of your own (docs/data.md); default: from the Hub")
    add("--paraphrases", help="folder of tables <task>.csv with paraphrases of training rows (docs/data.md)")
    add(
        "--train-fraction",
        type=fraction,
        help="use a random part of each task's training rows, of each class this fraction (0 to 1)",
    )
    add(
        "--max-train-rows",
        type=positive(int),
        help="use a random subset of at most this many rows of each task",
    )
    add(
        "--max-length",
        type=positive(int),
        default=128,
        help="tokens per row, longer ones are cut (default 128)",
    )
    add("--epochs", type=positive(float), default=3.0, help="times every row is seen (default 3)")
    add("--learning-rate", type=positive(float), default=5e-5, help="peak, after a warm-up (default 5e-5)")
    add("--batch-size", type=positive(int), default=32, help="rows per device and step (default 32)")
    add("--sampling-tau", type=float, help="draw a batch's task in proportion to rows^tau (default: every row once)")
    add(
        "--pooling",
        choices=("cls", "mean"),
        default="cls",
        help="what a head reads: cls, the first token's state, after the encoder's pooler if it has one; mean, the "
        "mean of all tokens' states (default cls)",
    )
    add(
        "--dropout",
        type=float,
        help="rate in the teacher, which its Transformer students take over; 0 trains faster (default: the encoder's)",
    )
    add("--seed", type=int, default=0, help="of the heads, a subset of rows, their order and dropout (default 0)")
    add(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="train in bfloat16 (default: where that is faster)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastkd.data.glue import check_task

    tasks = comma_separated("--tasks", args.tasks)
    for task in tasks:
        check_task(task, args.data_dir)
    from fastkd.training.teacher import has_fast_bf16, train_teacher

    if args.bf16 is None:
        args.bf16 = has_fast_bf16()
    metrics = train_teacher(
        args.model,
        tasks,
        args.output,
        data_dir=args.data_dir,
        train_fraction=args.train_fraction,
        max_train_rows=args.max_train_rows,
        paraphrases=args.paraphrases,
        max_length=args.max_length,
        pooling=args.pooling,
        dropout=args.dropout,
        seed=args.seed,
        bf16=args.bf16,
        sampling_tau=args.sampling_tau,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
    )
    write_options(args.output, "teacher", vars(args))
    print(score_table(metrics, tasks))
    print(f"saved to {args.output}")
    return 0


def score_table(metrics: dict[str, float], tasks: list[str]) -> str:
    """One line per evaluation set with its metrics in percent, and the average of the tasks' scores."""
    from fastkd.data.metrics import METRICS

    rows: list[tuple[str, str]] = []
    for task in tasks:
        for name in (task, f"{task}_mismatched"):
            keys = {metric: f"eval_{name}_{metric}" for metric in METRICS if f"eval_{name}_{metric}" in metrics}
            if keys:
                rows.append((name, "  ".join(f"{metric} {100 * metrics[key]:.1f}" for metric, key in keys.items())))
    rows.append(("average", f"{metrics['eval_average']:.1f}"))
    return "\n".join(f"{name:16} {text}" for name, text in rows)
