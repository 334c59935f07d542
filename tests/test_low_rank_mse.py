"""low_rank_mse on every backend of this machine against its float64 reference, and what its documentation promises."""

from contextlib import nullcontext

import low_rank_mse_samples as samples
import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, DTYPES, HAS_GPU, device_of, fused
from low_rank_mse_samples import answering
from tolerance import GRADIENT, assert_close

from fastkd.losses import LowRankMSELoss, low_rank_mse

OP = "low_rank_mse"
NAN = float("nan")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that nothing unwritten can pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with answering(OP, request.param):
        yield request.param


def evaluate(tensors, device="cpu", dtype=None, wanted=(0, 1, 2, 3), return_output=False, **options):
    """Loss, projection if asked for, and gradients of x, down, up and bias from uneven gradients of both."""
    moved = [t.detach().to(device, dtype or t.dtype) for t in tensors]
    for index in wanted:
        moved[index].requires_grad_()
    x, down, up, bias, target = moved
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    results = low_rank_mse(x, down, up, target, bias=bias, return_output=return_output, **options)
    results = results if return_output else (results,)
    weights = [torch.linspace(0.5, 1.5, r.numel(), device=device).to(r.dtype).reshape(r.shape) for r in results]
    grads = torch.autograd.grad(results, [moved[index] for index in wanted], weights)
    return tuple(t.detach().cpu() for t in (*results, *grads))


def check(tensors, backend, **options):
    """The loss too is held to the dtype of the products it comes from, although it is float32."""
    dtype = tensors[0].dtype
    actual = evaluate(tensors, device=device_of(backend), **options)
    with answering(OP, "reference"):
        exact = evaluate(tensors, dtype=torch.float64, **options)
        plain = evaluate(tensors, **options)
    for got, want, usual in zip(actual, exact, plain, strict=True):
        assert_close(got.to(dtype), want, usual.to(dtype), GRADIENT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", samples.SHAPES.values(), ids=samples.SHAPES)
def test_matches_the_float64_reference(backend, shape, dtype):
    tensors = samples.rows(shape, dtype)
    for options in samples.options(shape[0]).values():
        check(tensors, backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "normalized", "rows"])
def test_the_projection_and_its_gradient(backend, name, dtype):
    shape = samples.SHAPES["several slices"]
    check(samples.rows(shape, dtype), backend, return_output=True, **samples.options(shape[0])[name])


