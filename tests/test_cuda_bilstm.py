"""The recurrent kernel without a GPU: compiled for several, and run on an emulated one."""

import shutil
import subprocess
import sys

import pytest
from cuda_compile import CXX, NVCC, SHARED_MEMORY, compile_emulated, resources, sizes

from fastkd.ops import _extension

REGISTERS = 65536
"""Of a multiprocessor, on all of these GPUs."""


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_nothing_spills_and_a_block_fits(capability):
    found = resources(capability)
    report = "\n".join(f"{name}: {each}" for name, each in found.items())
    assert not any(each.stack or each.spills for each in found.values()), report
    for size in sizes():
        for element in ("BFloat16", "Half"):
            registers = found[element, size.variant].registers
            # Allocated by 8 for each thread of a warp.
            assert -(-registers // 8) * 8 * size.threads <= REGISTERS, (element, size, registers)
    assert {size.variant for size in sizes()} == {name[1] for name in found if isinstance(name, tuple)}


@pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")
def test_each_hidden_size_has_a_variant_that_fits_each_gpu():
    for capability, most in SHARED_MEMORY.items():
        fits = {
            size.hidden
            for size in sizes()
            if size.shared <= most and (size.variant.exchange == "global" or (capability >= 90 and size.members <= 16))
        }
        assert fits == {size.hidden for size in sizes()}


@pytest.mark.skipif(sys.platform != "linux" or shutil.which(CXX) is None, reason="needs Linux and a C++ compiler")
@pytest.mark.slow
def test_kernel_on_an_emulated_gpu(tmp_path):
    done = subprocess.run([compile_emulated("lstm", tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == 7


def test_a_missing_module_is_recorded_with_its_reason(monkeypatch):
    def fail(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(_extension, "problems", {})
    monkeypatch.setattr(_extension, "import_module", fail)
    _extension.load()
    assert _extension.problems["fastkd._C_cuda"] == "no fastkd._C_cuda here"
