"""Sequence-level distillation: the teacher's own responses as the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from fastkd.data.instructions import cut_prompt
from fastkd.training.generation import generate_responses

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def teacher_responses(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    max_prompt_length: int = 256,
    seed: int = 10,
    **sampling: Any,
) -> Dataset:
    """The instructions with a response that the teacher sampled in place of their own.

    Fine-tuning on them with the labels alone is SeqKD (Kim and Rush, arXiv 1606.07947, with samples in place of beam
    search, as in MiniLLM's code); with ``KD(temperature=1.0)`` it is what the scripts of that code run by this name.

    Args:
        dataset: of ``load_instructions``. Rows to which the teacher says nothing are left out. A response that was cut
            at ``max_new_tokens`` is kept as if it ended there, a choice of this project.
        max_prompt_length: see ``cut_prompt``.
        seed: of the samples.
        **sampling: see ``generate_responses``.

    Raises:
        ValueError: the teacher says nothing to any row.
    """
    prompts = [cut_prompt(row, tokenizer, max_prompt_length) for row in dataset]
    (responses,) = generate_responses(teacher, tokenizer, prompts, seeds=(seed,), **sampling)
    said = [index for index, response in enumerate(responses) if response.strip()]
    if not said:
        raise ValueError(f"the teacher's responses to all {len(dataset)} instructions are empty")
    features = dataset.features
    kept = dataset.select(said).remove_columns("references")
    return kept.add_column("references", [[responses[index]] for index in said]).cast(features)
