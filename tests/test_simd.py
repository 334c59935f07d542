"""The vector layer on every instruction set at hand: natively, and for ARM by cross compiler and emulator."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Icsrc", "-Itests/simd"]
NATIVE = (sysconfig.get_config_var("CXX") or "c++").split()[0]
ARM, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def build(compiler: str, program: str, folder: Path, *flags: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    binary = folder / program
    command = [compiler, *FLAGS, *flags, f"tests/simd/{program}.cpp", "-o", str(binary)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binary


def run(*command: str | Path) -> list[str]:
    """The targets that the program says it has checked."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.split()


def test_vectors_on_every_target_of_this_cpu(tmp_path):
    assert "baseline" in run(build(NATIVE, "vec", tmp_path))


@pytest.mark.parametrize("program", ["vec", "kl_div", "topk_kl_div"])
def test_kernels_on_arm(program, tmp_path):
    binary = build(ARM, program, tmp_path, "-static")
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"compiled, but {EMULATOR} is not installed to run it")
    assert run(EMULATOR, binary) == ["baseline"]
