"""Builds the compiled parts of fastkd. FASTKD_BUILD chooses them: auto (default), none, cpu or cuda."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

BUILDS = ("auto", "none", "cpu", "cuda")
TORCH_TARGET = "0x020a000000000000"  # LibTorch stable ABI of 2.10: the oldest torch the wheel runs on


def requested_build() -> str:
    build = os.environ.get("FASTKD_BUILD", "auto")
    if build not in BUILDS:
        sys.exit(f"FASTKD_BUILD={build!r} must be one of {', '.join(BUILDS)}")
    return build


def cuda_archs(cuda: str) -> str:
    """Where no GPU is at hand: a line of GPUs each; 8.0 serves all up to 8.9, PTX what is newer than the compiler."""
    return "8.0;9.0;10.0+PTX" if tuple(map(int, cuda.split("."))) >= (12, 8) else "8.0;9.0+PTX"


def extension(kind, name: str, sources: list[str], compile_args, macros=()):
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    return kind(
        name,
        sorted(sources),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *macros],
        extra_compile_args=compile_args,
        py_limited_api=not free_threaded,
    )


def runtime_extension(flags: list[str]):
    """Knows nothing of torch; its module is bound to one Python version, as everything that pybind11 makes."""
    import pybind11

    include = [os.path.abspath("csrc"), pybind11.get_include()]
    arguments = [*flags, "-pthread"]
    return Extension(
        "fastkd._runtime", sorted(glob("csrc/runtime/*.cpp")), include_dirs=include, extra_compile_args=arguments
    )


def cuda_problem(cpp_extension) -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    nvcc = cpp_extension.CUDA_HOME and shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
    if nvcc is None:
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is not None and version[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {version[1]}, but torch {torch.__version__} of {torch.version.cuda}"
    return None


def compiled_parts(build: str):
    if build == "none":
        return [], {}
    try:
        import pybind11  # noqa: F401
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"fastkd needs torch and pybind11 to build ({error}). Either let pip fetch them (pip install .), or run: "
            "pip install torch pybind11 ninja && pip install --no-build-isolation ."
        )
    standard = "-std=c++20"  # else it would depend on the torch at hand
    flags = [standard, "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-ffp-contract=off"]
    engine = [f"csrc/runtime/{name}.cpp" for name in ("lstm", "panels", "tanh")]  # which torch's op shares
    cpu_sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + engine
    modules = [extension(cpp_extension.CppExtension, "fastkd._C", cpu_sources, {"cxx": flags})]
    modules.append(runtime_extension(flags))
    problem = cuda_problem(cpp_extension) if build in ("auto", "cuda") else "not requested"
    if problem is None:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(torch.version.cuda))
        arguments = {"cxx": flags, "nvcc": [standard, "-O3"]}
        macros = [("USE_CUDA", None)]  # the stable ABI names a device's stream only then
        sources = glob("csrc/cuda/*.cu")
        modules.append(extension(cpp_extension.CUDAExtension, "fastkd._C_cuda", sources, arguments, macros))
    elif build == "cuda":
        sys.exit(f"FASTKD_BUILD=cuda was requested, but {problem}")
    print(f"fastkd: building {', '.join(m.name for m in modules)}; CUDA part: {problem or 'yes'}")
    return modules, {"build_ext": apart(cpp_extension.BuildExtension)}


def apart(build_extension):
    """Objects of each module in a folder of its own: two share sources, with other flags."""

    class BuildApart(build_extension):
        def finalize_options(self):
            super().finalize_options()
            self.parallel = None  # of modules; ninja works on the files of one

        def build_extension(self, ext):
            shared = self.build_temp
            self.build_temp = os.path.join(shared, ext.name)
            super().build_extension(ext)
            self.build_temp = shared

    return BuildApart


ext_modules, cmdclass = compiled_parts(requested_build())
setup(ext_modules=ext_modules, cmdclass=cmdclass)
