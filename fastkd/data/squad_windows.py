"""Questions with their contexts as windows of tokens, for models that mark the answer's first and last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastkd.data.encode import INPUTS, tells_apart, token_types

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CHAR_STARTS, CHAR_ENDS = "char_starts", "char_ends"

Array = npt.NDArray[Any]


def encode_squad(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 384,
    doc_stride: int = 128,
    max_question_length: int = 64,
) -> Dataset:
    """Windows ``[CLS] question [SEP] part of the context [SEP]`` that together cover every context, in their order.

    Columns: ``input_ids``, ``attention_mask``, ``token_type_ids`` (made here when the tokenizer tells nothing apart);
    ``start_positions`` and ``end_positions``, the first and the last token of the question's first answer, or 0,
    the [CLS] token, where the window does not hold it whole; ``char_starts`` and ``char_ends``, where each token's
    characters begin and end in the context, −1 for tokens outside it; ``question``, the question's place in
    ``dataset``; ``row``, the window's place here; ``length`` in tokens.

    Args:
        dataset: of ``load_squad``.
        tokenizer: a fast one that puts [CLS] first and pads on the right.
        max_length: tokens of a window.
        doc_stride: tokens that a window shares with the one before it.
        max_question_length: a longer question keeps its first so many tokens.
    """
    taken = max_question_length + tokenizer.num_special_tokens_to_add(pair=True)
    if not taken + doc_stride < max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}; it must be more than {taken + doc_stride}, what question, special tokens "
            f"and doc_stride take, and at most {tokenizer.model_max_length}, what the model takes"
        )
    _check_tokenizer(tokenizer)
    made_here = not tells_apart(tokenizer)

    def windows(rows: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, Any]:
        encoding = tokenizer(
            _shorten(rows["question"], tokenizer, max_question_length),
            rows["context"],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        places = encoding["overflow_to_sample_mapping"]
        if made_here:
            encoding["token_type_ids"] = [token_types(encoding.sequence_ids(i)) for i in range(len(places))]
        columns: dict[str, list[Any]] = {name: encoding[name] for name in INPUTS}
        made = [_window(encoding, i, rows["answers"][of]) for i, of in enumerate(places)]
        columns |= {name: [window[name] for window in made] for name in made[0]}
        columns["question"] = [indices[of] for of in places]
        columns["length"] = [len(ids) for ids in encoding["input_ids"]]
        return columns

    encoded = dataset.map(
        windows, batched=True, with_indices=True, remove_columns=dataset.column_names, desc="tokenise questions"
    )
    return encoded.add_column("row", list(range(len(encoded))))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            "tokenizer is a slow one; it must be fast, since only these tell where a token's characters are"
        )
    ids = tokenizer("a", "b")["input_ids"]
    if tokenizer.cls_token_id is None or ids[0] != tokenizer.cls_token_id or tokenizer.padding_side != "right":
        raise ValueError("tokenizer must put a [CLS] token first, the mark of no answer, and pad on the right")


def _shorten(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """The questions without the white space before them, each cut to its first tokens."""
    stripped = [question.lstrip() for question in questions]
    offsets = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cuts = [len(text) if len(of) <= longest else of[longest - 1][1] for text, of in zip(stripped, offsets, strict=True)]
    return [text[:cut] for text, cut in zip(stripped, cuts, strict=True)]


def _window(encoding: Any, index: int, answers: Mapping[str, list[Any]]) -> dict[str, Any]:
    """What a window's columns hold beside its tokens."""
    sequences = encoding.sequence_ids(index)
    in_context = np.array([sequence == 1 for sequence in sequences])
    offsets = np.asarray(encoding["offset_mapping"][index], np.int32)
    starts, ends = (np.where(in_context, column, np.int32(-1)) for column in offsets.T)
    first, last = _token_span(starts, ends, np.flatnonzero(in_context), answers)
    return {
        CHAR_STARTS: starts,
        CHAR_ENDS: ends,
        "start_positions": first,
        "end_positions": last,
    }


def _token_span(starts: Array, ends: Array, context: Array, answers: Mapping[str, list[Any]]) -> tuple[int, int]:
    """First and last token of the first answer; 0 and 0 where there is none, or not all of it here."""
    if not answers["text"] or not len(context):
        return 0, 0
    text, start = answers["text"][0], answers["answer_start"][0]
    begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    if begin < starts[context[0]] or end > ends[context[-1]]:
        return 0, 0
    first = int(np.searchsorted(ends[context], begin, side="right"))
    last = int(np.searchsorted(starts[context], end, side="left")) - 1
    return int(context[first]), int(context[max(first, last)])
