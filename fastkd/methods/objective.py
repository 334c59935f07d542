"""What the losses of distillation by features have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

from torch import Tensor, nn

from fastkd.data.batches import IGNORED
from fastkd.losses import kl_div, mse
from fastkd.losses.kl_div import Divergence
from fastkd.training.classifiers import task_loss
from fastkd.training.language_model import token_loss
from fastkd.training.taps import Attention, Features


class Batch(NamedTuple):
    """What an objective is called with beside the features: see :meth:`Objective.__call__`."""

    labels: Tensor
    mask: Tensor | None
    tokens: float | Tensor | None


Terms = Mapping[str, tuple[float, Callable[[], Tensor]]]


class Objective:
    """The loss of a method, usable in any training loop.

    ``needs_…`` tell whether it reads the teacher at all, the student's logits, and which features: see ``Features``.
    """

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_logits(self) -> bool:
        return True

    @property
    def needs_attention(self) -> bool:
        return False

    @property
    def needs_hidden(self) -> bool:
        return False

    @property
    def needs_maps(self) -> bool:
        return False

    @property
    def needs_weights(self) -> bool:
        return False

    @property
    def modules(self) -> list[str]:
        """Names of what a loop would have to train beside the student."""
        return [name for name, value in vars(self).items() if isinstance(value, nn.Module)]

    def at(self, progress: float) -> Objective:
        """The objective after that part, 0 to 1, of the training."""
        return self

    def __call__(
        self,
        student: Features,
        teacher: Features,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        tokens: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total and its unweighted parts by name.

        Args:
            student, teacher: features of one call each on the same tokens.
            labels: as many as the logits have rows: (B,) classes or scores of a regression, (B, 2) first and last
                token of a span, or (B, T) next tokens; ``IGNORED`` in the last two does not count.
            mask: (B, T), 0 at pads; None where there are none.
            tokens: what a mean over valid tokens divides by, in place of their number here: their number in all
                micro-batches and processes, for gradients that do not depend on the division into these.
        """
        return weighted_terms(self.terms(student, teacher, Batch(labels, mask, tokens)))

    def terms(self, student: Features, teacher: Features, batch: Batch) -> Terms:
        """Each part's weight and how it is computed. What a method defines, or else the call as a whole."""
        raise NotImplementedError


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, a mean over those that count; of one label per row as ``task_loss``."""
    return task_loss(logits, labels) if labels.dim() == 1 else token_loss(logits, labels)


def logit_loss(
    student: Features,
    teacher: Features,
    labels: Tensor,
    *,
    temperature: float,
    divergence: Divergence = "forward",
    beta: float = 0.5,
) -> Tensor:
    """T² · divergence of the logits, a mean over the rows that count; squared error of a regression.

    The divergence is KL(teacher ‖ student) unless another of ``kl_div`` is named.
    """
    mine, theirs = answers(student, teacher)
    if mine.shape[-1] == 1:
        return mse([mine], [theirs])[0]
    counts = counted(labels)
    loss = kl_div(mine, theirs, temperature=temperature, divergence=divergence, beta=beta, mask=counts)
    return cast(Tensor, loss)


def class_count(logits: Tensor, labels: Tensor) -> int:
    """What a mean over rows *and classes* divides by beside the rows.

    1 for tokens and spans: their candidates, of a span as many as a batch is wide, are no classes of a task. A choice
    of this project; the released codes that have such a mean are of texts with one label.
    """
    return logits.shape[-1] if labels.dim() == 1 else 1


def counted(labels: Tensor) -> Tensor | None:
    """Which rows of the logits count; None for all, as with one label per text."""
    return labels != IGNORED if labels.dim() > 1 else None


def answers(student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
    """The logits of both, once it is clear that they can be compared."""
    mine, theirs = answer(student), answer(teacher)
    if mine.shape != theirs.shape:
        raise ValueError(
            f"the teacher's logits have shape {tuple(theirs.shape)}, but the student's {tuple(mine.shape)}"
        )
    return mine, theirs


def answer(features: Features) -> Tensor:
    """The logits of one model, which its caller has set."""
    if features.logits is None:
        raise ValueError("features have no logits; set them from the models' outputs")
    return features.logits


def hidden_states(features: Features) -> list[Tensor]:
    """The embeddings and the states after each layer, which ``Taps`` has recorded."""
    if not features.hidden:
        raise ValueError("features have no hidden states; record them by Taps with hidden=True")
    return features.hidden


def attentions(features: Features) -> list[Attention]:
    """The attention of each layer, which ``Taps`` has recorded."""
    if not features.attention:
        raise ValueError("features have no attention; record it by Taps with attention=True")
    return features.attention


def weighted(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the parts, and the parts."""
    return cast(Tensor, sum(weights[name] * part for name, part in parts.items())), dict(parts)


def weighted_terms(terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``weighted``; a term of weight 0 is not computed."""
    parts = {name: compute() for name, (weight, compute) in terms.items() if weight}
    return weighted(parts, {name: weight for name, (weight, _) in terms.items()})
