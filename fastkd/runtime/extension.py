"""The compiled module, or a word on how to get it."""

from __future__ import annotations

from typing import Any

from fastkd.cpu_target import check_cpu_target


def compiled() -> Any:
    """``fastkd._runtime``.

    Raises:
        ImportError: fastkd was installed without its compiled parts.
        ValueError: FASTKD_CPU_TARGET names no target.
    """
    check_cpu_target()
    try:
        from fastkd import _runtime
    except ImportError as error:
        raise ImportError(
            f"fastkd's runtime was not built ({error}): reinstall with a C++ compiler, without FASTKD_BUILD=none"
        ) from error
    return _runtime
