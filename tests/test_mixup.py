"""mixup on every backend of this machine against its float64 reference, and what its documentation promises."""

import os
import subprocess
import sys
from pathlib import Path

import mixup_samples as samples
import pytest
import torch
from tolerance import GRADIENT, assert_close

from fastkd import reference
from fastkd.losses import mixup
from fastkd.ops import _extension

ROOT = Path(__file__).parent.parent
DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

fused = pytest.mark.skipif(_extension.fused_backend("cpu")[0] is None, reason="the compiled module is not built")


@pytest.fixture(autouse=True)
def poisoned():
    """Fill fresh memory with NaN, so that nothing unwritten can pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def evaluate(function, x, permutation, lam, device="cpu", dtype=None):
    """Mixture and gradient for a fixed incoming gradient, of x moved to a device and, for references, a dtype."""
    leaf = x.detach().to(device, dtype or x.dtype).requires_grad_()
    mixed = function(leaf, permutation.to(device), lam.to(device))
    upstream = samples.examples(x.shape, x.dtype, seed=1).to(device, mixed.dtype)
    (grad,) = torch.autograd.grad(mixed, leaf, upstream)
    return mixed.detach().cpu(), grad.cpu()


def check(x, permutation, lam, device="cpu"):
    mixed, grad = evaluate(mixup, x, permutation, lam, device)
    exact, exact_grad = evaluate(reference.mixup, x, permutation, lam, dtype=torch.float64)
    plain, plain_grad = evaluate(reference.mixup, x, permutation, lam)
    for rows in range(6):  # each kind of example by itself: large ones would hide the errors of small ones
        assert_close(mixed[rows::6], exact[rows::6], plain[rows::6])
        assert_close(grad[rows::6], exact_grad[rows::6], plain_grad[rows::6], GRADIENT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", samples.SHAPES, ids=str)
def test_matches_the_float64_reference(shape, dtype, device):
    x = samples.examples(shape, dtype)
    for pairing in samples.PAIRINGS:
        check(x, samples.permutation(len(x), pairing), samples.lam(len(x)), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_formula_as_users_write_it(dtype):
    x, permutation = torch.randn(6, 4, 5, dtype=dtype), samples.permutation(6)
    lam = samples.lam(6).to(dtype)
    weight = lam[:, None, None]
    want = weight * x + (1 - weight) * x[permutation]
    assert torch.allclose(mixup(x, permutation, lam), want, rtol=1e-6, atol=1e-7)
    for number in (0.25, torch.tensor(0.25), torch.tensor(0.25).half()):
        want = 0.25 * x + 0.75 * x[permutation]
        assert torch.allclose(mixup(x, permutation, number), want, rtol=1e-6, atol=1e-7)


def test_float64_keeps_every_digit_of_lam():
    x, permutation = torch.randn(3, 2, dtype=torch.float64), torch.tensor([1, 2, 0])
    lam = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    assert torch.equal(mixup(x, permutation, lam), lam[:, None] * x + (1 - lam[:, None]) * x[permutation])
    assert torch.equal(mixup(x, permutation, 0.1), 0.1 * x + (1 - 0.1) * x[permutation])


def test_derivatives_of_the_reference():
    x, lam = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), samples.lam(5).double()
    for pairing in samples.PAIRINGS:
        permutation = samples.permutation(5, pairing)
        assert torch.autograd.gradcheck(lambda x: mixup(x, permutation, lam), x)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: mixup(x, permutation, lam).pow(3), x)  # noqa: B023


def test_second_derivative():
    permutation, lam = samples.permutation(7), samples.lam(7)

    def second(function, dtype):
        x = samples.examples((7, 33)).mul(0.01).to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(function(x, permutation, lam).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    exact, plain = second(reference.mixup, torch.float64), second(reference.mixup, torch.float32)
    assert_close(second(mixup, torch.float32), exact, plain, GRADIENT)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_nan_stays_in_its_example_and_where_that_is_the_partner(dtype):
    x, permutation = torch.randn(6, 35).to(dtype), torch.tensor([1, 2, 0, 4, 3, 5])
    clean, clean_grad = evaluate(mixup, x, permutation, samples.lam(6))
    x[1, 33] = float("nan")
    mixed, grad = evaluate(mixup, x, permutation, samples.lam(6))
    expected = torch.zeros(6, 35, dtype=torch.bool)
    expected[:2, 33] = True
    assert torch.equal(mixed.isnan(), expected)
    assert torch.equal(mixed[~expected], clean[~expected])
    assert torch.equal(grad, clean_grad)


def test_empty_batches_and_examples():
    for shape in ((0,), (0, 3), (4, 0), (4, 0, 2)):
        x = torch.randn(shape, requires_grad=True)
        mixed = mixup(x, samples.permutation(shape[0]), samples.lam(shape[0]))
        mixed.sum().backward()
        assert mixed.shape == x.shape
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_stride_of_inputs_and_gradients(dtype):
    wide, permutation, lam = torch.randn(10, 8, 66).to(dtype), samples.permutation(5), samples.lam(5)
    strided = permutation.repeat_interleave(2)[::2], lam.repeat_interleave(2)[::2]
    views = wide[::2], wide[:5, :, ::2], wide[:5].transpose(1, 2), wide[:5, :1].expand(-1, 8, -1)
    for view in views:
        assert torch.equal(mixup(view, *strided), mixup(view.contiguous(), permutation, lam))
    x = wide[:5].clone().requires_grad_()
    for upstream in (wide.new_ones(()).expand(5, 8, 66), wide[5:, :1].expand(-1, 8, -1), wide[::2]):
        (got,) = torch.autograd.grad(mixup(x, permutation, lam), x, upstream)
        (want,) = torch.autograd.grad(mixup(x, permutation, lam), x, upstream.contiguous())
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 3), (9, 70000), (3, 300001)], ids=str)
def test_results_do_not_depend_on_the_threads(shape, dtype):
    x, permutation, lam = samples.examples(shape, dtype), samples.permutation(shape[0]), samples.lam(shape[0])
    many, threads = evaluate(mixup, x, permutation, lam), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, other in zip(evaluate(mixup, x, permutation, lam), many, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@fused
@pytest.mark.parametrize("transpose", [False, True])
def test_registration_is_honest(transpose):
    x = torch.randn(6, 33, requires_grad=True)
    arguments = (x, samples.permutation(6), samples.lam(6), transpose)
    torch.library.opcheck(torch.ops.fastkd.mixup.default, arguments)


@pytest.mark.parametrize("lam_kind", ["number", "tensor"])
def test_compiles_into_one_graph_for_every_batch_size(lam_kind):
    def step(x, permutation, lam):
        return mixup(x * 2, permutation, lam).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 8, 21):
        x, permutation = torch.randn(rows, 4, 10), samples.permutation(rows)
        lam = 0.3 if lam_kind == "number" else samples.lam(rows)
        eager, fast = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = step(eager, permutation, lam), compiled(fast, permutation, lam)
        want.sum().backward()
        got.sum().backward()
        assert torch.equal(got, want)
        assert torch.equal(fast.grad, eager.grad)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 2
    torch._dynamo.reset()


def test_compiles_with_inductor_and_uses_the_result():
    def step(x, permutation, lam):
        return mixup(x.sin(), permutation, lam).exp().sum()

    x, permutation, lam = torch.randn(5, 300), samples.permutation(5), samples.lam(5)
    eager, fast = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(fast, permutation, lam).backward()
    step(eager, permutation, lam).backward()
    assert torch.allclose(fast.grad, eager.grad, rtol=1e-5, atol=1e-6)


def test_autocast_and_checkpointing():
    layer, x, permutation, lam = torch.nn.Linear(8, 30), torch.randn(6, 8), samples.permutation(6), samples.lam(6)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mixup(layer(x), permutation, lam)

    mixed = step()
    assert mixed.dtype == torch.bfloat16
    (want,) = torch.autograd.grad(mixed.float().square().sum(), layer.weight)
    again = torch.utils.checkpoint.checkpoint(step, use_reentrant=False)
    (got,) = torch.autograd.grad(again.float().square().sum(), layer.weight)
    assert torch.equal(got, want)


@fused
def test_offsets_beyond_two_to_the_31():
    code = """
import torch
from fastkd.losses import mixup
rows, stride = 33000, 70000  # 4.6 GB of address space, of which only the examples are ever touched
x = torch.empty_strided((rows, 40), (stride, 1), dtype=torch.float16)
x.copy_(torch.randn(rows, 40))
permutation = torch.arange(rows).flip(0)
assert torch.equal(mixup(x, permutation, 0.25), mixup(x.contiguous(), permutation, 0.25))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_at_every_length_and_alignment(target):
    environment = os.environ | {"FASTKD_CPU_TARGET": target, "PYTHONPATH": os.pathsep.join([str(ROOT), "tests"])}
    subprocess.run([sys.executable, "tests/mixup_lengths.py"], check=True, cwd=ROOT, env=environment)
