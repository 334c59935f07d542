"""Tasks of the user's own: a folder with ``train.csv`` and ``dev.csv``, whose columns and labels tell what they are."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from fastkd.data.tables import SUFFIXES, Table, find_table, read_table
from fastkd.data.task import Task, custom_task

LABEL = "label"
_RESERVED = "row"  # the column that numbers a dataset's rows


def has_custom_task(name: str, data_dir: str | Path | None) -> bool:
    """Whether ``data_dir`` has a folder of that name.

    Raises:
        ValueError: it has, but the name cannot be one of a task.
    """
    if data_dir is None or not name or not (Path(data_dir) / name).is_dir():
        return False
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"task {name!r} must be the name of a folder in data_dir, of letters, digits, - and _")
    return True


def read_custom_task(name: str, folder: Path) -> tuple[Task, dict[str, dict[str, list[Any]]]]:
    """What the task is, and the columns of its splits: the texts, and ``label`` as class number or score.

    The column ``label`` is the label, the one or two others are the texts in their order. The classes are the
    distinct labels of the training file, sorted; where one of these is a number with a fraction, the task is a
    regression.

    Raises:
        ValueError: the name is one of torch's, a file is damaged, its columns are not those of a task, training has
            one class alone, or a label is unknown; names file and line.
        FileNotFoundError: the training file is missing.
    """
    from torch.nn import ModuleDict

    if hasattr(ModuleDict(), name):  # heads are kept by the names of their tasks
        raise ValueError(f"task {name!r} must not be the name of an attribute of torch's modules; rename {folder}")
    path = find_table(folder, "train")
    if path is None:
        raise FileNotFoundError(f"{folder} has no file train that ends in {', '.join(SUFFIXES)}")
    train = read_table(path)
    task = _describe(name, train)
    splits = {"train": _columns(task, train)}
    if dev := find_table(folder, "dev"):
        splits["validation"] = _columns(task, read_table(dev))
    return task, splits


def _describe(name: str, table: Table) -> Task:
    texts = tuple(column for column in table.columns if column != LABEL)
    if LABEL not in table.columns or not 1 <= len(texts) <= 2 or _RESERVED in texts:
        raise ValueError(
            f"{table.path}, line 1: the columns are {', '.join(table.columns)}; they must be {LABEL} and one or two "
            f"texts, of any name but {_RESERVED}"
        )
    labels = sorted({label.strip() for label in table.column(LABEL)})
    if any(math.isfinite(number) and not number.is_integer() for number in map(_number, labels)):
        return custom_task(name, texts, ())
    if len(labels) == 1:
        raise ValueError(f"{table.path}: every label is {labels[0]!r}; there must be two classes at least")
    return custom_task(name, texts, tuple(labels))


def _columns(task: Task, table: Table) -> dict[str, list[Any]]:
    if sorted(table.columns) != sorted((*task.columns, LABEL)):
        raise ValueError(
            f"{table.path}, line 1: the columns are {', '.join(table.columns)}; "
            f"those of the training file are {', '.join((*task.columns, LABEL))}"
        )
    labels = [_label(task, text.strip(), table.where(row)) for row, text in enumerate(table.column(LABEL))]
    return {**{column: table.column(column) for column in task.columns}, LABEL: labels}


def _label(task: Task, text: str, where: str) -> int | float:
    if not text:
        raise ValueError(f"{where}: the label is empty")
    if task.is_regression:
        if not math.isfinite(number := _number(text)):
            raise ValueError(f"{where}: label {text!r} is not a finite number; others have fractions: a regression")
        return number
    if text not in task.label_names:
        raise ValueError(f"{where}: unknown label {text!r}; training has {', '.join(task.label_names)}")
    return task.label_names.index(text)


def _number(text: str) -> float:
    """The number that a text is, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
