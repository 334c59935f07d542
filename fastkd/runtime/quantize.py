"""Weights as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np


def quantize(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Symmetric int8 with one float32 scale per row: max |row| / 127, or 1 for a row of zeros."""
    largest = np.abs(rows).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(rows / scale[:, None]).astype(np.int8), scale
