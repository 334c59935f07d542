"""Compiles the CUDA C++ for GPUs that are not there and reports what its kernels take of each multiprocessor.

As a program it prints the table of docs/bilstm.md: ``python tests/cuda_compile.py``.
"""

import re
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CXX = (sysconfig.get_config_var("CXX") or "c++").split()[0]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a thread block may have, by compute capability."""


class Variant(NamedTuple):
    chunks: int
    parts: int
    tiles: int
    exchange: str


class Size(NamedTuple):
    """What the source alone says of a variant at a hidden size."""

    hidden: int
    variant: Variant
    members: int  # thread blocks of a group
    threads: int
    shared: int  # bytes


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes of local memory of a thread
    spills: int


def compile_emulated(program: str, folder: Path, sources: Path = ROOT / "csrc") -> Path:
    """A program of tests/cuda, in which the CPU plays the GPU."""
    binary = folder / program
    flags = ["-std=c++20", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Itests/cuda", f"-I{sources}"]
    subprocess.run([CXX, *flags, f"tests/cuda/{program}.cpp", "-o", str(binary)], cwd=ROOT, check=True)
    return binary


@cache
def sizes() -> list[Size]:
    with tempfile.TemporaryDirectory() as folder:
        binary = compile_emulated("sizes", Path(folder))
        lines = subprocess.run([binary], check=True, capture_output=True, text=True).stdout.splitlines()
    found = []
    for line in lines:
        hidden, chunks, parts, tiles, exchange, *rest = line.split()
        members, threads, shared = map(int, rest)
        variant = Variant(int(chunks), int(parts), int(tiles), exchange)
        found.append(Size(int(hidden), variant, members, threads, shared))
    return found


@cache
def resources(capability: int) -> dict[tuple[str, Variant] | str, Resources]:
    """By element type and variant, other kernels by name."""
    include = Path(torch.__file__).parent / "include"
    target = f"arch=compute_{capability},code=sm_{capability}"
    flags = ["-std=c++20", "-O3", "-Icsrc", f"-I{include}", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    with tempfile.TemporaryDirectory() as folder:
        output = ["-cubin", "-o", f"{folder}/bilstm.cubin", "csrc/cuda/bilstm.cu"]
        command = [str(NVCC), *flags, "-gencode", target, "--resource-usage", *output]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = {}
    for entry in done.stderr.split("Compiling entry function '")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if numbers is None or registers is None:
            raise RuntimeError(f"no resource usage in: {entry}")
        found[_name(entry)] = Resources(int(registers[1]), int(numbers[1]), int(numbers[2]))
    return found


def _name(mangled: str) -> tuple[str, Variant] | str:
    shape = re.search(r"5ShapeINS0_\d+(\w+?)ELi(\d+)ELi(\d+)ELi(\d+)E.*?(Cluster|Global)Exchange", mangled)
    if shape is None:
        return mangled.split("'")[0]
    element, chunks, parts, tiles, exchange = shape.groups()
    return element, Variant(int(chunks), int(parts), int(tiles), exchange.lower())


def table() -> list[str]:
    lines = [
        "| hidden | exchange | blocks of a group | sequences | threads | shared memory, KiB | 8.0 | 9.0 | 10.0 |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in sizes():
        variant = size.variant
        cells = [
            ""
            if variant.exchange == "cluster" and capability < 90
            else resources(capability)["Half", variant].registers
            for capability in SHARED_MEMORY
        ]
        figures = (size.hidden, variant.exchange, size.members, 8 * variant.tiles, size.threads)
        lines.append("| " + " | ".join(map(str, (*figures, f"{size.shared / 1024:.1f}", *cells))) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
