"""A table: its groups of students, trained side by side, and the report of all that is finished."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from experiments import scores as csv_file
from experiments.claims import Claim
from experiments.report import FILES, write_report
from experiments.scores import Score
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

    ``parts`` are named parts of the columns, for each of which the report tells what the rows keep of the teacher.

    ``folder`` holds ``groups``, a folder with ``scores.csv`` for each group and teacher that is finished, and gets
    the report.
    """

    name: str
    title: str
    folder: Path
    rows: Sequence[str]
    columns: Sequence[str]
    claims: Sequence[Claim]
    parts: Mapping[str, Collection[str]] = field(default_factory=dict)

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
        return self._write(self.folder, [line for path in paths for line in csv_file.read(path)])

    def keep(self) -> None:
        """Puts the report into the repository; columns that only the one before has stay as they were."""
        RESULTS.mkdir(exist_ok=True)
        scores, kept = csv_file.read(self.folder / "scores.csv"), RESULTS / f"{self.name}.csv"
        measured = {line.column for line in scores}
        before = csv_file.read(kept) if kept.exists() else []
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), [*scores, *(line for line in before if line.column not in measured)])
            for file, ending in FILES.items():
                made = [place / file for place in (Path(folder), self.folder) if (place / file).exists()]
                if made:
                    shutil.copyfile(made[0], RESULTS / f"{self.name}{ending}")

    def _write(self, folder: Path, scores: list[Score]) -> str:
        scores = sorted(scores, key=lambda line: self.rows.index(line.row))
        columns = [column for column in self.columns if any(line.column == column for line in scores)]
        columns += dict.fromkeys(line.column for line in scores if line.column not in columns)
        return write_report(folder, scores, self.rows, columns, self.title, self.claims, self.parts)


def _train(scale: float, group: Part, add: Add) -> None:
    group.train(scale, add)
