"""Which backends of an op a machine can test, how a test puts one in charge, and what it then compares."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from tolerance import GRADIENT, VALUE, assert_close
from torch import Tensor

from fastkd.ops import _extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_GPU = torch.cuda.is_available()
BACKENDS = ("cpu", "triton")
"""The CPU kernels, and the Triton kernels: on the GPU, or where there is none in Triton's interpreter."""

fused = pytest.mark.skipif(_extension.fused_backend("cpu")[0] is None, reason="the compiled module is not built")


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and HAS_GPU else "cpu"


@contextmanager
def answering(op: str, backend: str) -> Iterator[None]:
    """Inside, ``backend`` answers the op: "cpu", "triton" or "reference".

    Without a GPU the Triton launcher takes the CPU kernel's place in the dispatcher, so that autograd, opcheck and
    the compiler meet it as they do on a GPU.
    """
    if backend == "reference":
        with mock.patch.object(_extension, "backend", return_value="reference"), threads(1):
            yield
    elif backend == "cpu":
        with threads(2):
            yield
    elif HAS_GPU:
        yield
    else:
        pytest.importorskip("triton")
        launch = import_module(f"fastkd.ops.{op}")._triton
        with mock.patch.object(_extension, "backend", _choose), torch.library._scoped_library("fastkd", "IMPL") as here:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is another kernel, which is the point
                here.impl(op, launch, "CPU", allow_override=True)
            yield


def _choose(op: str, device_type: str, dtype: torch.dtype) -> str:
    return "reference" if dtype == torch.float64 else "triton"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluate(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    wanted: tuple[int, ...] = (0,),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The result and the gradients of the ``wanted`` tensors, moved to a device and, for references, to a dtype.

    Rows of the result weigh unevenly in the gradients, infinite ones not at all.
    """

    def moved(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    arguments = [moved(x).to(dtype if dtype and x.is_floating_point() else x.dtype) for x in tensors]
    leaves = [arguments[index].requires_grad_() for index in wanted]
    result = function(*arguments, **{name: moved(value) for name, value in options.items()})
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=device).reshape(result.shape)
    grads = torch.autograd.grad((result * weights).nan_to_num(posinf=0.0).sum(), leaves)
    return tuple(tensor.detach().cpu() for tensor in (result, *grads))


def check(op: str, backend: str, function: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> None:
    """Hold result and gradients of ``backend``, which must be answering, to the float64 reference.

    The yardstick is the reference in the dtype under test: its arithmetic in float32, gradients rounded at the end.
    The CPU kernels, whose sums run in fewer and longer lanes, may use the wider bound for gradients.
    """
    actual = evaluate(function, *tensors, device=device_of(backend), **options)
    with answering(op, "reference"):
        exact = evaluate(function, *tensors, dtype=torch.float64, **options)
        plain = evaluate(function, *tensors, **options)
    for index, results in enumerate(zip(actual, exact, plain, strict=True)):
        assert_close(*results, GRADIENT if index > 0 and backend == "cpu" else VALUE)
