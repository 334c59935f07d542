"""A table: its groups of students, trained side by side, and the report of all that is finished."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from experiments import scores as csv_file
from experiments.claims import Claim
from experiments.report import FILES, write_report
from experiments.students import folder_name
from fastkd.training.parallel import Add, train_all

RESULTS = Path(__file__).parent / "results"


class Part(Protocol):
    """Students of a row that are trained in one process, picklable."""

    @property
    def cost(self) -> float:
        """What training them takes, in any unit."""

    def train(self, scale: float, add: Add) -> None:
        """Trains what is not finished yet, and writes its scores. ``add`` is told of ``scale`` · ``cost`` in all."""


@dataclass(frozen=True)
class Table:
    """``rows`` and ``columns`` give the order; what was trained of others before is shown after them.

    ``folder`` holds ``groups``, a folder with ``scores.csv`` for each group and teacher that is finished, and gets
    the report.
    """

    name: str
    title: str
    folder: Path
    rows: Sequence[str]
    columns: Sequence[str]
    claims: Sequence[Claim]

    def group_folder(self, *words: str) -> Path:
        return self.folder / "groups" / folder_name(*words)

    def fill(self, groups: Sequence[Part], jobs: int | None) -> str:
        """Trains what is not finished, reports what is, even when it was stopped, and gives the table."""
        scale = len(groups) / sum(group.cost for group in groups)
        try:
            train_all(partial(_train, scale), groups, jobs, f"{self.name}: {len(groups)} groups of students")
        finally:
            table = self.report()
        return table

    def report(self) -> str:
        paths = sorted((self.folder / "groups").glob("*/scores.csv"))
        scores = [line for path in paths for line in csv_file.read(path)]
        scores.sort(key=lambda line: self.rows.index(line.row))
        columns = [column for column in self.columns if any(line.column == column for line in scores)]
        columns += dict.fromkeys(line.column for line in scores if line.column not in columns)
        return write_report(self.folder, scores, self.rows, columns, self.title, self.claims)

    def keep(self) -> None:
        """Copies the report to the repository."""
        RESULTS.mkdir(exist_ok=True)
        for file, ending in FILES.items():
            if (self.folder / file).exists():
                shutil.copyfile(self.folder / file, RESULTS / f"{self.name}{ending}")


def _train(scale: float, group: Part, add: Add) -> None:
    group.train(scale, add)
