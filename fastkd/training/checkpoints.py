"""Which checkpoint of an interrupted training is whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

_LAST_WRITTEN = "trainer_state.json"


def last_checkpoint(folder: str | Path, processes: int = 1) -> str | None:
    """The newest checkpoint of ``transformers.Trainer`` in ``folder`` that was written to its end; None if none was.

    A process that is killed while it saves leaves a folder with the name of a checkpoint and a part of its files.
    ``processes``: of the run that saved, each of which keeps a random state of its own.
    """
    found = Path(folder).glob("checkpoint-*") if Path(folder).is_dir() else ()
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in found)
    numbered = {int(match[1]): path for match, path in named if match}
    for step in sorted(numbered, reverse=True):
        if _is_whole(numbered[step], processes):
            return str(numbered[step])
    return None


def _is_whole(checkpoint: Path, processes: int) -> bool:
    if len(list(checkpoint.glob("rng_state*"))) < processes:
        return False
    try:
        json.loads((checkpoint / _LAST_WRITTEN).read_text())
    except (OSError, ValueError):
        return False
    return True