@fused
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_chunks_on_the_cpu(dtype):
    shape = samples.LARGE_BFLOAT16 if dtype == torch.bfloat16 else samples.LARGE
    for options in ({}, {"mask": torch.arange(shape[0]) % 40 != 0}):
        check(samples.rows(shape, dtype), "cpu", **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
def test_triton_adds_up_its_splits_of_the_rows(monkeypatch):
    monkeypatch.setattr("fastkd.kernels.low_rank_mse.ROWS_PER_SPLIT", 64)
    with answering(OP, "triton"):
        check(samples.rows((150, 8, 4, 20), torch.bfloat16), "triton")


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_launches_where_the_tensors_are(dtype, monkeypatch):
    """Triton launches on the current GPU, which need not be that of the tensors."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor.device) or nullcontext())
    with answering(OP, "triton"):
        evaluate(samples.rows((20, 8, 4, 20), dtype), device_of("triton"))
    assert entered
    assert {device.type for device in entered} == {device_of("triton")}


def test_agrees_with_two_linear_layers_and_mse_loss():
    x, down, up, bias, target = (t.requires_grad_(i < 4) for i, t in enumerate(samples.rows((40, 9, 4, 12))))
    loss, output = low_rank_mse(x, down, up, target, bias=bias, return_output=True)
    wanted = F.linear(F.linear(x, down), up, bias)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss, F.mse_loss(wanted, target), rtol=1e-5, atol=1e-5)
    both = loss + output.sin().sum(), F.mse_loss(wanted, target) + wanted.sin().sum()
    grads = [torch.autograd.grad(total, (x, down, up, bias)) for total in both]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("unused", ["loss", "output"])
def test_either_result_may_go_without_a_gradient(backend, unused):
    tensors = samples.rows((30, 6, 3, 10))
    x, down, up, bias, target = (t.to(device_of(backend)).requires_grad_(i < 4) for i, t in enumerate(tensors))
    loss, output = low_rank_mse(x, down, up, target, bias=bias, return_output=True)
    wanted = F.linear(F.linear(x, down), up, bias)
    got, want = (loss, F.mse_loss(wanted, target)) if unused == "output" else (output.sum(), wanted.sum())
    grads = [torch.autograd.grad(total, (x, down, up, bias)) for total in (got, want)]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("return_output", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2)], ids=str)
def test_frozen_operands_change_nothing_for_the_others(backend, wanted, return_output):
    tensors = samples.rows((140, 8, 4, 20))
    options = {"mask": torch.arange(140) % 3 != 0, "return_output": return_output, "device": device_of(backend)}
    everything = evaluate(tensors, **options)
    some = evaluate(tensors, wanted=wanted, **options)
    results = len(everything) - 4
    for got, index in zip(some[results:], wanted, strict=True):
        assert torch.equal(got, everything[results + index])


@pytest.mark.parametrize(
    "change",
    [
        {"mask": torch.arange(9) != 4},
        {"weights": torch.linspace(0.0, 2.0, 9)},
        {"reduction": "sum"},
        {"normalizer": 2.0},
    ],
    ids=str,
)
def test_every_argument_changes_loss_and_gradients(backend, change):
    tensors = samples.rows((9, 4, 2, 5))
    for before, after in zip(evaluate(tensors), evaluate(tensors, **change), strict=True):
        assert not torch.allclose(before, after, rtol=1e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_masked_rows_stay_out_of_the_arithmetic(backend, dtype):
    tensors = samples.rows((140, 8, 4, 20), dtype)
    mask = torch.arange(140) % 5 != 2
    for index in (0, 4):
        tensors[index][~mask] = NAN
    clean = [t.clone().nan_to_num(0.0) if i in (0, 4) else t for i, t in enumerate(tensors)]
    for options in ({"mask": mask}, {"weights": mask.float()}, {"mask": mask.long()}):
        device = device_of(backend)
        for got, want in zip(evaluate(tensors, device, **options), evaluate(clean, device, **options), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_nan_stays_in_its_row(backend, dtype):
    tensors = samples.rows((140, 8, 4, 20), dtype)
    options = {"reduction": "none", "return_output": True, "device": device_of(backend)}
    clean = evaluate(tensors, **options)
    tensors[0][1, 2] = tensors[4][3, 0] = NAN
    loss, output, grad_x, *_ = evaluate(tensors, **options)
    others = [row for row in range(140) if row not in (1, 3)]
    assert loss[[1, 3]].isnan().all()
    assert output[1].isnan().all()
    assert torch.equal(output[3], clean[1][3])
    for got, want in zip((loss, output, grad_x), clean[:3], strict=True):
        assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("return_output", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nothing_valid_gives_zero_with_gradients_attached(backend, dtype, return_output):
    for rows in (0, 3):
        tensors = [t.to(device_of(backend)) for t in samples.rows((rows, 5, 2, 7), dtype)]
        x, down, up, bias, target = (t.requires_grad_(i < 4) for i, t in enumerate(tensors))
        mask = torch.zeros(rows, dtype=torch.bool, device=x.device)
        loss = low_rank_mse(x, down, up, target, bias=bias, mask=mask, return_output=return_output)
        loss = loss[0] if return_output else loss
        loss.backward()
        assert loss.item() == 0.0
        for tensor in (x, down, up, bias):
            assert tensor.grad.shape == tensor.shape
            assert not tensor.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_gradients_survive_a_large_count(backend, dtype):
    """A mean over 2²⁴ rows: in float16 its gradient is below the smallest number until the loss is scaled."""
    if dtype == torch.bfloat16:
        pytest.skip("bfloat16 has the exponents of float32")
    tensors = samples.rows((30, 6, 3, 10), dtype)
    x, down, up, bias, target = (t.to(device_of(backend)).requires_grad_(i < 4) for i, t in enumerate(tensors))
    (scaled,) = torch.autograd.grad(low_rank_mse(x, down, up, target, bias=bias, normalizer=2.0**24) * 2.0**24, x)
    (plain,) = torch.autograd.grad(low_rank_mse(x, down, up, target, bias=bias, reduction="sum"), x)
    torch.testing.assert_close(scaled, plain, rtol=2e-3, atol=1e-3)


def test_any_row_stride_and_leading_shape(backend):
    x, down, up, bias, target = samples.rows((24, 8, 4, 20))
    x = torch.stack((x, -x), 1)[:, 0].unflatten(0, (4, 6))
    target = torch.stack((target, -target), 2)[..., 0].unflatten(0, (4, 6))
    mask = torch.arange(24).reshape(4, 6) % 3 != 0
    options = {"reduction": "none", "return_output": True, "device": device_of(backend)}
    views = evaluate((x, down, up, bias, target), mask=mask, **options)
    dense = [t.contiguous() for t in (x, down, up, bias, target)]
    for got, want in zip(views, evaluate(dense, mask=mask, **options), strict=True):
        assert torch.equal(got, want)
    assert views[0].shape == (4, 6)
    assert views[1].shape == (4, 6, 20)


def test_module_computes_what_the_function_does():
    x, down, up, bias, target = samples.rows((9, 4, 2, 5))
    mask, weights = torch.arange(9) != 2, torch.rand(9)
    module = LowRankMSELoss(reduction="sum")
    want = low_rank_mse(x, down, up, target, bias=bias, mask=mask, weights=weights, reduction="sum")
    assert torch.equal(module(x, down, up, target, bias=bias, mask=mask, weights=weights), want)
    assert "sum" in repr(module)


@pytest.mark.skipif(HAS_GPU, reason="takes the CPU kernel's place")
def test_ranks_beyond_the_registers_go_by_blocks(monkeypatch):
    from fastkd.kernels import low_rank_mse as kernels

    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", 1)
    with answering(OP, "triton"):
        for dtype in (torch.float16, torch.bfloat16):
            check(samples.rows((300, 20, 140, 24), dtype), "triton", mask=torch.arange(300) % 3 != 0)
