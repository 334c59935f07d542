"""Batches of several tasks, each batch of one task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

POOL_BATCHES = 50  # batches whose rows are sorted by length together

Indices = npt.NDArray[np.int64]


class MultiTaskBatchSampler(Sampler[list[int]]):
    """Shuffled single-task batches of indices into tasks laid end to end.

    By default every row is seen once per epoch and the batches of all tasks come in random order, so a task
    has a share of the batches in proportion to its size (MKD, Algorithm 1; MT-DNN's sampler). With ``tau``,
    each batch's task is drawn with probability ∝ size^tau instead (tau = 1 in proportion, 0 uniform), and a
    small task is reshuffled and repeated as often as needed.

    The order depends on ``seed`` and the epoch given to ``set_epoch`` alone, so skipping the first k batches
    of an epoch resumes it exactly. It has no ``batch_size`` on purpose: Accelerate then hands whole batches
    to processes instead of filling up a task's last, short batch with rows of another.

    Args:
        sizes: number of rows of each task, in the order in which the tasks are laid end to end.
        batch_size: rows in a batch; a task's last batch may be shorter.
        seed: >= 0.
        lengths: length of every row; when given, rows of similar length share a batch: a task's shuffled rows
            are sorted by length inside pools of 50 batches, a choice of this project.
        tau: exponent of the weighted variant, >= 0; None for every row once.
        batches_per_epoch: number of batches of the weighted variant; None for as many as once-through has.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        *,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        tau: float | None = None,
        batches_per_epoch: int | None = None,
    ) -> None:
        empty = [task for task, size in sizes.items() if size < 1]
        if empty or not sizes:
            raise ValueError(f"sizes has no rows for {', '.join(empty) or 'any task'}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if tau is not None and not 0 <= tau < float("inf"):
            raise ValueError(f"tau is {tau}; it must be a finite number >= 0")
        if batches_per_epoch is not None and (tau is None or batches_per_epoch < 1):
            raise ValueError(f"batches_per_epoch is {batches_per_epoch}; it must be at least 1 and needs tau")
        total = sum(sizes.values())
        if lengths is not None and len(lengths) != total:
            raise ValueError(f"lengths has {len(lengths)} entries; it must have one per row, {total}")
        self.sizes = dict(sizes)
        self.rows_per_batch = batch_size
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.tau = tau
        self.epoch = 0
        once_through = sum(-(-size // batch_size) for size in sizes.values())
        self.num_batches = batches_per_epoch or once_through

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        starts = np.cumsum([0, *self.sizes.values()])
        rows = [np.arange(start, stop) for start, stop in pairwise(starts)]
        batches = self._once_through(rows, rng) if self.tau is None else self._weighted(rows, rng)
        for batch in batches:
            yield batch.tolist()

    def _once_through(self, rows: list[Indices], rng: np.random.Generator) -> Iterator[Indices]:
        batches = [batch for task_rows in rows for batch in self._batches(task_rows, rng)]
        for position in rng.permutation(len(batches)):
            yield batches[position]

    def _weighted(self, rows: list[Indices], rng: np.random.Generator) -> Iterator[Indices]:
        weights = np.array([len(task_rows) for task_rows in rows], dtype=float) ** self.tau
        queues: list[list[Indices]] = [[] for _ in rows]
        for task in rng.choice(len(rows), size=self.num_batches, p=weights / weights.sum()):
            if not queues[task]:
                batches = self._batches(rows[task], rng)
                queues[task] = [batches[position] for position in rng.permutation(len(batches))]
            yield queues[task].pop()

    def _batches(self, rows: Indices, rng: np.random.Generator) -> list[Any]:
        """One task's rows, shuffled and cut into batches."""
        rows = rng.permutation(rows)
        if self.lengths is not None:
            pool = POOL_BATCHES * self.rows_per_batch
            pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
            rows = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in pools])
        size = self.rows_per_batch
        return [rows[start : start + size] for start in range(0, len(rows), size)]
