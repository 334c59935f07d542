"""Instructions and responses: reading them, the prompt around them, and rows of tokens to fine-tune a decoder on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.data.batches import IGNORED
from fastkd.data.files import json_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".jsonl.gz")

_TASK = "Below is an instruction that describes a task"
_WISH = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
PROMPT = _TASK + ". " + _WISH + "{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = (
    _TASK + ", paired with an input that provides further context. " + _WISH
    + "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)  # fmt: skip
"""Alpaca's template and a line break."""


def load_instructions(path: str | Path) -> Dataset:
    """The rows of a .jsonl or .jsonl.gz file with the columns ``instruction``, ``input`` and ``references``.

    A line of the file has an ``instruction``, or ``text``; an ``input``, or ``context``, which may be empty, null or
    missing; and an ``output``, or ``response``: a text or a list of them, which become ``references``. Without one the
    list is empty. ``instances``, pairs of ``input`` and ``output``, make a row each.

    Raises:
        ValueError: a file that is damaged or has no rows, or a line without an instruction or with something
            else than texts; names file and line.
    """
    from datasets import Dataset, Features, List, Value

    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"path is {path}; it must end in {' or '.join(SUFFIXES)}")
    rows = [row for number, line in json_rows(path) for row in _rows(line, f"{path}, line {number}")]
    if not rows:
        raise ValueError(f"{path} has no rows")
    features: dict[str, Any] = {"instruction": Value("string"), "input": Value("string")}
    return Dataset.from_list(rows, features=Features({**features, "references": List(Value("string"))}))


def prompt_of(instruction: str, context: str = "") -> str:
    """The text that a response continues. ``context`` is the row's ``input``."""
    return (
        PROMPT_WITH_INPUT.format(instruction=instruction, input=context)
        if context
        else PROMPT.format(instruction=instruction)
    )


def cut_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> str:
    """A row's prompt in at most ``max_prompt_length`` tokens. Where it is longer, the input loses its end, or without
    an input the instruction; the template stays whole.

    Raises:
        ValueError: what is left has no place for the input or instruction at all.
    """
    texts = {"instruction": row["instruction"], "context": row["input"]}
    field = "context" if row["input"] else "instruction"
    while (excess := len(tokenizer(prompt_of(**texts))["input_ids"]) - max_prompt_length) > 0:
        text = texts[field]
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # to the beginning of the first token too many: the token before it may end inside the same character
        texts[field] = text[: min(offsets[-excess][0], len(text) - 1)] if excess < len(offsets) else ""
        if not texts[field]:
            raise ValueError(
                f"max_prompt_length is {max_prompt_length}; the prompt of {row['instruction'][:40]!r} needs more"
            )
    return prompt_of(**texts)


def encode_instructions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 512, max_prompt_length: int = 256
) -> Dataset:
    """Rows of tokens, prompt then response then end of text, for a causal language model.

    Columns: ``input_ids``, ``attention_mask``, ``labels`` (−100 on the prompt, so that the loss is of the response and
    the end alone), ``row`` (the row's place in ``dataset``) and ``length`` in tokens. The response is the first of the
    references; where prompt and response exceed ``max_length``, it loses its end and with it the end of text.

    Args:
        dataset: of ``load_instructions``.
        max_prompt_length: see ``cut_prompt``.

    Raises:
        ValueError: a row without a reference, a tokenizer without an EOS token, or lengths that do not fit.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no EOS token, which ends a response; set tokenizer.eos_token")
    if not 0 < max_prompt_length < max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}; it must be more than max_prompt_length, which is {max_prompt_length}, and at "
            f"most {tokenizer.model_max_length}, what the model takes"
        )

    def tokenize(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        if not row["references"]:
            raise ValueError(f"row {index} has no response to learn: {row['instruction'][:40]!r}")
        prompt = tokenizer(cut_prompt(row, tokenizer, max_prompt_length))["input_ids"]
        response = tokenizer(row["references"][0], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (prompt + response)[:max_length]
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "row": index, "length": len(ids)}

    return dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names, desc="tokenise instructions")


def _rows(line: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    instruction = _text(line, ("instruction", "text"), where)
    if not instruction.strip():
        raise ValueError(f"{where}: the instruction is empty")
    instances = line.get("instances", [line])
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise ValueError(f"{where}: 'instances' must be a list of objects")
    for instance in instances:
        context = _text(instance, ("input", "context"), where, default="")
        yield {"instruction": instruction, "input": context, "references": _references(instance, where)}


def _references(instance: Mapping[str, Any], where: str) -> list[str]:
    found: Any = next((instance[name] for name in ("output", "response") if instance.get(name) is not None), [])
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where}: the output must be a text that is not empty, or a list of such, not {found!r}")
    return texts


def _text(fields: Mapping[str, Any], names: tuple[str, ...], where: str, default: str | None = None) -> str:
    text = next((fields[name] for name in names if fields.get(name) is not None), default)
    if not isinstance(text, str):
        wanted = " or ".join(repr(name) for name in names)
        raise ValueError(
            f"{where}: {wanted} is {'missing' if text is None else type(text).__name__}; it must be a text"
        )
    return text
