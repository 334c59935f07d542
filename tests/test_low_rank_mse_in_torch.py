"""low_rank_mse as a citizen of torch: derivatives, registration, compilation, autocast, threads."""

import low_rank_mse_samples as samples
import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, device_of, fused, threads
from low_rank_mse_samples import answering
from subprocesses import python

from fastkd.losses import low_rank_mse

OP = "low_rank_mse"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with answering(OP, request.param):
        yield request.param


def inputs(backend="cpu", n=12, dtype=torch.float32):
    x, down, up, bias, target = (t.to(device_of(backend)) for t in samples.rows((n, 6, 3, 10), dtype))
    return x.requires_grad_(), down.requires_grad_(), up.requires_grad_(), bias.requires_grad_(), target


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("return_output", [False, True])
def test_derivatives_of_the_reference(reduction, return_output):
    x, down, up, bias, target = samples.rows((5, 3, 2, 4), torch.float64)
    x[1] /= 30
    operands = [t.clone().requires_grad_() for t in (x, down, up, bias)]
    options = {"mask": torch.arange(5) != 2, "weights": torch.rand(5), "reduction": reduction}

    def loss(x, down, up, bias):
        return low_rank_mse(x, down, up, target, bias=bias, return_output=return_output, **options)

    assert torch.autograd.gradcheck(loss, operands)
    assert torch.autograd.gradgradcheck(loss, operands)


@fused
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(backend, reduction):
    x, down, up, bias, target = inputs(backend)
    loss = low_rank_mse(x, down, up, target, bias=bias, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, down, create_graph=True)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [(True,) * 4, (False,) * 4, (True, False, True, False)], ids=str)
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_registration_is_honest(backend, reduction, needs, dtype):
    x, down, up, bias, target = (t.detach() for t in inputs(backend, dtype=dtype))
    valid = torch.arange(12, device=x.device) != 2
    count = valid.sum(dtype=torch.float32)
    for given, need_output in ((None, False), (None, True), (target + 1, False)):
        arguments = (
            x,
            down,
            up,
            target,
            bias.float(),
            valid,
            None,
            given,
            given,
            reduction,
            count,
            *needs,
            need_output,
        )
        torch.library.opcheck(torch.ops.fastkd.low_rank_mse.default, arguments)


def test_compiles_with_inductor_and_uses_the_result():
    def step(x, down, up, target):
        return low_rank_mse(x.sin(), down, up, target).log()

    x, down, up, _, target = inputs()
    torch._dynamo.reset()
    fast = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, down, up, target), (x, down, up))
    eager = torch.autograd.grad(step(x, down, up, target), (x, down, up))
    for got, want in zip(fast, eager, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_casts_as_for_a_linear_layer(backend):
    x, down, up, bias, target = inputs(backend)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        loss, output = low_rank_mse(x, down, up, target, bias=bias, return_output=True)
        wanted = F.linear(F.linear(x, down), up, bias)
    assert output.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(output, wanted, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(loss, (x, down, up, bias))
    exact = torch.autograd.grad(F.mse_loss(F.linear(F.linear(x, down), up, bias), target), (x, down, up, bias))
    for got, want in zip(grads, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=5e-2, atol=0.02 * want.abs().max().item())


def test_a_second_backward_finds_its_gradients_unchanged(backend):
    x, down, up, bias, target = inputs(backend)
    loss = low_rank_mse(x, down, up, target, bias=bias)
    first = [g.clone() for g in torch.autograd.grad(loss, (x, down, up, bias), torch.tensor(2.0).to(x.device), True)]
    second = torch.autograd.grad(loss, (x, down, up, bias), torch.tensor(2.0).to(x.device))
    assert all(map(torch.equal, first, second))


@fused
@pytest.mark.parametrize("mask", [None, torch.arange(1300) % 4 != 0], ids=["all", "masked"])
def test_the_number_of_threads_changes_no_bit(mask):
    x, down, up, bias, target = samples.rows(samples.LARGE)
    results = []
    for count in (1, 2):
        with threads(count):
            leaves = [t.clone().requires_grad_() for t in (x, down, up, bias)]
            loss = low_rank_mse(*leaves[:3], target, bias=leaves[3], mask=mask)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, *results))


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512-no-bf16"])
def test_without_instructions_for_bfloat16_its_products_are_those_of_float32(target):
    code = """
import torch
from fastkd.losses import low_rank_mse
half = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((70, 40), (8, 40), (33, 8), (70, 33))]
assert torch.equal(low_rank_mse(*half), low_rank_mse(*(x.float() for x in half)))
"""
    python("-c", code, FASTKD_CPU_TARGET=target)
