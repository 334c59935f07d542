"""What a model's matrices give on a sample of inputs, so that factors can keep most of that.

The factors with the least squared error on given inputs are those of DRONE (Chen et al., NeurIPS 2021). Here they are
the matrix followed by the projection on its outputs' principal directions, which needs no inverse and holds for
embeddings, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PRIOR = 1e-3
"""Weight, beside the sample, of inputs that are alike in all directions: they decide where the sample does not."""


@torch.no_grad()
def output_moments(
    model: PreTrainedModel, names: Iterable[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Σ y·yᵀ over the tokens of all batches, (features, features), float32, of each linear map or embedding named.

    y is what it gives for a token, without its bias. Those that no batch reaches are left out.

    Args:
        batches: keyword arguments of the model, which runs as in evaluation; tokens whose ``attention_mask`` (rows,
            tokens) is 0 do not count.

    Raises:
        ValueError: there are no batches.
    """
    moments: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(name: str, module: nn.Module, _: Any, output: Tensor) -> None:
        bias = getattr(module, "bias", None)
        rows = (output if bias is None else output - bias).float()
        rows = rows[mask.bool()] if mask is not None and mask.shape == rows.shape[:-1] else rows.flatten(0, -2)
        moments[name] = moments.get(name, 0) + rows.T @ rows

    hooks = [model.get_submodule(name).register_forward_hook(partial(add, name)) for name in names]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {
                name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()
            }
            mask = inputs.get("attention_mask")
            model(**inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not moments:
        raise ValueError("batches is empty; it must have at least one batch of the model's inputs")
    return moments


def keep_outputs(weight: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The matrix of that rank nearest to ``weight`` (out, in) by the outputs, of which ``moment`` (out, out) tells."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    moment = _relative(moment.to(weight.dtype)) + PRIOR * _relative(weight @ weight.T)
    reached = torch.linalg.qr(weight).Q  # all outputs lie in it, so that of a tall matrix a small moment is left
    vectors = torch.linalg.eigh((reached.T @ moment @ reached).double()).eigenvectors
    directions: Tensor = reached @ vectors[:, -rank:].to(weight.dtype)
    return directions @ (directions.T @ weight)


def _relative(moment: Tensor) -> Tensor:
    return moment / moment.trace().clamp(min=torch.finfo(moment.dtype).tiny)
