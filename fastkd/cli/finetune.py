"""``fastkd finetune``: fine-tune a distilled student on one of its tasks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastkd.cli.arguments import fraction, positive
from fastkd.cli.config import CommandParser, comma_separated, write_options

if TYPE_CHECKING:
    from fastkd.training.finetune import Candidate

EXAMPLE = """example:
  fastkd finetune --student runs/mkd/student --task rte --output runs/rte
  fastkd export runs/rte --output rte

Trains once per learning rate and saves the epoch with the best score on the validation set, or the student as it was
where no epoch is better. Options can come from a file; options.yaml in the output folder repeats the run."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="fine-tune a distilled student on one of its tasks",
        description="Fine-tune all of a student on one of its tasks with the labels and keep the best epoch.",
        epilog=EXAMPLE,
        takes_config=True,
    )
    add = parser.add_argument
    add("--student", required=True, help="the student's folder that `fastkd distill` made")
    add("--task", required=True, help="one of the student's tasks")
    add("--output", required=True, help="folder to save the student of that task to; must be new or empty")
    add("--data-dir", help="folder of GLUE's files or of your own (docs/data.md); default: from the Hub")
    add("--train-fraction", type=fraction, help="use this part, 0 to 1, of each class of the training rows")
    add("--max-train-rows", type=positive(int), help="use a random subset of at most this many rows")
    add("--max-length", type=positive(int), default=128, help="tokens per row, longer ones are cut (default 128)")
    add("--epochs", type=positive(float), default=5.0, help="times every row is seen (default 5)")
    add(
        "--learning-rate",
        default="1e-5,1.5e-5,5e-5",
        help="peaks to try, after a warm-up each, comma-separated (default 1e-5,1.5e-5,5e-5)",
    )
    add("--batch-size", type=positive(int), default=128, help="rows per step (default 128)")
    add("--seed", type=int, default=0, help="of a subset of rows, their order and dropout (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    rates = [_rate(text) for text in comma_separated("--learning-rate", args.learning_rate)]
    from fastkd.data.glue import check_task

    check_task(args.task, args.data_dir)
    from fastkd.training.finetune import finetune

    candidates = finetune(
        args.student,
        args.task,
        args.output,
        data_dir=args.data_dir,
        learning_rates=rates,
        train_fraction=args.train_fraction,
        max_train_rows=args.max_train_rows,
        max_length=args.max_length,
        seed=args.seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
    )
    write_options(args.output, "finetune", vars(args))
    print(table(candidates))
    if all(candidate.epoch == 0 for candidate in candidates):
        print("no epoch is better than the student was: it is saved as it was, with the head of this task")
    print(f"saved to {args.output}")
    return 0


def table(candidates: Sequence[Candidate]) -> str:
    """One line per learning rate with its best epoch and score, under the student's as it was; the saved is marked."""
    best = max(candidates, key=lambda candidate: candidate.score)
    rows = [("-", 0.0, best.start, best.epoch == 0)]
    rows += [(f"{c.learning_rate:g}", c.epoch, c.score, c is best and c.epoch > 0) for c in candidates]
    lines = [f"{rate:16} {epoch:>10g}  {score:5.1f}{'  saved' if saved else ''}" for rate, epoch, score, saved in rows]
    return "\n".join([f"{'learning rate':16} {'best epoch':>10}  score", *lines])


def _rate(text: str) -> float:
    try:
        return positive(float)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--learning-rate: {error}") from error
