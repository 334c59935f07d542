"""``fastkd predict``: answers to lines of text, without torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from fastkd.cli.arguments import positive
from fastkd.cli.config import CommandParser

if TYPE_CHECKING:
    from fastkd.runtime import Student

EXAMPLE = """example:
  fastkd predict student --task sst2 < texts.txt > answers.jsonl

Every line is a text, or with --pairs two of them with a tab between. Every answer is a line of JSON with the number of
its text: {"line": 1, "label": "positive", "score": 0.98, ...}. One that cannot be read gets {"line": 7, "error": ...}
and the others go on; the exit status is then 1."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="answer lines of text with an exported student",
        description="Answer lines of text from standard input with a student that `fastkd export` wrote.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("student", help="folder that `fastkd export` made")
    add("--task", help="of the student's tasks, where it has several")
    add("--pairs", action="store_true", help="two texts per line, with a tab between")
    add("--batch-size", type=positive(int), default=32, help="lines per call (default 32)")
    add("--threads", type=positive(int), default=1, help="threads per call (default 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastkd.runtime import load

    student = load(args.student, threads=args.threads)
    errors = 0
    lines = _with_progress(sys.stdin.buffer)
    for answer in answers(student, lines, task=args.task, pairs=args.pairs, batch_size=args.batch_size):
        errors += "error" in answer
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    return int(errors > 0)


def answers(
    student: Student, lines: Iterable[bytes], *, task: str | None, pairs: bool, batch_size: int
) -> Iterator[dict[str, Any]]:
    """An answer per line, in order; what cannot be read is answered by its error."""
    numbered = enumerate(lines, start=1)
    while batch := list(islice(numbered, batch_size)):
        read: dict[int, Any] = {}
        errors: dict[int, str] = {}
        for number, line in batch:
            try:
                read[number] = _text(line, pairs)
            except ValueError as error:
                errors[number] = str(error)
        predictions = dict(zip(read, student.predict(list(read.values()), task=task), strict=True)) if read else {}
        for number, _ in batch:
            yield {
                "line": number,
                **({"error": errors[number]} if number in errors else predictions[number]._asdict()),
            }


def _text(line: bytes, pairs: bool) -> str | tuple[str, str]:
    text = line.decode("utf-8").rstrip("\r\n")
    if not pairs:
        return text
    first, tab, second = text.partition("\t")
    if not tab:
        raise ValueError("there is no tab between two texts")
    return first, second


def _with_progress(lines: IO[bytes]) -> Iterable[bytes]:
    """Shows the lines read, unless the answers themselves are seen or nobody looks."""
    if sys.stdout.isatty() or not sys.stderr.isatty():
        return lines
    try:
        from tqdm import tqdm
    except ImportError:  # the runtime needs no more than numpy, tokenizers and safetensors
        return lines
    progress: Iterable[bytes] = tqdm(lines, unit=" lines")
    return progress
