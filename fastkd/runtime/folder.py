"""The folder of an exported student: student.json, student.safetensors and tokenizer.json.

student.json names the format and its version, sizes, tasks and the SHA-256 of the other two files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT, VERSION = "fastkd-student", 1
DESCRIPTION, WEIGHTS, TOKENIZER = "student.json", "student.safetensors", "tokenizer.json"

Arrays = dict[str, np.ndarray[Any, Any]]
_FIELDS = {
    "precision": str,
    "sizes": dict,
    "pooling": list,
    "tasks": dict,
    "max_length": int,
    "token_types": bool,
    "sha256": dict,
}


def write(folder: Path, format_name: str, description: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Fills a new folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    hashes = {name: _sha256(folder / name) for name in files}
    whole = {"format": format_name, "version": VERSION, **description, "sha256": hashes}
    (folder / DESCRIPTION).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path) -> tuple[dict[str, Any], Arrays, Path]:
    """Description, weights and the tokenizer's file.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: it is no student, of a newer format, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{path} holds no {DESCRIPTION}: name a folder that `fastkd export` made")
    description = _description(path / DESCRIPTION)
    for name in (WEIGHTS, TOKENIZER):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}")
        if _sha256(path / name) != description["sha256"].get(name):
            raise ValueError(f"{path / name} is damaged: its SHA-256 is not the one in {DESCRIPTION}; export it again")
    try:
        arrays = load_file(path / WEIGHTS)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{path / WEIGHTS}: tensor {name} holds NaN or infinity")
    return description, arrays, path / TOKENIZER


def _description(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a student: its format is not {FORMAT!r}")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {found.get('version')!r}, and this fastkd reads {VERSION}: "
            "update fastkd, or export the student again"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {found.get(name)!r}")
    for task, labels in found["tasks"].items():
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"{path}: task {task} must list the names of its labels, got {labels!r}")
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
