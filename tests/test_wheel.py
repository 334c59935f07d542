"""What users install: the wheel made from the sdist, and the runtime with nothing but what it needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from runtime_samples import save_student
from subprocesses import ROOT

from fastkd.students.export import export_student

RUNTIME_NEEDS = ("numpy", "tokenizers", "safetensors")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's content, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, "--sdist", str(folder / "source")], check=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    subprocess.run([*build, "--wheel", str(unpacked)], check=True)
    (made,) = folder.glob("*.whl")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}-cp" in made.name  # _runtime is bound to one Python
    with zipfile.ZipFile(made) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_sdist_to_wheel_to_import_elsewhere(wheel, tmp_path):
    packed = {str(path.relative_to(wheel)) for path in wheel.rglob("*")}
    assert "fastkd/kernels/kl_div.py" in packed
    assert [name for name in packed if name.startswith("fastkd/_C.abi3")]
    assert [name for name in packed if name.startswith("fastkd/_runtime.")]
    assert not packed & {"kernels", "tests", "benchmarks"}
    code = "import torch; from fastkd.losses import kl_div; x = torch.randn(2, 9); assert kl_div(x, x) == 0"
    environment = os.environ | {"PYTHONPATH": str(wheel), "FASTKD_STRICT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("source", ["tree", pytest.param("wheel", marks=pytest.mark.slow)])
def test_an_environment_without_torch_serves_a_student(source, request, tmp_path):
    export_student(save_student(tmp_path / "model"), tmp_path / "student", precision="int8")
    venv.create(tmp_path / "bare")
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_paths()["platlib"])
    for name in RUNTIME_NEEDS:
        for path in (installed / name, installed / f"{name}.libs"):
            if path.exists():
                (site / path.name).symlink_to(path)
    package = ROOT if source == "tree" else request.getfixturevalue("wheel")
    (site / "fastkd").symlink_to(package / "fastkd")
    predict = "import sys; from fastkd.cli import main; sys.exit(main())"
    command = [tmp_path / "bare/bin/python", "-I", "-c", predict, "predict", tmp_path / "student", "--task", "a"]
    done = subprocess.run(command, input="the good film\n", cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"label"' in done.stdout
    code = (
        "import importlib.util as u; print([n for n in ('torch', 'transformers', 'huggingface_hub') if u.find_spec(n)])"
    )
    assert subprocess.run([command[0], "-I", "-c", code], capture_output=True, text=True).stdout == "[]\n"
