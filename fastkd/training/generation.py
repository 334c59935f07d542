"""Sampling responses from a decoder, and their ROUGE-L."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastkd.data.batches import padding_id
from fastkd.data.instructions import cut_prompt
from fastkd.data.rouge import rouge_l

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SEEDS = (10, 20, 30, 40, 50)


class Rouge(NamedTuple):
    """ROUGE-L from 0 to 100."""

    mean: float
    of_seeds: list[float]


def rouge_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    max_prompt_length: int = 256,
    **sampling: Any,
) -> Rouge:
    """ROUGE-L of sampled responses to instructions, the mean over the seeds and that of each.

    Args:
        dataset: of ``load_instructions``; every row needs a reference.
        max_prompt_length: see ``cut_prompt``.
        **sampling: see ``generate_responses``.
    """
    if missing := sum(not references for references in dataset["references"][:]):
        raise ValueError(f"{missing} rows of dataset have no reference to compare with")
    prompts = [cut_prompt(row, tokenizer, max_prompt_length) for row in dataset]
    responses = generate_responses(model, tokenizer, prompts, **sampling)
    of_seeds = [rouge_l(some, dataset["references"][:]) for some in responses]
    return Rouge(sum(of_seeds) / len(of_seeds), of_seeds)


@torch.no_grad()
def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = SEEDS,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> list[list[str]]:
    """One sampled response per seed and prompt, as text without special tokens.

    The draws for a prompt depend on the seed and on the prompt's place in ``prompts`` alone, so that the batch size
    changes nothing but rounding. They differ between kinds of device.

    Args:
        model: a decoder; it is in evaluation mode meanwhile.
        prompts: texts, such as ``fastkd.data.instructions.prompt_of`` makes.
        seeds: one list of responses is returned for each.
        temperature: divides the logits.
        top_p: tokens are drawn from the most likely ones that together have this probability.
        top_k: … and from at most so many; 0 for all, 1 for the most likely token.
        max_new_tokens: of a response; by default what 512 tokens leave after a prompt of 256.
        batch_size: prompts that are answered together.

    Raises:
        ValueError: an argument out of range, a tokenizer without an EOS token, or a prompt that leaves no room for
            the response among the model's positions.
    """
    warpers = _warpers(temperature, top_p, top_k)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no EOS token, at which a response ends; set tokenizer.eos_token")
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    _check_room(model, max(map(len, rows), default=0), max_new_tokens)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": padding_id(tokenizer)}
    config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, **ids)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    responses = [[""] * len(rows) for _ in seeds]
    was_training, generate = model.training, cast(Callable[..., Tensor], model.generate)
    own = model.generation_config  # would decide whatever ``config`` does not state
    model.generation_config = config
    model.eval()
    try:
        with tqdm(desc="responses", total=len(rows) * len(seeds)) as bar:
            for seed, texts in zip(seeds, responses, strict=True):
                for batch in batches:
                    inputs = _left_padded([rows[index] for index in batch], padding_id(tokenizer), model.device)
                    noise = GumbelNoise(seed, batch, model.device)
                    processors = LogitsProcessorList([*warpers, noise])
                    made = generate(**inputs, generation_config=config, logits_processor=processors)
                    for index, ids in zip(batch, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                        texts[index] = _text(ids, tokenizer)
                    bar.update(len(batch))
    finally:
        model.train(was_training)
        model.generation_config = own
    return responses


class GumbelNoise(LogitsProcessor):
    """Makes the largest logit of a row a draw from its softmax, by a generator of the row's own."""

    def __init__(self, seed: int, rows: Sequence[int], device: torch.device) -> None:
        mixed = [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in rows]
        self.generators = [torch.Generator(device).manual_seed(state) for state in mixed]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        # Exponential draws are multiples of about 2⁻²⁴ near 0; a draw of 0 itself would win against any logit.
        return scores.float() - noise.clamp(min=2**-25).log()


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True))


def _warpers(temperature: float, top_p: float, top_k: int) -> list[LogitsProcessor]:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (top_k=1 takes the most likely token)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 0, which means all tokens")
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _check_room(model: PreTrainedModel, longest: int, new: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest + new > positions:
        raise ValueError(
            f"max_new_tokens is {new}, and the longest prompt has {longest} tokens; together they must not exceed the "
            f"model's {positions} positions"
        )
