"""The house itself: cheap import, the stem as address, a clean binary, honest fallbacks."""

import logging
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastkd import ops
from fastkd.ops import _extension
from fastkd.runtime.extension import compiled

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/", env=ENVIRONMENT | environment
    ).stdout


def test_import_loads_neither_torch_nor_transformers():
    loaded = python("import fastkd, sys; dir(fastkd); print(*sys.modules)").split()
    assert "fastkd" in loaded
    assert not {"torch", "transformers", "datasets", "numpy"} & set(loaded)


def test_public_names_resolve():
    import fastkd

    for name in fastkd.__all__:
        assert getattr(fastkd, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fastkd.no_such_name


def test_kernels_folder_never_shadows_another_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastkd" / "kernels").resolve() == ROOT / "kernels"


def test_every_program_id_is_widened_before_it_becomes_an_offset():
    for path in (ROOT / "kernels").glob("*.py"):
        narrow = re.findall(r"tl\.program_id\([^)]*\)(?!\.to\(tl\.int64\))", path.read_text())
        assert not narrow, f"{path.name}: {narrow}"


COMPOSED = ("linear_kl_div", "linear_topk_kl_div")
"""Ops without kernels of their own: matrix products of torch around another op's."""


@pytest.mark.parametrize("op", ops.__all__)
def test_the_stem_is_the_address(op):
    layers = ("fastkd/losses", "fastkd/reference", "fastkd/ops", "benchmarks")
    kernels = () if op in COMPOSED else (f"kernels/{op}.py", f"csrc/cpu/{op}.cpp")
    if op == "bilstm":  # inference, and its GPU kernel is CUDA C++
        layers, kernels = layers[1:], (f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu")
    page = f"docs/{op.removeprefix('embedding_')}.md"
    for path in (*(f"{layer}/{op}.py" for layer in layers), *kernels, f"tests/test_{op}.py", page):
        assert (ROOT / path).is_file(), path


def test_module_tells_what_is_built():
    text = subprocess.run(
        [sys.executable, "-m", "fastkd"], check=True, capture_output=True, text=True, env=ENVIRONMENT
    ).stdout
    expected = "cpu" if _extension.fused_backend("cpu")[0] else "reference"
    assert re.search(rf"kl_div\s+cpu\s+{expected}", text)


@pytest.mark.skipif("fastkd._C" in _extension.problems, reason="the compiled module is not built")
def test_binary_uses_the_stable_abi_alone():
    for binary in (ROOT / "fastkd").glob("_C*.so"):
        command = ["nm", "-D", "-C", "--undefined-only", binary]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "aoti_torch" in symbols, binary.name
        assert not re.findall(r"\b(?:c10|at)::", symbols), binary.name


def test_a_compiled_module_of_another_version_is_refused():
    with pytest.raises(ImportError, match="another version"):
        _extension.define("kl_div", "(Tensor student) -> Tensor")


@pytest.fixture
def nothing_built(monkeypatch):
    monkeypatch.setattr(_extension, "problems", {"fastkd._C": "not built here"})
    monkeypatch.setattr(_extension, "_chosen", {})


def test_without_kernels_the_reference_answers_and_says_so_once(nothing_built, caplog):
    from fastkd.losses import kl_div

    student, teacher = torch.randn(2, 4, 9).unbind()
    with caplog.at_level(logging.WARNING, "fastkd"):
        losses = [kl_div(student, teacher) for _ in range(2)]
    assert len(caplog.records) == 1
    assert "not built here" in caplog.text
    assert torch.allclose(losses[0], kl_div(student.double(), teacher.double()).float())


def test_strict_mode_raises_instead(nothing_built, monkeypatch):
    monkeypatch.setenv("FASTKD_STRICT", "1")
    with pytest.raises(RuntimeError, match="not built here"):
        _extension.backend("kl_div", "cpu", torch.float32)


def test_backend_variable(nothing_built, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTKD_BACKEND"):
        _extension.backend("kl_div", "cpu", torch.float32)
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    assert _extension.backend("kl_div", "cpu", torch.float32) == "reference"


def test_an_unknown_cpu_target_is_refused(monkeypatch):
    monkeypatch.setenv("FASTKD_CPU_TARGET", "avx512-no-vnii")
    for call in (lambda: _extension._choose("kl_div", "cpu", torch.float32), compiled):
        with pytest.raises(ValueError, match=r"FASTKD_CPU_TARGET must be one of baseline, .*got 'avx512-no-vnii'"):
            call()


def test_an_unknown_build_is_refused():
    for build, message in (("fast", "must be one of"), ("cuda", "CUDA")):
        done = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=ROOT,
            env=os.environ | {"FASTKD_BUILD": build},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert message in done.stderr


def test_a_build_names_what_it_lacks(tmp_path):
    (tmp_path / "pybind11.py").write_text("raise ImportError('no pybind11 here')")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"FASTKD_BUILD": "cpu", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "needs torch and pybind11 to build (no pybind11 here)" in done.stderr


def test_an_nvcc_of_another_cuda_is_left_alone(tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    script = (
        "import sys, types, torch\n"
        "torch.version.cuda = sys.argv[2]\n"
        "import setuptools\nsetuptools.setup = lambda **_: None\n"
        "from setup import cuda_problem\n"
        "print(cuda_problem(types.SimpleNamespace(CUDA_HOME=sys.argv[1])))\n"
    )
    for cuda, problem in (("13.0", "is of CUDA 12, but torch"), ("12.8", "None")):
        command = [sys.executable, "-c", script, str(tmp_path), cuda]
        environment = os.environ | {"FASTKD_BUILD": "none"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert problem in done.stdout


@pytest.mark.parametrize("module", sorted(path.stem for path in Path(__file__).parent.glob("test_mutants*.py")))
def test_every_mutant_fits_the_code(module):
    for name, (file, old, _) in import_module(module).MUTANTS.items():
        path = ROOT / file if "/" in file else ROOT / "csrc" / "cuda" / file
        assert path.read_text(encoding="utf-8").count(old) == 1, name
