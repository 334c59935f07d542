"""Parts of a split in which every class has its share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from datasets import Dataset


def hold_out(rows: Dataset, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The rows without a tenth of them, and that tenth, at least one row, drawn from each class by its size.

    Raises:
        ValueError: too few rows to leave one of every class.
    """
    ranks = _ranks(rows, seed)
    count = max(1, round(len(rows) / 10))
    if count > np.count_nonzero(ranks):
        raise ValueError(f"{len(rows)} training rows are too few to draw validation rows from; add a file dev.csv")
    drawn = np.zeros(len(rows), dtype=bool)
    drawn[np.argsort(ranks, kind="stable")[-count:]] = True
    return rows.select(np.flatnonzero(~drawn)), rows.select(np.flatnonzero(drawn))


def take_fraction(rows: Dataset, fraction: float, *, seed: int = 0) -> Dataset:
    """A random ``fraction`` of the rows of each class, rounded up, in their order.

    With one seed a smaller fraction is a part of every larger one.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"train_fraction is {fraction}; it must be above 0 and at most 1")
    return rows.select(np.flatnonzero(_ranks(rows, seed) < fraction))


def _ranks(rows: Dataset, seed: int) -> npt.NDArray[Any]:
    """For each row its place, from 0 to below 1, in a random order of its class; a regression is one class."""
    labels = np.asarray(rows["label"][:])
    strata = np.zeros(len(rows)) if labels.dtype.kind == "f" else labels
    random = np.random.default_rng(seed).random(len(rows))
    ranks = np.empty(len(rows))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        ranks[members[np.argsort(random[members])]] = np.arange(len(members)) / len(members)
    return ranks
