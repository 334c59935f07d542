"""The training loops of the documentation run as they stand, and learn; its tables are the measured ones."""

import re

import pytest
from subprocesses import ROOT

from fastkd import ops

LEAST = {
    "README.md": 0.5,
    "docs/attention_kl_div.md": 0.7,
    "docs/baselines.md": 0.5,
    "docs/low_rank_mse.md": 0.3,
    "docs/makd.md": 0.75,
    "docs/mixkd.md": 0.75,
    "docs/mixup.md": 0.8,
    "docs/mse.md": 0.3,
    "docs/training_loops.md": 0.5,
}
"""What is left of the first loss at the end."""


@pytest.mark.parametrize("page", LEAST)
def test_the_loops_of_a_page_learn(page, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    first = next(
        index for index, block in enumerate(blocks) if re.match("import torch|from transformers", block)
    )  # before: fragments
    namespace = {}
    for block in blocks[first:]:
        exec(block, namespace)
        if "losses.append" in block:
            assert namespace["losses"][-1] < LEAST[page] * namespace["losses"][0]
    assert "losses" in namespace


def test_every_loop_is_run():
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    assert {page for page in pages if "losses.append" in (ROOT / page).read_text(encoding="utf-8")} == set(LEAST)


def test_every_op_says_what_its_normalizer_counts():
    page = (ROOT / "docs" / "training_loops.md").read_text(encoding="utf-8")
    counted = re.search(r"\| op \| counts \|\n((?:\|.*\n)+)", page)
    assert set(re.findall(r"`(\w+)`", counted[1])) == set(ops.__all__) - {"bilstm"}


def test_the_kept_tables_are_shown_as_they_are():
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/experiments.md")]
    tables = sorted((ROOT / "experiments" / "results").glob("*.md"))
    assert tables
    for table in tables:
        text = table.read_text(encoding="utf-8").split("\n\n")[0].strip()
        assert any(text in page for page in pages), table.name
