"""What goes through a model's matrices on a sample of inputs, so that factors can keep most of what they give.

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

from fastkd.training.adoption import accepted_inputs

PRIOR = 1e-3
"""Weight, beside the sample, of inputs that are alike in all directions: they decide where the sample does not."""


@torch.no_grad()
def token_moments(
    model: PreTrainedModel, names: Iterable[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Σ z·zᵀ over the tokens of all batches, (features, features), float32, for each linear map or embedding named.

    z is what a linear map takes, and what an embedding gives. Those that no batch reaches are left out.

    Args:
        batches: keyword arguments of the model, which runs as in evaluation, of which it takes those that it knows;
            tokens whose ``attention_mask`` (rows, tokens) is 0 do not count.

    Raises:
        ValueError: there are no batches, or one in place of them; what goes through a module is not finite.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches is a single batch; it must be several, as in a list")
    if not (sample := list(batches)):
        raise ValueError("batches is empty; it must have at least one batch of the model's inputs")
    moments: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(name: str, module: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> None:
        tokens = _that_count(given if isinstance(module, nn.Embedding) else taken[0], mask).float()
        with torch.autocast(tokens.device.type, enabled=False):  # of a trainer, in which the model's forward may be
            moments[name] = moments.get(name, 0) + tokens.T @ tokens

    hooks = [model.get_submodule(name).register_forward_hook(partial(add, name)) for name in names]
    modes = {module: module.training for module in model.modules()}
    known = accepted_inputs(model)
    model.eval()
    try:
        for batch in sample:
            inputs = {name: value for name, value in batch.items() if name in known}
            inputs |= {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
            mask = inputs.get("attention_mask")
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for name, moment in moments.items():
        if not moment.isfinite().all():
            raise ValueError(f"on batches {name} meets NaN or infinity; the model or its inputs must be finite")
    return moments


def fitted_factors(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``up`` (out, r) and ``down`` (r, in) whose product is nearest to ``weight`` by its outputs, but for the prior.

    ``moment`` (out, out) is Σ y·yᵀ of the outputs. The two have the same singular values.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    reached, small = torch.linalg.qr(weight)  # all outputs lie in it, so that of a tall matrix a small moment is left
    inside = _relative(reached.T @ moment.to(weight.dtype) @ reached) + PRIOR * _relative(small @ small.T)
    directions = torch.linalg.eigh(inside.double()).eigenvectors[:, -rank:].to(weight.dtype)
    turn, s, vh = torch.linalg.svd(directions.T @ small, full_matrices=False)
    root = s.sqrt()
    return reached @ directions @ turn * root, root[:, None] * vh


def _that_count(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of ``tokens`` (..., features), without pads where there is one for each of the mask's places."""
    if mask is not None and tokens.shape[:-1].numel() == mask.numel():  # OPT flattens its tokens
        return tokens.reshape(mask.numel(), -1)[mask.flatten().bool()]
    return tokens.flatten(0, -2)


def _relative(moment: Tensor) -> Tensor:
    return moment / moment.trace().clamp(min=torch.finfo(moment.dtype).tiny)
