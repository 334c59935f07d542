"""The variable that lowers the instruction set of the compiled parts, which read it themselves."""

import os

VARIABLE = "FASTKD_CPU_TARGET"
TARGETS = ("baseline", "avx2-no-vnni", "avx2", "avx512-no-vnni", "avx512-no-bf16", "avx512-no-amx", "avx512")


def check_cpu_target() -> None:
    """Raises ``ValueError`` for a value that they would take for the best that the CPU has."""
    target = os.environ.get(VARIABLE)
    if target is not None and target not in TARGETS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(TARGETS)}, got {target!r}")
