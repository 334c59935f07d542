"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(folder: str | Path, needed_bytes: int = 0) -> Path:
    """The folder's path, links resolved, once it is clear that results can be saved there.

    Raises:
        FileExistsError: it exists and holds something, or is one that cannot be exchanged for a finished one.
        OSError: it cannot be made or written, or the disk has less than ``needed_bytes`` left.
    """
    path = Path(folder).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} holds something else; name a new or an empty folder, or remove it")
    if path == Path.cwd() or path.is_mount():
        raise FileExistsError(f"{path} is the working folder or a mount point; name a new folder, as one inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent):
            free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise OSError(f"cannot write to {path.parent}, where {path.name} is to be saved: {error}") from error
    if free < needed_bytes:
        raise OSError(f"{path.parent} has {free / 1e6:.0f} MB left; saving {path.name} needs {needed_bytes / 1e6:.0f}")
    return path


@contextmanager
def new_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder, renamed to ``folder`` when the block succeeds and removed when it fails.

    ``replace`` removes an older ``folder`` once the new one stands in its place; without it, one that holds
    something is refused. Where only the renaming fails, the temporary folder stays, and the error names it.
    """
    path = Path(folder).resolve() if replace else check_output(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        with saving(path):
            yield partial
        partial.chmod(0o777 & ~_umask())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        (_exchange if replace else os.replace)(partial, path)
    except OSError as error:
        raise OSError(f"{partial} is whole, but cannot be renamed to {path}: {error}") from error


def _exchange(new: Path, path: Path) -> None:
    """Renames ``new`` to ``path``; a folder that was there is removed after that, and put back where it fails."""
    old = new.with_name(f"{new.name}.old")
    if path.is_dir():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Makes safetensors' error of a full disk the ``OSError`` that every other writer raises."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot save {path}: {error}") from error


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
