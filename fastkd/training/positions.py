"""Whether a model has a position for every token of its rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastkd.data.encode import MultiTaskDataset
from fastkd.mixing import numbered_positions


def check_positions(model: nn.Module, rows: Iterable[Any]) -> None:
    """Raises ``ValueError`` for a model with fewer positions than the longest row has tokens.

    ``rows`` are datasets; of those without a column ``length`` nothing is known.
    """
    positions = positions_of(model)
    longest = max((length for some in rows for length in _lengths(some)), default=0)
    if positions is not None and longest > positions:
        kind = _config_of(model).model_type
        raise ValueError(f"a row has {longest} tokens, and the {kind} {positions} positions: lower max_length to that")


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a row of the model can have; None where there is no bound."""
    config = _config_of(model)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    for table in numbered_positions(model):  # as of RoBERTa, from the number after the pads' on
        positions = table.num_embeddings - (table.padding_idx or 0) - 1
    if not getattr(config, "position_biased_input", True):  # DeBERTa's distances have a bound, its positions none
        return None
    return positions


def _config_of(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return getattr(config, "encoder", config)


def _lengths(rows: Any) -> list[int]:
    parts = rows.datasets.values() if isinstance(rows, MultiTaskDataset) else [rows]
    known = [part["length"][:] for part in parts if "length" in getattr(part, "column_names", ())]
    return [length for lengths in known for length in lengths]
