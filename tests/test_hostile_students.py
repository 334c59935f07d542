"""Ten thousand damaged folders: each is refused with ValueError or answers; none crashes, none takes memory in vain."""

import json
import sys

import pytest
from runtime_samples import save_student
from subprocesses import python

from fastkd.students.export import export_student


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory as Linux does")
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_damaged_folders_are_refused_or_answer(tmp_path, precision):
    export_student(save_student(tmp_path / "model"), tmp_path / "student", precision=precision)
    counts = json.loads(python("tests/hostile_students.py", str(tmp_path / "student"), "5000", "0"))
    assert min(counts.values()) > 100, counts
