"""ROUGE-L of responses."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over responses, from 0 to 100, of the largest ROUGE-L F-measure over each one's references.

    It is that of the ``rouge-score`` package, with its stemmer.

    Raises:
        ImportError: the package is not installed.
        ValueError: no responses, or one without references.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"ROUGE needs rouge-score: pip install 'fastkd[generation]' ({error})") from error
    if not responses or len(responses) != len(references) or not all(references):
        raise ValueError(
            f"there are {len(responses)} responses, {len(references)} lists of references and "
            f"{sum(not of for of in references)} empty ones of these; each response needs at least one reference"
        )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best: list[float] = [
        max(scorer.score(reference, response)["rougeL"].fmeasure for reference in of)
        for response, of in zip(responses, references, strict=True)
    ]
    return 100 * sum(best) / len(best)
