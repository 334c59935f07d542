"""SQuAD 1.1 and 2.0, from the Hub or from files in the official shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fastkd.data.files import DAMAGED, find_file, open_text

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

VERSIONS = {"squad": "v1.1", "squad_v2": "v2.0"}
SUFFIXES = (".json", ".json.gz")
_SPLITS = {"train": "train", "validation": "dev"}
_Kind = TypeVar("_Kind")


def load_squad(name: str, data_dir: str | Path | None = None) -> DatasetDict:
    """The questions of SQuAD.

    Args:
        name: ``squad`` (1.1) or ``squad_v2`` (2.0, where some questions have no answer).
        data_dir: a folder of files in the official shape (``docs/data.md``); None takes ``rajpurkar/squad`` or
            ``rajpurkar/squad_v2`` from the Hub.

    Returns:
        Splits ``train`` and ``validation``, of a folder those that are there, with the columns ``id``, ``title``,
        ``context``, ``question`` and ``answers``: lists ``text`` and ``answer_start``, empty where there is no answer.
        Titles may be empty and ids may repeat.

    Raises:
        ValueError: unknown name, or a file that is damaged, has another shape, or an answer that is not at its
            place in the context; names file and question.
        FileNotFoundError: the folder has no file for either split.
    """
    from datasets import Dataset, DatasetDict, load_dataset

    if name not in VERSIONS:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(VERSIONS)}")
    if data_dir is None:
        try:
            source = load_dataset(f"rajpurkar/{name}")
        except ConnectionError as error:
            raise ConnectionError(f"{error}; without the Hub, name a folder of files as data_dir") from error
        return DatasetDict({split: source[split].cast(_features()) for split in _SPLITS})
    paths = {split: _find(Path(data_dir), stem, VERSIONS[name]) for split, stem in _SPLITS.items()}
    if not any(paths.values()):
        raise FileNotFoundError(f"{data_dir} has no file train* or dev* that ends in {' or '.join(SUFFIXES)}")
    tables = {split: read_squad(path, unanswerable=name == "squad_v2") for split, path in paths.items() if path}
    return DatasetDict({split: Dataset.from_list(rows, features=_features()) for split, rows in tables.items()})


def split_by_title(dataset: Dataset, held_out: int) -> tuple[Dataset, Dataset]:
    """The questions on all but the last ``held_out`` titles, by the order of their first questions, and the others."""
    titles = dataset["title"][:]
    distinct = list(dict.fromkeys(titles))
    if not 1 <= held_out < len(distinct):
        raise ValueError(
            f"held_out is {held_out}; it must be from 1 to {len(distinct) - 1}, less than the titles there are"
        )
    last = set(distinct[-held_out:])
    is_last = np.array([title in last for title in titles])
    return dataset.select(np.flatnonzero(~is_last)), dataset.select(np.flatnonzero(is_last))


def _find(folder: Path, stem: str, version: str) -> Path | None:
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir {folder} is not a folder")
    return find_file(folder, f"{stem}-{version}", SUFFIXES) or find_file(folder, stem, SUFFIXES)


def _features() -> Features:
    from datasets import Features, List, Value

    texts: dict[str, Any] = {name: Value("string") for name in ("id", "title", "context", "question")}
    return Features({**texts, "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))}})


def read_squad(path: Path, *, unanswerable: bool) -> list[dict[str, Any]]:
    """The questions of a file in the official shape, which may all need an answer. Errors: see ``load_squad``."""
    try:
        with open_text(path) as file:
            content = json.load(file)
    except (*DAMAGED, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); the file may be damaged or truncated") from error
    rows = list(_questions(content, path))
    if not rows:
        raise ValueError(f"{path} has no questions")
    for row in rows:
        if not unanswerable and not row["answers"]["text"]:
            raise ValueError(f"{path}, question {row['id']} has no answer, which only squad_v2 allows")
    return rows


def _questions(content: Any, path: Path) -> Iterator[dict[str, Any]]:
    where = str(path)
    for number, article in enumerate(_field(content, "data", list, where)):
        title = _field(article, "title", str, f"{where}, article {number}")
        for paragraph in _field(article, "paragraphs", list, f"{where}, article {number}"):
            context = _field(paragraph, "context", str, f"{where}, a paragraph of article {number}")
            for question in _field(paragraph, "qas", list, f"{where}, a paragraph of article {number}"):
                identity = _field(question, "id", str, f"{where}, a question of article {number}")
                here = f"{where}, question {identity}"
                text = _field(question, "question", str, here)
                answers = _answers(question, context, here)
                yield {"id": identity, "title": title, "context": context, "question": text, "answers": answers}


def _answers(question: Mapping[str, Any], context: str, where: str) -> dict[str, list[Any]]:
    texts, starts = [], []
    for answer in _field(question, "answers", list, where):
        text, start = _field(answer, "text", str, where), _field(answer, "answer_start", int, where)
        if not text.strip() or start < 0 or not context.startswith(text, start):
            raise ValueError(
                f"{where}: the context has {context[start : start + len(text)]!r} at {start}, not {text!r}"
            )
        texts.append(text)
        starts.append(start)
    if question.get("is_impossible", not texts) != (not texts):
        raise ValueError(f"{where}: is_impossible is {question['is_impossible']}, yet it has {len(texts)} answers")
    return {"text": texts, "answer_start": starts}


def _field(of: Any, name: str, kind: type[_Kind], where: str) -> _Kind:
    if not isinstance(of, dict) or not isinstance(of.get(name), kind):
        found = type(of[name]).__name__ if isinstance(of, dict) and name in of else "missing"
        raise ValueError(f"{where}: {name!r} is {found}; it must be {kind.__name__}, as in SQuAD's files")
    return of[name]  # type: ignore[no-any-return]
