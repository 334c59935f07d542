"""Variants of training texts that a teacher labels, in the manner of Tang et al. (arXiv 1903.12136)."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastkd.data.task import UNLABELLED, Task
from fastkd.data.word_classes import Tagger, induce_word_classes

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST_NGRAM = 5
BOTH_SIDES = 1 / 3  # of a pair

Tagged = list[tuple[str, str]]  # words with their tags


def augment(
    rows: Dataset,
    task: Task,
    *,
    copies: int | None = None,
    p_mask: float = 0.1,
    p_pos: float = 0.1,
    p_ngram: float = 0.25,
    tagger: Tagger | None = None,
    mask_token: str = "[MASK]",
    seed: int = 0,
) -> Dataset:
    """Unlabelled variants of the rows, with the rows' columns.

    Each word, what stands between white space, is replaced by ``mask_token`` with probability ``p_mask``, and by
    another of the same part of speech, drawn as often as it occurs in the rows, with ``p_pos``. Then, with
    ``p_ngram``, one to five neighbouring words are all that is kept. Of a pair one side changes, or both with
    probability 1/3. What equals a text of the rows or another variant, or has a side of mask tokens alone, is dropped.

    Args:
        rows: as ``load_task`` gives them.
        copies: variants to try per row; by default 20, or 10 of a pair, as in the authors' code.
        p_mask, p_pos: the defaults are those of the authors' code.
        p_ngram: the code has 0; 0.25 is the paper's as we recall it.
        tagger: from the words of a text to their parts of speech; ``induce_word_classes`` of the rows by default.

    Returns:
        Rows numbered from the largest ``row`` + 1; ``label`` is −1, or NaN for a regression. The same rows, tagger
        and seed give the same variants.

    Raises:
        ValueError: a probability is not from 0 to 1, p_mask + p_pos is above 1, or copies is below 1.
    """
    from datasets import Dataset
    from tqdm import tqdm

    for name, p in {"p_mask": p_mask, "p_pos": p_pos, "p_ngram": p_ngram, "p_mask + p_pos": p_mask + p_pos}.items():
        if not 0 <= p <= 1:
            raise ValueError(f"{name} is {p}; it must be from 0 to 1")
    if copies is not None and copies < 1:
        raise ValueError(f"copies is {copies}; it must be at least 1")
    examples = _tagged(rows, task, tagger, seed)
    generator = random.Random(seed)
    vary = _varier(examples, p_mask, p_pos, p_ngram, mask_token, generator)
    seen = {tuple(_join(side) for side in example) for example in examples}
    kept: list[tuple[str, ...]] = []
    for example in tqdm(examples, desc=f"augment {task.name}", unit="row"):
        for _ in range(copies or (20 if len(task.columns) == 1 else 10)):
            changed = _sides(len(example), generator)
            variant = tuple(vary(side) if i in changed else _join(side) for i, side in enumerate(example))
            if variant not in seen and all(variant):
                seen.add(variant)
                kept.append(variant)
    columns: dict[str, Any] = {column: [texts[i] for texts in kept] for i, column in enumerate(task.columns)}
    first = max(rows["row"][:], default=-1) + 1
    columns["label"] = [math.nan if task.is_regression else UNLABELLED] * len(kept)
    columns["row"] = list(range(first, first + len(kept)))
    return Dataset.from_dict(columns, features=rows.features)


def _tagged(rows: Dataset, task: Task, tagger: Tagger | None, seed: int) -> list[tuple[Tagged, ...]]:
    """Words and tags of the sides of each row."""
    sides = [[text.split() for text in rows[column][:]] for column in task.columns]
    tag = tagger or induce_word_classes([words for side in sides for words in side], seed=seed)
    tagged = [[list(zip(words, tag(words), strict=True)) for words in side] for side in sides]
    return list(zip(*tagged, strict=True))


def _varier(
    examples: list[tuple[Tagged, ...]],
    p_mask: float,
    p_pos: float,
    p_ngram: float,
    mask_token: str,
    generator: random.Random,
) -> Callable[[Tagged], str]:
    """Makes a variant of a text, empty if nothing but mask tokens is left."""
    alike: dict[str, list[str]] = defaultdict(list)  # with repetitions: a draw is as frequent as the word
    for example in examples:
        for side in example:
            for word, tag in side:
                alike[tag].append(word)

    def replace(word: str, tag: str) -> str:
        chance = generator.random()
        if chance < p_mask:
            return mask_token
        return generator.choice(alike[tag]) if chance < p_mask + p_pos else word

    def vary(text: Tagged) -> str:
        words = [replace(word, tag) for word, tag in text]
        if words and generator.random() < p_ngram:
            length = generator.randint(1, min(LONGEST_NGRAM, len(words)))
            start = generator.randint(0, len(words) - length)
            words = words[start : start + length]
        return " ".join(words) if set(words) != {mask_token} else ""

    return vary


def _sides(count: int, generator: random.Random) -> set[int]:
    """Which sides of a row change."""
    if count == 1 or generator.random() < BOTH_SIDES:
        return set(range(count))
    return {generator.randrange(count)}


def _join(text: Tagged) -> str:
    return " ".join(word for word, _ in text)
