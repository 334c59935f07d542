"""Batches of rows of tokens, padded on the right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that no loss is taken of."""


class PaddingCollator:
    """Pads columns of tokens to the longest row of the batch, and stacks columns of numbers.

    Gives an int64 tensor per column: (rows, longest) of those in ``pad_values``, which maps them to what fills them,
    and (rows,) of ``numbers``. Other columns of the rows stay out.
    """

    def __init__(self, pad_values: Mapping[str, int], numbers: Sequence[str] = ()) -> None:
        self.pad_values = dict(pad_values)
        self.numbers = tuple(numbers)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
            for name, value in self.pad_values.items()
        }
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in self.numbers}


def sample_batches(
    rows: Any, collate: Callable[[list[Any]], dict[str, Any]], count: int, batch_size: int = 16
) -> Iterator[dict[str, Any]]:
    """Batches of ``count`` of the rows at most, that torch's generator draws, as students are calibrated on."""
    drawn = torch.randperm(len(rows))[:count].tolist()
    for start in range(0, len(drawn), batch_size):
        yield collate([rows[index] for index in drawn[start : start + batch_size]])


def span_collator(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    """Batches of the windows of ``encode_squad``."""
    pads = {"input_ids": padding_id(tokenizer), "attention_mask": 0, "token_type_ids": 0}
    return PaddingCollator(pads, ("start_positions", "end_positions"))


def language_model_collator(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    """Batches of the rows of ``encode_instructions``."""
    return PaddingCollator({"input_ids": padding_id(tokenizer), "attention_mask": 0, "labels": IGNORED})


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a row: the tokenizer's own or, as decoders often have none, that of the end of a text.

    Attention masks and labels leave the filled places out, so that a row still ends with an end of text to be learned.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "tokenizer has neither a pad token nor an EOS token; set tokenizer.pad_token before making batches"
    )
