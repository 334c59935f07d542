"""``torch.ops.fastkd.bilstm``: one LSTM layer, of one direction or both, over ragged sequences, for inference."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import reference
from fastkd.ops import _extension

_extension.define(
    "bilstm", "(Tensor x, Tensor lengths, Tensor weight_input, Tensor weight_recurrent, Tensor bias) -> Tensor"
)
_extension.define("lstm_steps", "(Tensor gates, Tensor lengths, Tensor weight) -> Tensor")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bilstm(x: Tensor, lengths: Tensor, weight_input: Tensor, weight_recurrent: Tensor, bias: Tensor) -> Tensor:
    """Hidden states of one LSTM layer over sequences of any lengths, without padding.

    The arithmetic is ``torch.nn.LSTM``'s with initial states of zero: gates in the order i, f, g, o. With two
    directions the second reads every sequence from its end, as ``bidirectional=True`` does.

    Args:
        x: (tokens, inputs) float32, bfloat16, float16 or float64; the sequences one after the other.
        lengths: (sequences,) int64, tokens of each sequence, from 0 on; on the device of ``x``.
        weight_input: (directions, 4 * hidden, inputs); ``weight_ih`` of each direction.
        weight_recurrent: (directions, 4 * hidden, hidden); ``weight_hh``.
        bias: (directions, 4 * hidden); the sum of ``bias_ih`` and ``bias_hh``.

    Returns:
        (tokens, directions * hidden) in the dtype of ``x``. On the CPU the same bits for a sequence in any company and
        on any number of threads.

    Raises:
        RuntimeError: a gradient is asked for. Train with ``torch.nn.LSTM``, and call this under ``torch.no_grad()``.
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    weights = {"weight_input": weight_input, "weight_recurrent": weight_recurrent, "bias": bias}
    _check(x, lengths, weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights.values())):
        raise RuntimeError(
            "bilstm is for inference and has no gradient: call it under torch.no_grad(), or train with torch.nn.LSTM"
        )
    backend = _extension.backend("bilstm", x.device.type, x.dtype)
    if backend == "reference" or (backend == "cuda" and not _has_kernel(x, weight_recurrent.shape[-1])):
        return reference.bilstm(x, lengths, weight_input, weight_recurrent, bias)
    arithmetic = torch.float32 if backend == "cpu" else x.dtype
    tensors = (tensor.to(arithmetic) for tensor in (weight_input, weight_recurrent, bias))
    states: Tensor = torch.ops.fastkd.bilstm(x.to(arithmetic), lengths, *tensors)
    return states.to(x.dtype)


def _has_kernel(x: Tensor, hidden: int) -> bool:
    """Whether csrc/cuda/bilstm.cu can: tensor cores of 16 bits, units in octets, weights in registers."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and hidden % 8 == 0 and hidden <= 1024 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _check(x: Tensor, lengths: Tensor, weights: dict[str, Tensor]) -> None:
    for name, tensor in {"x": x, **weights}.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if x.dim() != 2:
        raise ValueError(f"x must be (tokens, inputs), got shape {tuple(x.shape)}")
    recurrent = weights["weight_recurrent"]
    if recurrent.dim() != 3 or recurrent.shape[0] not in (1, 2) or recurrent.shape[1] != 4 * recurrent.shape[2]:
        shape = tuple(recurrent.shape)
        raise ValueError(f"weight_recurrent must be (1 or 2 directions, 4 * hidden, hidden), got shape {shape}")
    gates = tuple(recurrent.shape[:2])
    for name, shape in (("weight_input", (*gates, x.shape[1])), ("bias", gates)):
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit x and weight_recurrent, got {tuple(weights[name].shape)}")
    if lengths.dim() != 1 or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be (sequences,) int64, got {tuple(lengths.shape)} {lengths.dtype}")
    for name, tensor in {"lengths": lengths, **weights}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((lengths < 0).any()) or int(lengths.sum()) != x.shape[0]:
        raise ValueError(f"lengths must be at least 0 and add up to the {x.shape[0]} rows of x, got {lengths.tolist()}")


def _fake(x: Tensor, lengths: Tensor, weight_input: Tensor, weight_recurrent: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight_recurrent.shape[0] * weight_recurrent.shape[2])


def _cuda(x: Tensor, lengths: Tensor, weight_input: Tensor, weight_recurrent: Tensor, bias: Tensor) -> Tensor:
    """The inputs' part of all gates is one product; the steps are a kernel of csrc/cuda/bilstm.cu."""
    gates = F.linear(x, weight_input.flatten(0, 1), bias.flatten()).view(x.shape[0], *bias.shape)
    states: Tensor = torch.ops.fastkd.lstm_steps(gates, lengths, weight_recurrent.contiguous())
    return states


def _fake_steps(gates: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(gates.shape[0], weight.shape[0] * weight.shape[2])


torch.library.register_fake("fastkd::bilstm", _fake)
torch.library.register_fake("fastkd::lstm_steps", _fake_steps)
torch.library.register_kernel("fastkd::bilstm", "cuda", _cuda)
