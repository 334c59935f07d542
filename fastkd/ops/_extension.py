"""Loads the compiled module and settles which backend answers an op on a device."""

import logging
import os
from importlib import import_module
from importlib.util import find_spec

import torch

from fastkd.cpu_target import check_cpu_target

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What every op takes; float64 is left to the reference."""

logger = logging.getLogger("fastkd")
_chosen: dict[tuple[str, str, torch.dtype], str] = {}
problems: dict[str, str] = {}
"""Why a compiled part is missing, by module name; shown by ``python -m fastkd``."""


def load() -> None:
    """Import fastkd._C, which defines the compiled ops, and fastkd._C_cuda; keep the reason if one cannot be."""
    for name in ("fastkd._C", "fastkd._C_cuda"):
        try:
            import_module(name)
        except ImportError as error:
            problems[name] = str(error)
    if find_spec("triton") is None:
        problems["triton"] = "No module named 'triton'"


def define(name: str, schema: str) -> None:
    """Define the op unless the compiled module did; a compiled module of another version is refused."""
    defined = getattr(torch.ops.fastkd, name, None)
    if defined is None:
        torch.library.define(f"fastkd::{name}", schema)
        return
    expected = torch._C.parse_schema(f"fastkd::{name}{schema}")
    if defined.default._schema != expected:
        raise ImportError(
            f"the compiled fastkd._C belongs to another version of fastkd: it has {defined.default._schema}, "
            f"this version needs {expected}. Reinstall: pip install --force-reinstall --no-deps fastkd"
        )


def fused_backend(device_type: str, op: str | None = None) -> tuple[str | None, str]:
    """The fused backend for a device, or None, and the reason."""
    if device_type == "cpu":
        problem = problems.get("fastkd._C")
        return (None, f"fastkd._C is not built ({problem})") if problem else ("cpu", "fastkd._C")
    if device_type == "cuda" and op == "bilstm":
        problem = problems.get("fastkd._C_cuda")
        return (None, f"fastkd._C_cuda is not built ({problem})") if problem else ("cuda", "fastkd._C_cuda")
    if device_type == "cuda":
        problem = problems.get("triton")
        return (None, f"Triton is not installed ({problem})") if problem else ("triton", "Triton")
    return None, f"no kernels for device type {device_type!r}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def backend(op: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that answers ``op``; falls back to the reference with one warning, or raises under FASTKD_STRICT."""
    key = (op, device_type, dtype)
    if key not in _chosen:
        _chosen[key] = _choose(op, device_type, dtype)
    return _chosen[key]


def _choose(op: str, device_type: str, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "reference"
    forced = os.environ.get("FASTKD_BACKEND", "auto")
    if forced == "reference":
        return "reference"
    if forced != "auto":
        raise ValueError(f"FASTKD_BACKEND must be 'auto' or 'reference', got {forced!r}")
    check_cpu_target()
    name, reason = fused_backend(device_type, op)
    if name is not None:
        return name
    if os.environ.get("FASTKD_STRICT", "0") == "1":
        raise RuntimeError(
            f"{op} has no fused backend on {device_type}: {reason}; FASTKD_STRICT=1 forbids the reference"
        )
    logger.warning("%s runs in plain torch on %s: %s", op, device_type, reason)
    return "reference"


load()
