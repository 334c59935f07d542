"""The nine GLUE tasks and SNLI, and loading them from the Hub or from a folder of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.data.files import read_task_files

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB_NAME = "nyu-mll/glue"
SNLI_HUB_NAME = "stanfordnlp/snli"


@dataclass(frozen=True)
class Task:
    """A sentence or sentence-pair task.

    ``columns`` are the one or two text columns; ``label_names`` in the order of the model's outputs, empty
    for a regression; ``metrics`` those that ``fastkd.data.metrics`` reports, whose mean is the task's
    score.
    """

    name: str
    columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Number of model outputs: the number of classes, or 1 for a regression."""
        return len(self.label_names) or 1


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
    """The task of that name; a ``ValueError`` that lists the names if there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def load_task(
    name: str, data_dir: str | Path | None = None, *, max_train_rows: int | None = None, seed: int = 0
) -> DatasetDict:
    """Training and validation rows of a task.

    Args:
        name: one of ``TASKS``: GLUE's nine, or ``snli``.
        data_dir: a folder of official-layout files (``docs/data.md``); None takes ``nyu-mll/glue`` or
            ``stanfordnlp/snli`` from the Hub.
        max_train_rows: keep a random subset of at most this many training rows, drawn with ``seed``.

    Returns:
        Splits ``train`` and ``validation`` (MNLI: ``validation_matched`` and ``validation_mismatched``,
        those that are present) with the task's text columns, ``label`` (``ClassLabel`` named as
        ``Task.label_names``, or float32) and ``row``, the row's number in the whole split, which survives
        subsetting and shuffling. SNLI's rows without a gold label are left out.

    Raises:
        ValueError: unknown task, or a file that is damaged or holds an unknown label; names file and line.
        FileNotFoundError: a folder or split is missing.
    """
    from datasets import DatasetDict

    task = get_task(name)
    if max_train_rows is not None and max_train_rows < 1:
        raise ValueError(f"max_train_rows is {max_train_rows}; it must be at least 1")
    if data_dir is None:
        splits = _from_hub(task)
    else:
        tables = read_task_files(task, Path(data_dir))
        splits = {split: _to_dataset(task, table) for split, table in tables.items()}
    if max_train_rows is not None and len(splits["train"]) > max_train_rows:
        splits["train"] = splits["train"].shuffle(seed=seed).select(range(max_train_rows))
    return DatasetDict(splits)


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
