"""Reading tasks' files as their authors publish them: .tsv or .jsonl, plain or gzipped, quotes left alone."""

from __future__ import annotations

import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from fastkd.data.task import Task

logger = logging.getLogger(__name__)

SUFFIXES = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
NO_GOLD_LABEL = "-"  # SNLI's mark of a pair on which the annotators did not agree

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)
"""What reading a damaged or truncated text file raises."""

Line = tuple[int, list[str]]


@dataclass(frozen=True)
class Layout:
    """Where a task lies under ``data_dir`` and how its files name their columns.

    ``texts`` and ``label`` list, per column, the accepted names, the preferred first. ``header`` names the
    columns of files that have no header line. ``numbered``: classes may be written 0, 1, … in the order of
    the task's labels. ``broken_lines``: as published, a few lines have too few or too many fields, and are left out.
    """

    folder: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ("label",)
    header: tuple[str, ...] | None = None
    numbered: bool = False
    broken_lines: bool = False


_PAIR = (("sentence1",), ("sentence2",))
LAYOUTS: dict[str, Layout] = {
    "cola": Layout("CoLA", (("sentence",),), header=("source", "label", "mark", "sentence"), numbered=True),
    "sst2": Layout("SST-2", (("sentence",),), numbered=True),
    "mrpc": Layout(
        "MRPC", (("#1 String", "sentence1"), ("#2 String", "sentence2")), ("Quality", "label"), numbered=True
    ),
    "stsb": Layout("STS-B", _PAIR, ("score", "label")),
    "qqp": Layout("QQP", (("question1",), ("question2",)), ("is_duplicate", "label"), numbered=True, broken_lines=True),
    "snli": Layout("SNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")), ("gold_label", "label")),
    "mnli": Layout("MNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")), ("gold_label", "label")),
    "qnli": Layout("QNLI", (("question",), ("sentence",))),
    "rte": Layout("RTE", _PAIR),
    "wnli": Layout("WNLI", _PAIR, numbered=True),
}
_MNLI_SPLITS = {
    "train": "train",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
}
_SPLITS = {"train": "train", "validation": "dev"}


def read_task_files(task: Task, data_dir: Path) -> dict[str, dict[str, list[Any]]]:
    """Columns of every split of a task: its text columns, and ``label`` as class number or score.

    MNLI needs one of its two validation sets, every other split must be there. A split's file is named by
    its stem (``train``, ``dev``; MNLI: ``dev_matched``, ``dev_mismatched``) or, failing that, is the only
    one whose name begins with it.
    """
    layout = LAYOUTS[task.name]
    folder = data_dir / layout.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; {task.name} is read from {layout.folder}/ inside data_dir")
    stems = _MNLI_SPLITS if task.name == "mnli" else _SPLITS
    paths = {split: find_file(folder, stem) for split, stem in stems.items()}
    if paths["train"] is None or not any(path for split, path in paths.items() if split != "train"):
        missing = " and ".join(f"{stems[split]}*" for split, path in paths.items() if path is None)
        raise FileNotFoundError(f"{folder} has no file {missing} that ends in {', '.join(SUFFIXES)}")
    return {split: _read_table(task, layout, path) for split, path in paths.items() if path is not None}


def find_file(folder: Path, stem: str, suffixes: tuple[str, ...] = SUFFIXES) -> Path | None:
    """The file of that stem and one of the suffixes or, failing that, the only one whose name begins with the stem.

    Raises:
        ValueError: there are several.
    """
    exact = [folder / f"{stem}{suffix}" for suffix in suffixes if (folder / f"{stem}{suffix}").is_file()]
    similar = sorted(path for path in folder.iterdir() if path.name.startswith(stem) and path.name.endswith(suffixes))
    candidates = exact or similar
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        raise ValueError(f"{folder} has several files for {stem}: {names}; leave one, or name one {stem}{suffixes[0]}")
    return candidates[0] if candidates else None


def _read_table(task: Task, layout: Layout, path: Path) -> dict[str, list[Any]]:
    names = (*layout.texts, layout.label)
    read = _jsonl_fields if ".jsonl" in path.name else _tsv_fields
    table: dict[str, list[Any]] = {column: [] for column in (*task.columns, "label")}
    for line, fields in read(path, names, layout):
        if fields[-1] == NO_GOLD_LABEL and task.name == "snli":
            continue
        for column, text in zip(task.columns, fields[:-1], strict=True):
            table[column].append(text)
        table["label"].append(_parse_label(task, layout, fields[-1], f"{path}, line {line}"))
    if not table["label"]:
        raise ValueError(f"{path} has no rows")
    return table


def open_text(path: Path) -> TextIO:
    """A text file, plain or gzipped, in which only a newline ends a line, because texts contain other separators."""
    opener = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig", newline="\n"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered non-blank lines."""
    number = 0
    try:
        with open_text(path) as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or truncated after line {number}: {error}") from error


def _tsv_fields(path: Path, names: tuple[tuple[str, ...], ...], layout: Layout) -> Iterator[Line]:
    lines = _lines(path)
    header = layout.header or tuple(next(lines, (0, ""))[1].split("\t"))
    positions = [header.index(_present(accepted, header, f"{path}, line 1")) for accepted in names]
    error, left_out = None, 0
    for number, text in lines:
        fields = text.split("\t")
        error = None
        if len(fields) == len(header):
            yield number, [fields[position] for position in positions]
            continue
        error = ValueError(
            f"{path}, line {number}: {len(fields)} tab-separated fields instead of {len(header)}; "
            "the file may be truncated"
        )
        if not layout.broken_lines:
            raise error
        left_out += 1
    if error:  # in the last line: a truncated file, not one that was published so
        raise error
    if left_out:
        logger.warning("%s: %d lines that have not %d fields are left out", path, left_out, len(header))


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file and the numbers of their lines."""
    for number, text in _lines(path):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); the file may be truncated") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}")
        yield number, row


def _jsonl_fields(path: Path, names: tuple[tuple[str, ...], ...], layout: Layout) -> Iterator[Line]:
    for number, row in json_rows(path):
        where = f"{path}, line {number}"
        fields = [row[_present(accepted, tuple(row), where)] for accepted in names]
        if not all(isinstance(field, str | int | float) for field in fields):
            raise ValueError(f"{where}: every field must be text or a number, not {fields}")
        yield number, [str(field) for field in fields]


def _present(accepted: tuple[str, ...], columns: tuple[str, ...], where: str) -> str:
    for name in accepted:
        if name in columns:
            return name
    wanted = " or ".join(repr(name) for name in accepted)
    raise ValueError(f"{where}: no column {wanted}; the columns are {', '.join(columns) or 'none'}")


def _parse_label(task: Task, layout: Layout, text: str, where: str) -> int | float:
    if task.is_regression:
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{where}: score {text!r} is not a finite number")
        return score
    accepted = {name: number for number, name in enumerate(task.label_names)}
    if layout.numbered:
        accepted |= {str(number): number for number in range(task.num_labels)}
    if text not in accepted:
        raise ValueError(f"{where}: unknown label {text!r}; the labels of {task.name} are {', '.join(accepted)}")
    return accepted[text]
