"""The nine GLUE tasks and SNLI, and loading them or a task of one's own from the Hub or from a folder of files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.data.custom import LABEL, has_custom_task, read_custom_task
from fastkd.data.files import read_task_files
from fastkd.data.paraphrases import add_paraphrases
from fastkd.data.subset import hold_out, take_fraction
from fastkd.data.tables import find_table
from fastkd.data.task import Task, custom_task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

logger = logging.getLogger(__name__)

HUB_NAME = "nyu-mll/glue"
SNLI_HUB_NAME = "stanfordnlp/snli"


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_THREE_WAY = ("entailment", "neutral", "contradiction")

GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Task("stsb", _PAIR, (), ("pearson", "spearman")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task("mnli", ("premise", "hypothesis"), _THREE_WAY, ("accuracy",)),
        Task("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
        Task("rte", _PAIR, _ENTAILMENT, ("accuracy",)),
        Task("wnli", _PAIR, _ENTAILMENT[::-1], ("accuracy",)),
    )
}

TASKS = GLUE | {"snli": Task("snli", ("premise", "hypothesis"), _THREE_WAY, ("accuracy",))}


def get_task(name: str) -> Task:
    """The known task of that name; a ``ValueError`` that lists the names if there is none."""
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}; the tasks are {', '.join(TASKS)}; one of your own is a folder of that name in "
            "data_dir with a file train.csv (docs/data.md)"
        )
    return TASKS[name]


def check_task(name: str, data_dir: str | Path | None) -> None:
    """Raises ``ValueError`` unless the task is known or ``data_dir`` has a folder of that name."""
    if name not in TASKS and not has_custom_task(name, data_dir):
        get_task(name)


def task_of(name: str, features: Features) -> Task:
    """The known task of that name, or what the columns of its rows, texts or tokens, tell of another.

    ``columns`` of a task whose rows are tokens is empty.
    """
    from datasets import ClassLabel, Value

    label = features.get(LABEL) or features.get("labels")
    if name in TASKS or not (isinstance(label, ClassLabel) or label == Value("float32")):
        return get_task(name)
    columns = tuple(column for column, feature in features.items() if feature == Value("string"))
    return custom_task(name, columns, tuple(label.names) if isinstance(label, ClassLabel) else ())


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    train_fraction: float | None = None,
    max_train_rows: int | None = None,
    paraphrases: str | Path | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Training and validation rows of a task.

    Args:
        name: one of ``TASKS``: GLUE's nine, or ``snli``; or a folder of the user's own in ``data_dir``.
        data_dir: a folder of official-layout files (``docs/data.md``); None takes ``nyu-mll/glue`` or
            ``stanfordnlp/snli`` from the Hub.
        train_fraction: keep a random part of the training rows, drawn with ``seed``: of each class this
            fraction, rounded up. A smaller one is a part of a larger one.
        max_train_rows: keep a random subset of at most this many of these rows, drawn with ``seed``.
        paraphrases: a folder that may hold a table named as the task, ``sst2.csv``, whose rows join the training
            rows that they paraphrase; see ``add_paraphrases``.

    Returns:
        Splits ``train`` and ``validation`` (MNLI: ``validation_matched`` and ``validation_mismatched``,
        those that are present) with the task's text columns, ``label`` (``ClassLabel`` named as
        ``Task.label_names``, or float32) and ``row``, the row's number in the whole split, which survives
        subsetting and shuffling. SNLI's rows without a gold label are left out. The validation rows of an own
        task without a file for them are a tenth of its training rows, always the same, with their numbers there.

    Raises:
        ValueError: unknown task, or a file that is damaged or holds an unknown label; names file and line.
        FileNotFoundError: a folder or split is missing.
    """
    from datasets import DatasetDict

    if max_train_rows is not None and max_train_rows < 1:
        raise ValueError(f"max_train_rows is {max_train_rows}; it must be at least 1")
    splits = _read_splits(name, data_dir)
    whole = len(splits["train"])
    if "validation" not in splits and name not in TASKS:
        splits["train"], splits["validation"] = hold_out(splits["train"])
        count = len(splits["validation"])
        logger.warning("%s has no file for validation: %d rows drawn from training take its place", name, count)
    if train_fraction is not None:
        splits["train"] = take_fraction(splits["train"], train_fraction, seed=seed)
    if max_train_rows is not None and len(splits["train"]) > max_train_rows:
        splits["train"] = splits["train"].shuffle(seed=seed).select(range(max_train_rows))
    if paraphrases is not None and (path := find_table(Path(paraphrases), name)):
        splits["train"] = add_paraphrases(splits["train"], path, whole)
    return DatasetDict(splits)


def _read_splits(name: str, data_dir: str | Path | None) -> dict[str, Dataset]:
    check_task(name, data_dir)
    if data_dir is None:
        return _from_hub(TASKS[name])
    if name in TASKS:
        task, tables = TASKS[name], read_task_files(TASKS[name], Path(data_dir))
    else:
        task, tables = read_custom_task(name, Path(data_dir) / name)
    return {split: _to_dataset(task, table) for split, table in tables.items()}


def _to_dataset(task: Task, table: dict[str, list[Any]]) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Value

    features: dict[str, Any] = dict.fromkeys(task.columns, Value("string"))
    features["label"] = Value("float32") if task.is_regression else ClassLabel(names=list(task.label_names))
    features["row"] = Value("int64")
    rows = list(range(len(table["label"])))
    return Dataset.from_dict({**table, "row": rows}, features=Features(features))


def _from_hub(task: Task) -> dict[str, Dataset]:
    from datasets import load_dataset

    name = (HUB_NAME, task.name) if task.name in GLUE else (SNLI_HUB_NAME,)
    try:
        source = load_dataset(*name)
    except ConnectionError as error:
        raise ConnectionError(f"{error}; without the Hub, name a folder of files as data_dir") from error
    names = [name for name in source if name == "train" or name.startswith("validation")]
    return {name: _rename_labels(task, source[name]) for name in names}


def _rename_labels(task: Task, split: Dataset) -> Dataset:
    """The split with its labels numbered as in ``task.label_names``, whatever their order at the source."""
    labels = split["label"][:]
    if not task.is_regression:
        split = split.select([row for row, label in enumerate(labels) if label >= 0])
        labels = split["label"][:]
        source_names = split.features["label"].names
        if sorted(source_names) != sorted(task.label_names):
            raise ValueError(
                f"the source's labels of {task.name} are {source_names}; expected {list(task.label_names)}"
            )
        labels = [task.label_names.index(source_names[label]) for label in labels]
    return _to_dataset(task, {**{column: split[column][:] for column in task.columns}, "label": labels})
