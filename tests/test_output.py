"""Output folders: whole or absent, and never in place of something else."""

import os
from pathlib import Path

import pytest
from subprocesses import python

from fastkd.training.output import check_output, new_folder


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_output(tmp_path / "file" / "inside")
    with pytest.raises(FileExistsError, match="holds something else"):
        check_output(tmp_path / "file")


def test_new_folder_is_whole_or_absent(tmp_path):
    with new_folder(tmp_path / "good") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "good").exists()
    assert (tmp_path / "good" / "a").read_text() == "x"
    interrupted = new_folder(tmp_path / "bad")
    (interrupted.__enter__() / "a").write_text("x")
    assert not interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_link_leads_to_the_folder_that_is_filled(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name, replace in (("a", False), ("b", True)):
        with new_folder(tmp_path / "link", replace=replace) as folder:
            (folder / name).write_text(name)
        assert names_and_texts(tmp_path / "there") == {name: name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_folders_that_cannot_be_renamed_over_are_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="is the working folder or a mount point"):
        check_output(".")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "mounted")
    with pytest.raises(FileExistsError, match="mounted is the working folder or a mount point"):
        check_output(tmp_path / "mounted")


def test_what_is_whole_outlasts_a_failure_to_rename_it(tmp_path):
    filling = new_folder(tmp_path / "good")
    folder = filling.__enter__()
    (folder / "a").write_text("x")
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "b").write_text("of another process")
    with pytest.raises(OSError, match=r"\.good\.partial-\w+ is whole, but cannot be renamed to"):
        filling.__exit__(None, None, None)
    assert (folder / "a").read_text() == "x"
    assert names_and_texts(tmp_path / "good") == {"b": "of another process"}


def names_and_texts(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_an_older_folder_is_replaced_when_the_new_one_is_whole(tmp_path):
    for name in "ab":
        with new_folder(tmp_path / "good", replace=True) as folder:
            (folder / name).write_text(name)
    assert names_and_texts(tmp_path / "good") == {"b": "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_an_older_folder_outlasts_a_failure_of_the_new_ones_renaming(tmp_path, monkeypatch):
    good = tmp_path / "good"
    good.mkdir()
    (good / "a").write_text("old")
    rename, left = os.replace, []

    def fail(source, target):
        if "new" in names_and_texts(source).values():
            left.extend(file.read_text() for file in tmp_path.rglob("a"))  # what a kill would leave here
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"), new_folder(good, replace=True) as folder:
        (folder / "a").write_text("new")
    assert sorted(left) == ["new", "old"]
    assert names_and_texts(good) == {"a": "old"}
    assert names_and_texts(folder) == {"a": "new"}
    assert sorted(tmp_path.iterdir()) == sorted([folder, good])


def test_texts_are_utf8_in_any_locale(tmp_path):
    script = "import pathlib, sys\nfrom fastkd.training.runs import write_text\n"
    script += "write_text(pathlib.Path(sys.argv[1]), '50.0 \\xb1 1')"
    python("-c", script, str(tmp_path / "a"), PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "50.0 ± 1"
