"""Output folders: whole or absent, and never in place of something else."""

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
