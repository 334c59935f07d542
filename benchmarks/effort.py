"""How much is measured."""

from __future__ import annotations

from typing import NamedTuple


class Effort(NamedTuple):
    """What a run spends on a problem."""

    seconds: float
    rounds: int
    """At least, whatever the seconds."""
    whole: bool
    """Whether what takes longest is measured too: peak memory, transformers, starts."""


FULL = Effort(30.0, 5, whole=True)
QUICK = Effort(1.0, 3, whole=False)
