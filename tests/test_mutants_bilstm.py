"""Faults put into the recurrent kernel, each of which the emulated GPU must show."""

import shutil
import subprocess

import pytest
from cuda_compile import ROOT, compile_emulated

pytestmark = pytest.mark.slow

# What a mutant changes: file, old text, new text.
MUTANTS = {
    "nothing": ("lstm_step.h", "constexpr int kUnits = 8", "constexpr int kUnits = 8"),
    # What is where.
    "gates of a fragment exchanged": ("lstm_step.h", "[gate % 2 + i % 2 * 2]", "[gate % 2 * 2 + i % 2]"),
    "depth of an octet": ("lstm_step.h", "chunk % 2 * 4 + lane % 4;", "chunk % 2 * 4 + lane % 4 / 2;"),
    "banks": ("lstm_step.h", "(octet ^ ((row & 1) << 2 | (row >> 1 & 3)))", "octet"),
    "backward off by one": ("lstm_step.h", "length - 1 - step", "length - step"),
    "unit of a state": ("lstm_kernel.h", ".unit[at.lane / 4] =", ".unit[at.lane % 8] ="),
    "octet of a warp": ("exchange.h", "at.unit / 8 % 8", "at.unit / 16 % 8"),
    "only the first direction's weights": ("lstm_kernel.h", "if (at.direction != loaded)", "if (loaded < 0)"),
    "cells of the tile before": ("lstm_kernel.h", "cell[own][0] = cell[own][1] = 0;", "cell[own][0] = 0;"),
    "one part of the depth": ("lstm_kernel.h", "part < S::kParts; ++part", "part < 1; ++part"),
    "padding left as it was": ("lstm_kernel.h", "buffer[i] = Octet{};", "buffer[i].pair[0] |= 0;"),
    # Who waits for whom.
    "state of others not awaited": ("exchange.h", "wait_for_phase(&shared.filled[count % 2], count / 2 % 2);", ";"),
    "idle warps wait": ("exchange.h", "if (S::kParts > 1 || at.unit < task.hidden) ", ""),
    "one buffer": ("exchange.h", "return shared.hidden[count++ % 2];", "return shared.hidden[count++ % 1];"),
    "next tile too early": ("exchange.h", "receive(shared, task, at, 0);", "++count;"),
    "wrong number of bytes": ("exchange.h", "S::kRows * task.hidden * sizeof", "S::kRows * S::kDepth * sizeof"),
    "gates not awaited": ("lstm_kernel.h", "wait_for_copies<kStages - 1>();", "wait_for_copies<kStages>();"),
    "late copies": ("lstm_kernel.h", "    wait_for_copies<0>();  // of", "    // of"),
    "states of other lanes": ("lstm_kernel.h", "    __syncwarp();\n    return fresh", "    return fresh"),
    "parts not awaited": ("lstm_kernel.h", "    }\n    __syncthreads();\n", "    }\n"),
    "sequences overwritten": ("lstm_kernel.h", "    __syncthreads();  // the tile before", "    // the tile before"),
    "arrival before the others": ("exchange.h", "    write();\n    __syncthreads();\n", "    write();\n"),
    "arrivals not awaited": ("exchange.h", "if (threadIdx.x == 0)\n      while", "while (false)\n      while"),
    "copies not awaited": ("exchange.h", "wait_for_copies<0>();\n    __syncthreads();", "__syncthreads();"),
    "others' copies not awaited": ("exchange.h", "copies<0>();\n    __syncthreads();", "copies<0>();"),
    # Raggedness.
    "written past the end": ("lstm_kernel.h", "if (step < sequence.length)", "if (step <= sequence.length)"),
    "order of equals": ("lstm_kernel.h", "(other == own && j < i)", "false"),
    "length beyond the tokens": ("lstm_kernel.h", "own < left ? own : left", "own"),
    "length below zero": ("lstm_kernel.h", "lengths[j] < 0 ? 0 : ", ""),
    "not the longest": ("lstm_kernel.h", "sequence.length > longest ? sequence.length : longest", "sequence.length"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(name, tmp_path):
    file, old, new = MUTANTS[name]
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "cuda", ignore=shutil.ignore_patterns("ptx.h"))
    path = tmp_path / "cuda" / file
    text = path.read_text()
    assert text.count(old) == 1, "the mutant no longer fits the code"
    path.write_text(text.replace(old, new))
    binary = compile_emulated("lstm", tmp_path, tmp_path)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == (name == "nothing"), f"{name}: wrong verdict\n{done.stdout}"
