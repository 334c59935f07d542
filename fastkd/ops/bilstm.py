"""``torch.ops.fastkd.bilstm``: one LSTM layer, of one direction or both, over ragged sequences; trains on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import reference
from fastkd.ops import _extension

_extension.define(
    "bilstm", "(Tensor x, Tensor lengths, Tensor weight_input, Tensor weight_recurrent, Tensor bias) -> Tensor"
)
_extension.define("lstm_steps", "(Tensor gates, Tensor lengths, Tensor weight) -> Tensor")
_extension.define(
    "lstm_forward",
    "(Tensor gates, Tensor lengths, Tensor weight) -> (Tensor states, Tensor cells, Tensor activations)",
)
_extension.define(
    "lstm_backward", "(Tensor grad, Tensor lengths, Tensor weight, Tensor cells, Tensor activations) -> Tensor"
)


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
        (tokens, directions * hidden) in the dtype of ``x``. On the CPU without gradient the same bits for a sequence in
        any company and on any number of threads. A gradient has kernels on a CPU if hidden is a multiple of 16, and
        else comes of plain torch; the product with ``weight_input`` then follows autocast.

    Raises:
        RuntimeError: a gradient is asked for on another device, where ``torch.nn.LSTM`` trains; or a second derivative
            of the kernels, which plain torch has: in float64, or with FASTKD_BACKEND=reference.
        TypeError, ValueError: naming the argument, what it is and what it must be.
    """
    weights = {"weight_input": weight_input, "weight_recurrent": weight_recurrent, "bias": bias}
    _check(x, lengths, weights)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights.values()))
    hidden = weight_recurrent.shape[-1]
    if trains and x.device.type != "cpu":
        raise RuntimeError(
            f"bilstm has no gradient on {x.device.type}: call it under torch.no_grad(), or train with torch.nn.LSTM"
        )
    if trains and trains_by_kernel(x, hidden):
        return _trainable(x, lengths, **weights)
    backend = _extension.backend("bilstm", x.device.type, x.dtype)
    if trains or backend == "reference" or (backend == "cuda" and not _has_kernel(x, hidden)):
        return reference.bilstm(x, lengths, weight_input, weight_recurrent, bias)
    arithmetic = torch.float32 if backend == "cpu" else x.dtype
    tensors = (tensor.to(arithmetic) for tensor in (weight_input, weight_recurrent, bias))
    states: Tensor = torch.ops.fastkd.bilstm(x.to(arithmetic), lengths, *tensors)
    return states.to(x.dtype)


def trains_by_kernel(x: Tensor, hidden: int) -> bool:
    """Whether gradients have kernels: on a CPU, 16 units at a time."""
    return x.device.type == "cpu" and hidden % 16 == 0 and _extension.backend("bilstm", "cpu", x.dtype) == "cpu"


def _trainable(x: Tensor, lengths: Tensor, weight_input: Tensor, weight_recurrent: Tensor, bias: Tensor) -> Tensor:
    """The inputs' part of all gates is one product of torch's, and so is its gradient; the steps have kernels."""
    rows = x if torch.is_autocast_enabled("cpu") else x.float()
    gates = F.linear(rows, weight_input.flatten(0, 1).to(rows.dtype), bias.flatten().to(rows.dtype))
    gates = gates.view(len(x), *bias.shape)
    states: Tensor = torch.ops.fastkd.lstm_forward(gates, lengths, weight_recurrent.float())[0]
    return states.to(x.dtype)


def _has_kernel(x: Tensor, hidden: int) -> bool:
    """Whether csrc/cuda/bilstm.cu can: tensor cores of 16 bits, units in octets, weights in registers."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and hidden % 8 == 0 and hidden <= 1024 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _check(x: Tensor, lengths: Tensor, weights: dict[str, Tensor]) -> None:
    for name, tensor in {"x": x, "lengths": lengths, **weights}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    for name, tensor in {"x": x, **weights}.items():
        if tensor.dtype not in _extension.FLOATS:
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
    states: Tensor = torch.ops.fastkd.lstm_steps(gates, lengths, weight_recurrent)
    return states


def _fake_steps(gates: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(gates.shape[0], weight.shape[0] * weight.shape[2])


def _fake_forward(gates: Tensor, lengths: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states = weight.new_empty(gates.shape[0], weight.shape[0] * weight.shape[2])
    return states, torch.empty_like(states), gates.new_empty(gates.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, lengths, weight = inputs
    ctx.save_for_backward(lengths, weight, *output)
    ctx.mark_non_differentiable(*output[1:])  # kept for the gradient of the states
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *of_kept: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused bilstm has no second derivative, which create_graph=True asks for: "
            "use float64 tensors or FASTKD_BACKEND=reference"
        )
    if grad is None:
        return None, None, None
    lengths, weight, states, *kept = ctx.saved_tensors
    grad_gates = torch.ops.fastkd.lstm_backward(grad, lengths, weight, *kept)
    before = _states_before(states.to(grad_gates.dtype).unflatten(1, (len(weight), -1)), lengths)
    grad_weight = torch.stack([gates.T @ rows for gates, rows in zip(grad_gates.unbind(1), before, strict=True)])
    return grad_gates, None, grad_weight


def _states_before(states: Tensor, lengths: Tensor) -> list[Tensor]:
    """Of states (tokens, directions, hidden), for each direction: what the step of each token begins from."""
    ends, edges = lengths.cumsum(0), lengths.new_zeros(len(states) + 1, dtype=torch.bool)
    firsts, lasts = edges.index_fill(0, ends - lengths, True)[:-1], edges.index_fill(0, ends, True)[1:]
    before = [states[:, 0].roll(1, 0).masked_fill_(firsts[:, None], 0)]
    if states.shape[1] == 2:
        before.append(states[:, 1].roll(-1, 0).masked_fill_(lasts[:, None], 0))
    return before


def _fake_backward(grad: Tensor, lengths: Tensor, weight: Tensor, cells: Tensor, activations: Tensor) -> Tensor:
    return activations.new_empty(activations.shape)


torch.library.register_fake("fastkd::bilstm", _fake)
torch.library.register_fake("fastkd::lstm_steps", _fake_steps)
torch.library.register_fake("fastkd::lstm_forward", _fake_forward)
torch.library.register_fake("fastkd::lstm_backward", _fake_backward)
torch.library.register_autograd("fastkd::lstm_forward", _backward, setup_context=_save)
torch.library.register_kernel("fastkd::bilstm", "cuda", _cuda)
