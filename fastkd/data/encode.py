"""From texts to padded single-task batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fastkd.data.augment import augment as augment_rows
from fastkd.data.glue import load_task, task_of
from fastkd.data.tables import find_table
from fastkd.data.task import UNLABELLED, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a tokenizer gives to a model."""


def encode(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenised rows, a pair packed as ``[CLS] a [SEP] b [SEP]``.

    Columns: ``input_ids``, ``attention_mask``, ``token_type_ids`` (0 up to the first text's separator, 1
    after it; made here when the tokenizer does not), ``labels`` (class number or float score, of the type of
    ``label``), ``row`` and ``length`` in tokens. Longer rows are cut to ``max_length`` tokens, the longer text
    of a pair first.
    """
    smallest = tokenizer.num_special_tokens_to_add(pair=len(task.columns) == 2) + len(task.columns)
    if max_length < smallest:
        raise ValueError(f"max_length is {max_length}; {task.name} needs at least {smallest} tokens")
    if max_length > tokenizer.model_max_length:
        raise ValueError(f"max_length is {max_length}; the model takes {tokenizer.model_max_length} tokens at most")

    made_here = not tells_apart(tokenizer)

    def tokenize(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[column] for column in task.columns]
        encoding = tokenizer(*texts, truncation="longest_first", max_length=max_length)
        if made_here:
            pieces = range(len(texts[0]))
            encoding["token_type_ids"] = [token_types(encoding.sequence_ids(i)) for i in pieces]
        kept = {column: encoding[column] for column in INPUTS}
        lengths = [len(ids) for ids in encoding["input_ids"]]
        return {**kept, "length": lengths}

    description = f"tokenise {task.name}"
    encoded = dataset.map(tokenize, batched=True, remove_columns=list(task.columns), desc=description)
    return encoded.rename_column("label", "labels")


def tells_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the token types that a tokenizer gives are 1 somewhere in the second text of a pair."""
    return any(tokenizer("a", "b").get("token_type_ids", ()))


def token_types(sequence_ids: Sequence[int | None]) -> list[int]:
    first_of_second = sequence_ids.index(1) if 1 in sequence_ids else len(sequence_ids)
    return [int(position >= first_of_second) for position in range(len(sequence_ids))]


def load_encoded(
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    data_dir: str | Path | None = None,
    *,
    train_fraction: float | None = None,
    max_train_rows: int | None = None,
    paraphrases: str | Path | None = None,
    augment: int | None = None,
    seed: int = 0,
) -> tuple[MultiTaskDataset, dict[str, MultiTaskDataset]]:
    """Loads and encodes every task: its training rows together, its validation sets by name.

    ``data_dir``, ``train_fraction``, ``max_train_rows``, ``paraphrases`` and ``seed``: see
    ``fastkd.data.glue.load_task``. ``augment`` adds so many unlabelled variants of every training row, see
    ``fastkd.data.augment``.
    A validation set is named as its task; MNLI's second one ``mnli_mismatched``. Validation rows come ordered
    by length, so that a batch pads little; ``row`` tells which is which.
    """
    from datasets import concatenate_datasets

    if paraphrases is not None and not any(find_table(Path(paraphrases), name) for name in tasks):
        raise FileNotFoundError(f"{paraphrases} has no table of paraphrases, {' or '.join(f'{t}.csv' for t in tasks)}")
    subset: dict[str, Any] = {"train_fraction": train_fraction, "max_train_rows": max_train_rows}
    train, validation = {}, {}
    for name in tasks:
        splits = load_task(name, data_dir, paraphrases=paraphrases, seed=seed, **subset)
        task = task_of(name, splits["train"].features)
        rows = splits.pop("train")
        if augment is not None:
            mask_token = tokenizer.mask_token or tokenizer.unk_token
            variants = augment_rows(rows, task, copies=augment, mask_token=mask_token, seed=seed)
            rows = concatenate_datasets([rows, variants])
        train[name] = encode(rows, task, tokenizer, max_length)
        for split, rows in splits.items():
            encoded = encode(rows, task, tokenizer, max_length)
            key = f"{name}_mismatched" if split == "validation_mismatched" and name in validation else name
            validation[key] = MultiTaskDataset({name: encoded.select(np.argsort(encoded["length"][:], kind="stable"))})
    return MultiTaskDataset(train), validation


def _labelled(labels: Sequence[float]) -> npt.NDArray[Any]:
    known = np.asarray(labels)
    return np.flatnonzero(~np.isnan(known) if known.dtype.kind == "f" else known != UNLABELLED)


class MultiTaskDataset(torch.utils.data.Dataset[Row]):
    """Encoded datasets of several tasks end to end; each row also carries its ``task``."""

    def __init__(self, datasets: Mapping[str, Dataset]) -> None:
        empty = [name for name, dataset in datasets.items() if len(dataset) == 0]
        if empty or not datasets:
            raise ValueError(f"datasets has no rows for {', '.join(empty) or 'any task'}")
        self.datasets = dict(datasets)

    @property
    def tasks(self) -> dict[str, Task]:
        """What the tasks are, by name."""
        return {name: task_of(name, dataset.features) for name, dataset in self.datasets.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(dataset) for name, dataset in self.datasets.items()}

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [length for dataset in self.datasets.values() for length in dataset["length"]]

    def labelled(self) -> MultiTaskDataset:
        """The rows that have a label."""
        return MultiTaskDataset(
            {name: dataset.select(_labelled(dataset["labels"][:])) for name, dataset in self.datasets.items()}
        )

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """The rows at ``indices``; a batch of one task is one read of its dataset."""
        located = [self._locate(index) for index in indices]
        names = {name for name, _ in located}
        if len(names) > 1:
            return [row for index in indices for row in self.__getitems__([index])]
        name = names.pop()
        columns = self.datasets[name][[position for _, position in located]]
        return [
            {**dict(zip(columns, fields, strict=True)), "task": name} for fields in zip(*columns.values(), strict=True)
        ]

    def _locate(self, index: int) -> tuple[str, int]:
        position = index
        for name, dataset in self.datasets.items():
            if 0 <= position < len(dataset):
                return name, position
            position -= len(dataset)
        raise IndexError(f"row {index} of a dataset of {len(self)} rows")


class MultiTaskCollator:
    """Pads rows of one task to the longest of the batch and names the task.

    Gives ``input_ids``, ``attention_mask``, ``token_type_ids`` (rows, longest), int64; ``labels`` (rows,),
    int64 or, for a regression, float32, −1 or NaN where there is none; ``teacher_logits`` (rows, outputs),
    float32, where the rows have it; and ``task``, a str.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer has no pad token; set tokenizer.pad_token before making batches")
        self.pad_values = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        self.left = tokenizer.padding_side == "left"
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        tasks = {row["task"] for row in rows}
        if len(tasks) != 1:
            raise ValueError(f"a batch must hold rows of one task, not of {', '.join(sorted(tasks))}")
        multiple = self.pad_to_multiple_of
        longest = max(len(row["input_ids"]) for row in rows)
        width = (longest + multiple - 1) // multiple * multiple
        batch: dict[str, Any] = {name: self._pad(rows, name, width) for name in self.pad_values}
        for name in ("labels", "teacher_logits"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        batch["task"] = tasks.pop()
        return batch

    def _pad(self, rows: Sequence[Row], name: str, width: int) -> torch.Tensor:
        padded = torch.full((len(rows), width), self.pad_values[name])
        for target, row in zip(padded, rows, strict=True):
            values = torch.tensor(row[name])
            if self.left:
                target[width - len(values) :] = values
            else:
                target[: len(values)] = values
        return padded
