"""A table: its groups of students, trained side by side, and the report of all that is finished."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from experiments import scores as csv_file
from experiments.claims import Claim
from experiments.report import FILES, PERPLEXITY, write_report
from experiments.scores import TEACHER, Score
from experiments.students import folder_name
from fastkd.training.parallel import Add, train_all
from fastkd.training.runs import different, write_text

RESULTS = Path(__file__).parent / "results"
PLACES = ("model", "data_dir", "texts", "train", "test")
"""Settings that are another path on another machine, and are not kept."""


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

    ``settings`` are what all rows and columns must have in common, JSON values: a call with others is refused.

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
    settings: Mapping[str, Any]
    parts: Mapping[str, Collection[str]] = field(default_factory=dict)

    def group_folder(self, *words: str) -> Path:
        return self.folder / "groups" / folder_name(*words)

    def fill(self, groups: Sequence[Part], jobs: int | None) -> str:
        """Trains what is not finished, reports what is, even when it was stopped, and gives the table."""
        one_setting(self.folder / "settings.json", self.settings)
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
        """Puts the report into the repository; what only the one before has, of the same teacher, stays as it was."""
        RESULTS.mkdir(exist_ok=True)
        scores, kept = csv_file.read(self.folder / "scores.csv"), RESULTS / f"{self.name}.csv"
        settings = {name: value for name, value in self.settings.items() if name not in PLACES}
        one_setting(kept.with_suffix(".json"), settings)
        measured = {(line.row, line.column) for line in scores}
        before = csv_file.read(kept) if kept.exists() else []
        stays = [line for line in of_same_teachers(before, scores) if (line.row, line.column) not in measured]
        if stays and (self.folder / PERPLEXITY).exists():
            rows = ", ".join(dict.fromkeys(line.row for line in stays))
            raise ValueError(
                f"{kept} has {rows}, whose perplexities are not in {self.folder}: train these rows there, too"
            )
        scores += stays
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), scores)
            for file, ending in FILES.items():
                made = [place / file for place in (Path(folder), self.folder) if (place / file).exists()]
                if made:
                    shutil.copyfile(made[0], RESULTS / f"{self.name}{ending}")

    def _write(self, folder: Path, scores: list[Score]) -> str:
        order = {row: place for place, row in enumerate(self.rows)}
        scores = sorted(scores, key=lambda line: order.get(line.row, len(order)))
        columns = [column for column in self.columns if any(line.column == column for line in scores)]
        columns += dict.fromkeys(line.column for line in scores if line.column not in columns)
        return write_report(folder, scores, self.rows, columns, self.title, self.claims, self.parts)


def of_same_teachers(before: Sequence[Score], scores: Sequence[Score]) -> list[Score]:
    """What of ``before`` is of columns that ``scores`` does not have from another teacher, told by its score.

    A teacher that is trained again, as on another day, may well be the same to the last bit.
    """
    then, now = ({line.column: line.score for line in lines if line.row == TEACHER} for lines in (before, scores))
    return [line for line in before if line.column not in now or now[line.column] == then.get(line.column)]


def one_setting(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings; raises ValueError where the file has others already."""
    wanted = json.loads(json.dumps(settings))
    found = json.loads(path.read_text()) if path.exists() else wanted
    if others := different(found, wanted):
        raise ValueError(f"{path} is of a table with other settings ({others}): a table has one; choose another folder")
    write_text(path, json.dumps(wanted, indent=2) + "\n")


def _train(scale: float, group: Part, add: Add) -> None:
    group.train(scale, add)
