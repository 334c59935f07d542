"""A run that is done once: its result is written last, and found again instead of computed anew."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARKER = "result.json"


def finished_or(
    folder: Path, configuration: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of the finished run in ``folder``, or of ``compute()``, which is then marked as finished there.

    ``configuration`` and result must be JSON values. Raises ValueError when ``folder`` holds a finished run of
    another configuration, naming the settings that differ.
    """
    marker = folder / MARKER
    wanted = json.loads(json.dumps(configuration))
    if marker.exists():
        stored = json.loads(marker.read_text(encoding="utf-8"))
        if settings := different(stored["configuration"], wanted):
            raise ValueError(
                f"{folder} holds a finished run with other settings ({settings}): choose another output folder"
            )
        return dict(stored["result"])
    result = dict(compute())
    write_text(marker, json.dumps({"configuration": wanted, "result": result}, indent=2))
    return result


def different(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words, the settings that are not the same; empty if all are."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name} {found.get(name)!r} there, {wanted.get(name)!r} here" for name in names)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
