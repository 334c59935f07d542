"""Convex combinations of the examples of a batch, and the loss against two labels that belongs to them."""

import torch
from torch import Tensor

from fastkd import ops
from fastkd.losses import _checks, _pairing
from fastkd.losses._checks import Reduction


def mixup(x: Tensor, permutation: Tensor, lam: float | Tensor) -> Tensor:
    r"""Mix each example of a batch with its partner: λ_i · x_i + (1−λ_i) · x_π(i), the mixup of arXiv 1710.09412.

    Args:
        x: (B, ...), float32, bfloat16, float16 or float64: embeddings, hidden states, targets. Examples may have any
            stride; an example that is not dense in itself is copied once.
        permutation: π, (B,) int64, every index of the batch once. On a GPU that is not verified, as it would wait for
            the device: there an index out of range gives NaN, and an index that occurs twice a wrong gradient.
        lam: λ in [0, 1], a number, a 0-d tensor or one value per example (B,). No gradient flows to it.

    Returns:
        The mixture (B, ...) in the dtype of ``x``.

    Arithmetic is float32 inside (float64 for float64), rounded once. The gradient is the same op along the inverse
    permutation: nothing is scattered, so it is deterministic, and derivatives of any order exist. A NaN stays in its
    example and the one it is the partner of, also where λ is exactly 0 or 1.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _pairing.batch("x", x)
    _checks.floating("x", x)
    return ops.mixup(x, permutation, _pairing.pairing(permutation, lam, "x", x))


def mixup_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    permutation: Tensor,
    lam: float | Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of a mixture against the class ids of both its examples, λ_i · CE(y_i) + (1−λ_i) · CE(y_π(i)).

    This is the cross-entropy against the mixed one-hot labels, which are never built: one log-softmax, two gathers.

    Args:
        logits: (B, ..., C) of the mixture.
        labels: (B, ...) int64, the class ids of the examples before they were mixed.
        permutation, lam: as they were given to :func:`mixup`.
        ignore_index: a label that does not count; the other label of the mixture still does.
        reduction: ``"mean"`` divides by the sum of the weights λ and 1−λ of the labels that count (a choice of this
            project; B where all do), ``"sum"`` does not divide, ``"none"`` returns (B, ...).

    Returns:
        The loss, float32 (float64 for float64 logits); 0 where no label counts, with zero gradients attached.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    _pairing.batch("logits", logits)
    _checks.floating("logits", logits)
    _pairing.batch("labels", labels)
    _checks.reduction(reduction, None)
    valid = _checks.valid_rows("logits", logits, labels, ignore_index, None)
    assert valid is not None
    valid = valid.view(labels.shape)
    accumulation = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = _pairing.pairing(permutation, lam, "logits", logits).to(accumulation)
    weight = weight.view(-1, *(1,) * (labels.dim() - 1))
    log_probs = logits.log_softmax(-1, dtype=accumulation)
    safe = labels.where(valid, 0)
    weights, losses = [], []
    for w, ids, counts in ((weight, safe, valid), (1 - weight, safe[permutation], valid[permutation])):
        weights.append(w.where(counts, 0.0))
        losses.append(-log_probs.gather(-1, ids[..., None])[..., 0].where(counts, 0.0))
    loss = weights[0] * losses[0] + weights[1] * losses[1]
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weights[0].sum() + weights[1].sum()
    return loss.sum() / total.where(total > 0, 1.0)
