"""Texts in, answers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from fastkd.runtime import folder as student_folder
from fastkd.runtime.extension import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

Text = str | tuple[str, str]


class Prediction(NamedTuple):
    """Answer to one text or pair of texts."""

    label: str | None
    """The most likely label; None for a regression."""
    score: float
    """Its probability, or the value of a regression."""
    probabilities: dict[str, float]
    """Of every label, by softmax; empty for a regression."""
    truncated: bool
    """Whether the text was longer than the student reads."""


def load(folder: str | Path, *, threads: int = 1) -> Student:
    """The student of a folder that ``fastkd export`` made.

    ``threads`` is how many work on one call. With 1 none is ever started, so that a process may load first and fork
    then. Calls from several threads may overlap.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        TypeError: ``threads`` is no int.
        ValueError: it is no student, of a newer format, or damaged.
        ImportError: fastkd was installed without its compiled parts.
    """
    if not isinstance(threads, int):
        raise TypeError(f"threads must be an int, got {type(threads).__name__}")
    runtime = compiled()
    description, arrays, tokenizer_file = student_folder.read(folder)
    tasks = {task: max(1, len(labels)) for task, labels in description["tasks"].items()}
    try:
        model = runtime.Model(
            arrays, description["precision"], description["sizes"], description["pooling"], tasks, threads
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"{Path(folder) / student_folder.DESCRIPTION} does not describe a student: {error}") from error
    return Student(model, description, read_tokenizer(tokenizer_file, description["max_length"]), threads)


def read_tokenizer(path: Path, max_length: int) -> Tokenizer:
    """As training had it: longer texts are cut at ``max_length`` tokens."""
    with _tokenizer_errors(f"{path} cannot be read"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer


@contextmanager
def _tokenizer_errors(message: str) -> Iterator[None]:
    """What tokenizers raises is plain Exception, or where its Rust code panics not even that."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{message}: {error}") from error
        raise


class Student:
    """A student that answers; :func:`load` makes it.

    ``tasks`` maps the name of a task to its labels, of which a regression has none.
    """

    def __init__(self, model: Any, description: dict[str, Any], tokenizer: Tokenizer, threads: int) -> None:
        self._model, self._tokenizer, self._threads = model, tokenizer, threads
        self._token_types: bool = description["token_types"]
        self.precision: str = description["precision"]
        self.tasks: dict[str, list[str]] = description["tasks"]

    def predict(self, texts: Sequence[Text], *, task: str | None = None) -> list[Prediction]:
        """An answer per text, or per pair of texts; ``task`` may be left out where the student has but one.

        Raises:
            TypeError, ValueError: texts are neither all str nor all pairs of str; the task is unknown.
        """
        name, pairs = self._task(task), _are_pairs(texts)
        encodings = self._encode(texts)
        logits = self._logits(name, encodings, pairs)
        return [
            _prediction(row, self.tasks[name], bool(encoding.overflowing))
            for row, encoding in zip(logits, encodings, strict=True)
        ]

    def logits(self, texts: Sequence[Text], *, task: str | None = None) -> NDArray[np.float32]:
        """(texts, labels) float32, a regression having one column; the same bits whatever the company of a text."""
        name, pairs = self._task(task), _are_pairs(texts)
        return self._logits(name, self._encode(texts), pairs)

    def _task(self, task: str | None) -> str:
        if task is None and len(self.tasks) == 1:
            return next(iter(self.tasks))
        if task is None or task not in self.tasks:
            raise ValueError(f"task must be one of {', '.join(sorted(self.tasks))}, got {task!r}")
        return task

    def _encode(self, texts: Sequence[Text]) -> list[Encoding]:
        with _tokenizer_errors("the student's tokenizer cannot read the texts"):
            if self._threads > 1:
                return self._tokenizer.encode_batch(list(texts))
            # One by one: a batch would start threads.
            return [self._tokenizer.encode(*((text,) if isinstance(text, str) else text)) for text in texts]

    def _logits(self, task: str, encodings: list[Encoding], pairs: bool) -> NDArray[np.float32]:
        sentences: list[list[int]] = []
        for i, encoding in enumerate(encodings):
            first, second = self._split(encoding) if pairs else (encoding.ids, None)
            if not first:
                raise ValueError(f"text {i} has no tokens")
            sentences += [first, second or first] if pairs else [first]
        lengths = np.array([len(ids) for ids in sentences], dtype=np.int64)
        try:
            ids = np.array([token for ids in sentences for token in ids], dtype=np.int32)
        except OverflowError as error:
            raise ValueError(f"the student's tokenizer gives ids that the student has not: {error}") from error
        logits: NDArray[np.float32] = self._model.logits(task, ids, lengths, pairs)
        return logits

    def _split(self, encoding: Encoding) -> tuple[list[int], list[int]]:
        """Tokens of both sentences, told apart as in training."""
        sentence = encoding.type_ids if self._token_types else encoding.sequence_ids
        begin = sentence.index(1) if 1 in sentence else len(sentence)
        return encoding.ids[:begin], encoding.ids[begin:]


def _are_pairs(texts: Sequence[Text]) -> bool:
    """Raises TypeError unless all are str, or all pairs of str."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts, got one str: put it into a list")
    pairs = len(texts) > 0 and not isinstance(texts[0], str)
    for i, text in enumerate(texts):
        if isinstance(text, str) == pairs:
            raise TypeError(f"texts must be all str or all pairs of str, but text 0 and text {i} differ")
        if pairs and not (isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(t, str) for t in text)):
            raise TypeError(f"text {i} must be a str or a pair of str, got {text!r}")
    return pairs


def _prediction(logits: NDArray[np.float32], labels: list[str], truncated: bool) -> Prediction:
    if not labels:
        return Prediction(None, float(logits[0]), {}, truncated)
    weights = np.exp(logits - logits.max())
    probabilities = dict(zip(labels, (weights / weights.sum()).tolist(), strict=True))
    label = labels[int(logits.argmax())]
    return Prediction(label, probabilities[label], probabilities, truncated)
