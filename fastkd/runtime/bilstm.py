"""One bidirectional LSTM layer, for a model that is no student of fastkd's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkd.runtime.extension import compiled
from fastkd.runtime.quantize import quantize

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
DIRECTIONS = {"forward": "_l0", "backward": "_l0_reverse"}
"""And how torch.nn.LSTM ends the names of their weights."""


class BiLSTM:
    """A bidirectional layer with the weights of ``torch.nn.LSTM(I, H, bidirectional=True)``, from packed copies.

    ``weights`` are arrays by torch's names: ``weight_ih_l0`` (4H, I), ``weight_hh_l0`` (4H, H), ``bias_ih_l0`` and
    ``bias_hh_l0`` (4H), gates i, f, g, o, and the same with ``_reverse``. ``precision`` is that of
    ``fastkd export``: "float32"; "bfloat16", of the recurrent weights alone; or "int8", of weights and activations, the
    latter on a scale per row of x. ``threads`` is how many work on one call; with 1 none is ever started. Calls from
    several threads may overlap.

        layer = BiLSTM({name: tensor.numpy() for name, tensor in lstm.state_dict().items()})
        states = layer(x, lengths)

    Raises:
        ValueError: a weight is missing, unknown, of another shape, NaN or infinite; the precision or the threads are
            wrong.
        ImportError: fastkd was installed without its compiled parts.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], *, precision: str = "int8", threads: int = 1) -> None:
        found = {name: np.asarray(array, np.float32) for name, array in weights.items()}
        arrays = {}
        self.input_size, self.hidden_size = _sizes(found)
        for direction, end in DIRECTIONS.items():
            for part, source in (("input", "weight_ih"), ("recurrent", "weight_hh")):
                columns = self.input_size if part == "input" else self.hidden_size
                matrix = _take(found, source + end, 4 * self.hidden_size, columns)
                name = f"{direction}.{part}"
                if precision == "int8":
                    arrays[name], arrays[f"{name}.scale"] = quantize(matrix)
                else:
                    arrays[name] = matrix
            biases = [_take(found, bias + end, 4 * self.hidden_size) for bias in ("bias_ih", "bias_hh")]
            arrays[f"{direction}.bias"] = biases[0] + biases[1]
        if unknown := found.keys() - {name + end for name in NAMES for end in DIRECTIONS.values()}:
            raise ValueError(f"weights: {min(unknown)} belongs to no bidirectional LSTM of one layer")
        self.precision = precision
        self._layer = compiled().Lstm(arrays, precision, self.input_size, self.hidden_size, threads)

    def __call__(self, x: NDArray[np.float32], lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Hidden states (tokens, 2H) float32, forward beside backward, of sequences that follow one another in x.

        ``x`` is (tokens, I) float32, ``lengths`` are the tokens of each sequence, at least 1: nothing is padded. A
        sequence gets the same bits alone, in any company and order, on any number of threads.

        Raises:
            TypeError: x is not float32, or lengths are no integers.
            ValueError: x has another shape, holds NaN or infinity, or lengths do not add up to its rows.
        """
        rows, counts = np.ascontiguousarray(x), np.asarray(lengths)
        if rows.dtype != np.float32:
            raise TypeError(f"x must be float32, got {rows.dtype}")
        if counts.size and counts.dtype.kind not in "iu":
            raise TypeError(f"lengths must be integers, got {counts.dtype}")
        states: NDArray[np.float32] = self._layer(rows, np.ascontiguousarray(counts, np.int64))
        return states


def _sizes(weights: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
    first = weights.get("weight_ih_l0")
    if first is None or first.ndim != 2 or first.shape[0] % 4 or not first.size:
        shape = "nothing" if first is None else f"shape {first.shape}"
        raise ValueError(f"weights: weight_ih_l0 must be (4 hidden, inputs), got {shape}")
    return first.shape[1], first.shape[0] // 4


def _take(weights: Mapping[str, NDArray[np.float32]], name: str, *shape: int) -> NDArray[np.float32]:
    array = weights.get(name)
    if array is None or array.shape != shape:
        raise ValueError(f"weights: {name} must be of shape {shape}, got {'nothing' if array is None else array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"weights: {name} holds NaN or infinity")
    return np.ascontiguousarray(array)
