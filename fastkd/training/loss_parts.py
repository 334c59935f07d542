"""The parts of a training loss, summed on the device: reading them at every step would wait for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """A micro-batch: its optimiser step, from 0, and its place in the step's accumulation window, from 0."""

    step: int
    micro_batch: int


class LossParts:
    """Sums of named losses between two logs, and where one of them first was not finite."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._places: list[Place] = []
        self._first_bad: dict[str, Tensor] = {}  # index into places; infinity while all are finite

    def add(self, parts: Mapping[str, Tensor], place: Place) -> None:
        """Counts one micro-batch; a part may be missing from it."""
        index = len(self._places)
        self._places.append(place)
        for name, part in parts.items():
            part = part.detach().float()
            good = self._first_bad.get(name, torch.full_like(part, torch.inf))
            self._first_bad[name] = torch.where(part.isfinite(), good, good.clamp(max=index))
            self._sums[name] = self._sums.get(name, torch.zeros_like(part)) + part
            self._counts[name] = self._counts.get(name, 0) + 1

    def broken(self) -> tuple[Place, list[str]] | None:
        """The first micro-batch with a part that is NaN or infinite, and its parts that are; None if all is well."""
        if not self._first_bad:
            return None
        names, first = list(self._first_bad), torch.stack(list(self._first_bad.values())).cpu()
        if not first.isfinite().any():
            return None
        earliest = first.min()
        return self._places[int(earliest)], [name for name, at in zip(names, first, strict=True) if at == earliest]

    def totals(self) -> dict[str, tuple[float, int]]:
        """Each part's sum and number of micro-batches since the last call, which starts the sums anew."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        found = dict(zip(self._sums, zip(sums, self._counts.values(), strict=True), strict=True))
        self._clear()
        return found


def means(totals: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """The mean of each part over all its micro-batches, from the totals of processes, some of which may lack it."""
    names = dict.fromkeys(name for total in totals for name in total)
    pairs = {name: [total[name] for total in totals if name in total] for name in names}
    return {name: sum(s for s, _ in found) / sum(count for _, count in found) for name, found in pairs.items()}
