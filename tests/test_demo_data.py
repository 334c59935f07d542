"""The sample that ships with the demo."""

from pathlib import Path

import pytest

from fastkd.data.glue import get_task, load_task

FOLDER = Path(__file__).parents[1] / "demo" / "data"
ROWS = {"qnli": (4462, 1001), "stsb": (1000, 375), "snli": (6000, 1001)}


@pytest.mark.parametrize("name", ROWS)
def test_sample_loads_and_its_parts_are_disjoint(name):
    splits = load_task(name, FOLDER)
    assert (len(splits["train"]), len(splits["validation"])) == ROWS[name]
    columns = get_task(name).columns
    train, validation = (set(zip(*(part[c] for c in columns), strict=True)) for part in splits.values())
    assert not train & validation


def test_sample_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.gz")) < 2_000_000
