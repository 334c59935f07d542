"""The runtime's engine without Python: on every instruction set, under sanitizers, and on ARM."""

import os
import shutil
import subprocess

import pytest
from test_simd import ARM, EMULATOR, NATIVE, build, run

SOURCES = [f"csrc/runtime/{name}.cpp" for name in ("lstm", "panels", "student", "tanh", "workers")]
TARGETS = ("avx512", "avx512-no-vnni", "avx2", "avx2-no-vnni", "baseline")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return build(NATIVE, "runtime", tmp_path_factory.mktemp("engine"), *SOURCES, "-pthread")


@pytest.mark.parametrize("target", TARGETS)
def test_every_size_equals_the_recurrence_in_double(native, target):
    done = subprocess.run(
        [native, "65", "2"], env=os.environ | {"FASTKD_CPU_TARGET": target}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout == f"{target}\n"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer, tmp_path):
    flags = ["-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    binary = build(NATIVE, "runtime", tmp_path, *SOURCES, *flags, "-pthread")
    # ThreadSanitizer cannot place its shadow memory under some kernels' address randomisation.
    fixed = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    for threads in ("1", "3"):
        assert run(*fixed, binary, "20", threads) == ["best"]


def test_on_arm(tmp_path):
    binary = build(ARM, "runtime", tmp_path, *SOURCES, "-static", "-pthread")
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"compiled, but {EMULATOR} is not installed to run it")
    assert run(EMULATOR, binary, "33", "2") == ["best"]
