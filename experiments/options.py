"""What the commands' options have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from experiments.students import TUNING_SEED
from fastkd.cli.arguments import positive
from fastkd.cli.config import comma_separated

Value = TypeVar("Value")


def several(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Parses different values separated by commas, for ``ArgumentParser.add_argument(type=…)``."""

    def parse(text: str) -> list[Value]:
        try:
            return [kind(part) for part in comma_separated("it", text)]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) == TUNING_SEED:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a whole number above {TUNING_SEED}, the seed that learning rates are chosen on"
        )
    return int(text)


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Of the experiments whose teachers are made of an encoder."""
    add = parser.add_argument
    add("--model", required=True, help="encoder that the teachers are made of: a folder or a name on the Hub")
    add("--data-dir", help="folder of GLUE's or SQuAD's files or of your own (docs/data.md); default: from the Hub")


def add_options(parser: argparse.ArgumentParser, rows: Iterable[str], epochs: float) -> None:
    """The options of every experiment."""
    add, numbers = parser.add_argument, several(positive(float))
    add("--output", required=True, help="folder for everything; a second call goes on where the first was stopped")
    add("--rows", type=several(str), default=[*rows], help=f"only these of: {', '.join(rows)}")
    add("--seeds", type=several(seed), default=[1, 2, 3], help="of the reported students (default 1,2,3)")
    add("--max-train-rows", type=positive(int), default=20_000, help="rows of a task at most (default 20000)")
    add("--learning-rates", type=numbers, help="to choose from (default: docs/experiments.md)")
    add("--epochs", type=positive(float), default=epochs, help=f"of the students (default {epochs:g})")
    add("--jobs", type=positive(int), help="groups of students trained at a time (default: cores; 1 on a GPU)")
    add("--keep", action="store_true", help="copy the report to experiments/results")


def add_least_steps(parser: argparse.ArgumentParser, default: int, whose: str) -> None:
    about = f"more epochs, of {whose}, where fewer steps would be taken (default {default})"
    parser.add_argument("--least-steps", type=positive(int), default=default, help=about)


def settings_of(args: argparse.Namespace, learning_rates: Sequence[float]) -> dict[str, Any]:
    """What all parts of a table must have in common; the other options choose parts, or where and how fast."""
    free = ("experiment", "output", "rows", "tasks", "cells", "seeds", "jobs", "keep")
    return {name: value for name, value in vars(args).items() if name not in free} | {
        "learning_rates": list(learning_rates)
    }


def epochs_of(args: argparse.Namespace, rows: int, batch_size: int) -> float:
    """The epochs that are asked for, or as many whole ones as make the least steps."""
    return max(args.epochs, math.ceil(args.least_steps * batch_size / rows))


def check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ``ValueError`` that lists the known names, if one is not among them."""
    for name in names:
        if name not in known:
            raise ValueError(f"{option} has {name!r}; there are {', '.join(known)}")
