"""Output folders: whole or absent, and never in place of something else."""

import os

import pytest

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
    assert list(tmp_path.iterdir()) == [good]
