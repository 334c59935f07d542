"""Paraphrases of training rows, by whatever means they were made, as further rows with the originals' labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.data.tables import read_table

if TYPE_CHECKING:
    from datasets import Dataset


def add_paraphrases(rows: Dataset, path: Path, count: int) -> Dataset:
    """The training rows, and after them their paraphrases with their labels.

    Args:
        rows: training rows as ``load_task`` gives them, or a part of them; paraphrases of others stay out.
        path: a table of the rows' text columns and ``row``, the number of the row that is paraphrased, from 0. A row
            may have any number of paraphrases, numbered from ``count`` in their order.
        count: rows of the whole split.

    Raises:
        ValueError: the columns are others, a row does not exist, or a text is empty; names file and line.
    """
    from datasets import Dataset, concatenate_datasets

    table = read_table(path)
    columns = [column for column in rows.column_names if column != "label"]
    if sorted(table.columns) != sorted(columns):
        raise ValueError(
            f"{path}, line 1: the columns are {', '.join(table.columns)}; they must be {', '.join(columns)}"
        )
    labels = dict(zip(rows["row"][:], rows["label"][:], strict=True))
    texts = {column: table.column(column) for column in columns if column != "row"}
    added: dict[str, list[Any]] = {name: [] for name in rows.column_names}
    for index, number in enumerate(table.column("row")):
        if not number.strip().isdecimal() or int(number) >= count:
            raise ValueError(f"{table.where(index)}: there is no row {number!r}; training has 0 to {count - 1}")
        for column, lines in texts.items():
            if not lines[index].strip():
                raise ValueError(f"{table.where(index)}: {column} is empty")
        if int(number) in labels:
            fields = {column: lines[index] for column, lines in texts.items()}
            for name, value in {**fields, "label": labels[int(number)], "row": count + index}.items():
                added[name].append(value)
    return concatenate_datasets([rows, Dataset.from_dict(added, features=rows.features)])
