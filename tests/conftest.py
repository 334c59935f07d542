"""Settled before any test module is imported, and fixtures that every op needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# The models of the tests are so small that a second thread is only waited for, on a busy machine for nearly all of the
# time. The kernels' own tests ask for two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that nothing unwritten can pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """Fail unless the tests fail on a copy of this tree in which a mutant's new text stands for the old.

    The mutant called "nothing" must pass. Of the tests only the ``chosen`` run, by default those of the backend that
    the mutant is in. All copies stand at one path and begin with the objects of the sound tree, compiled once, so that
    a mutant of the kernels compiles no more than what it touches.
    """
    folder = tmp_path_factory.mktemp("mutants")
    sound, tree = folder / "sound", folder / "fastkd"
    ignore = shutil.ignore_patterns(".venv", ".git", "build", "demo", "__pycache__", "results")
    shutil.copytree(Path(__file__).parent.parent, sound, symlinks=True, ignore=ignore)

    def build():
        subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, check=True)

    def verdict(name, mutant, *tests, chosen=None):
        path, old, new = mutant
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(sound, tree, symlinks=True)
        text = (tree / path).read_text()
        assert text.count(old) == 1, "the mutant no longer fits the code"
        if path.startswith("csrc") and not (sound / "build").exists():
            build()
            shutil.copytree(tree / "build", sound / "build")
        (tree / path).write_text(text.replace(old, new))
        if path.startswith("csrc"):
            build()
        backend = chosen or ("triton" if path.startswith("kernels") else "not triton")
        command = [sys.executable, "-m", "pytest", "-x", *tests, "-k", backend]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == int(name != "nothing"), f"{name}: wrong verdict\n{done.stdout[-2000:]}"

    return verdict
