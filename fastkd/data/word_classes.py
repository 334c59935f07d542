"""Word classes from the texts themselves, where no tagger of parts of speech is at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Tagger = Callable[[list[str]], list[str]]
"""From the words of a text to a tag for each."""

_LEAST = 5  # occurrences of a word whose neighbours say something
_NEIGHBOURS = 250
_DIMENSIONS = 50


def induce_word_classes(texts: Sequence[list[str]], *, classes: int = 45, seed: int = 0) -> Tagger:
    """A tagger that stands in for one of parts of speech: words with like neighbours get one tag.

    After Schütze, "Distributional Part-of-Speech Tagging" (EACL 1995), in its simplest form: a word, whatever its
    case, is described by how often each of the 250 commonest words, or an end of the text, stands to its left and
    to its right; of the square roots of these counts, scaled to unit length, 50 singular vectors are clustered by
    k-means. A word met fewer than five times is tagged by its last two letters. Numbers and settings are choices
    of this project. The same texts and seed give the same tags.

    Args:
        texts: the words of each text.
        classes: number of clusters; 45 is that of the Penn Treebank's tags.
    """
    from scipy.sparse import hstack
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    end = ""  # between two texts
    words = [word.lower() for text in texts for word in (end, *text)]
    frequent = [word for word, count in Counter(words).most_common() if count >= _LEAST]
    if len(frequent) <= 2:
        return lambda text: [_suffix(word) for word in text]
    numbers = {word: number for number, word in enumerate(frequent)}
    ids = np.array([numbers.get(word, len(frequent)) for word in words])
    sides = [_count(ids[1:], ids[:-1], len(frequent)), _count(ids[:-1], ids[1:], len(frequent))]
    described = normalize(hstack(sides, "csr").sqrt())
    reduce = TruncatedSVD(min(_DIMENSIONS, len(frequent) - 1), random_state=seed)
    points = reduce.fit_transform(described)
    distinct = len(np.unique(points.round(4), axis=0))
    cluster = KMeans(min(classes, distinct), random_state=seed, n_init=3)
    tags = [f"class {number}" for number in cluster.fit_predict(points)]
    tag_of = dict(zip(frequent, tags, strict=True))
    return lambda text: [tag_of.get(word.lower()) or _suffix(word) for word in text]


def _count(words: npt.NDArray[Any], neighbours: npt.NDArray[Any], size: int) -> csr_matrix:
    """(size, at most ``_NEIGHBOURS``): how often each frequent word has each of the commonest as its neighbour."""
    from scipy.sparse import csr_matrix

    commonest = min(size, _NEIGHBOURS)
    kept = (words < size) & (neighbours < commonest)
    return csr_matrix((np.ones(kept.sum()), (words[kept], neighbours[kept])), (size, commonest))


def _suffix(word: str) -> str:
    return f"-{word.lower()[-2:]}"
