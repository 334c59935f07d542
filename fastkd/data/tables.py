"""Users' own tables: .csv or .tsv with a header, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastkd.data.files import DAMAGED

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


class Table(NamedTuple):
    """A table's columns, its rows and the line each of them begins at."""

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        position = self.columns.index(name)
        return [row[position] for row in self.rows]

    def where(self, row: int) -> str:
        """File and line of a row, for an error."""
        return f"{self.path}, line {self.lines[row]}"


def find_table(folder: Path, stem: str) -> Path | None:
    """The file of that stem and one of ``SUFFIXES``; a ``ValueError`` if there are several."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has several files for {stem}: {', '.join(path.name for path in found)}; leave one")
    return found[0] if found else None


def read_table(path: Path) -> Table:
    """A whole table, without its blank lines.

    A .csv is read by Python's ``csv`` module: a field with a comma, a quotation mark or a line break stands in
    quotation marks. In a .tsv a quotation mark is a character like any other, as in GLUE's files.

    Raises:
        ValueError: no rows, columns without a name or of one name, a row with too few or too many fields, or a
            damaged file; names file and line.
    """
    records = _records(path)
    line, header = next(records, (1, []))
    columns = [name.strip() for name in header]
    if not all(columns) or len(set(columns)) < len(columns):
        raise ValueError(
            f"{path}, line {line}: the columns are {columns}; they must be different names "
            "(pandas writes an index without a name unless told index=False)"
        )
    table = Table(path, columns, [], [])
    for line, fields in records:
        if len(fields) != len(columns):
            raise ValueError(f"{path}, line {line}: {len(fields)} fields; the columns are {', '.join(columns)}")
        table.rows.append(fields)
        table.lines.append(line)
    if not table.rows:
        raise ValueError(f"{path} has no rows; it must hold a line of column names and at least one row")
    return table


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The non-blank records and the number of the line where each begins."""
    opener = gzip.open if path.suffix == ".gz" else open
    line, limit = 1, csv.field_size_limit(sys.maxsize)  # a text is cut at the model's length, not here
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if ".tsv" in path.suffixes:
                reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.reader(file, strict=True)
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield line, fields
                line = reader.line_num + 1
    except (csv.Error, *DAMAGED) as error:
        raise ValueError(f"{path} is damaged from line {line}: {error}") from error
    finally:
        csv.field_size_limit(limit)
