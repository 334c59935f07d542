"""Students of readers and decoders: a learning rate chosen on one seed, then the seeds that are reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import scores as csv_file
from experiments.scores import scores_of
from experiments.students import Trained, mean_score, part, tuned
from fastkd.training.parallel import Add
from fastkd.training.runs import finished_or, write_text

Student = Callable[[float, int, Add], Trained]


@dataclass(frozen=True, eq=False)
class Runs:
    """Students of one row that are alike but for learning rate and seed; picklable if ``student`` is.

    Args:
        row: of the table.
        folder: of their own; gets ``scores.csv``, and all that is known of the reported ones in ``students.json``.
        settings: what a finished one is known by, JSON values.
        student: trains one, of a learning rate and a seed, and gives what a ``Score`` tells of it.
        rates, seeds: to choose from, and to report.
        quality: what a rate is chosen by, the higher the better; picklable.
    """

    row: str
    folder: Path
    settings: Mapping[str, Any]
    student: Student
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    quality: Callable[[Trained], float] = mean_score

    @property
    def cost(self) -> float:
        return len(self.seeds) + (len(self.rates) if len(self.rates) > 1 else 0)

    def train(self, scale: float, add: Add) -> None:
        def train(rate: float, seed: int) -> Trained:
            with part(add, scale) as step:
                folder = self.folder / f"lr-{rate:g}-seed-{seed}"
                known = {**self.settings, "learning_rate": rate, "seed": seed}
                return finished_or(folder, known, lambda: self.student(rate, seed, step))

        best, students = tuned(train, self.rates, self.seeds, self.quality)
        lines = [
            line
            for seed, trained in students.items()
            for line in scores_of(self.row, seed, {name: name for name in trained["scores"]}, trained)
        ]
        write_text(self.folder / "students.json", json.dumps({**self._others(best), **students}, indent=2))
        csv_file.add(self.folder / "scores.csv", lines)

    def _others(self, rate: float) -> dict[int, Trained]:
        """What earlier calls know of other seeds with this rate."""
        path = self.folder / "students.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        return {int(seed): found for seed, found in before.items() if found["learning_rate"] == rate}
