"""embedding_mixup on every backend against its float64 reference, and what its documentation promises."""

import os
import subprocess
import sys
from pathlib import Path

import mixup_samples as samples
import pytest
import torch
import torch.nn.functional as F
from tolerance import GRADIENT, assert_close

from fastkd import reference
from fastkd.losses import embedding_mixup, mixup
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


def evaluate(function, ids, table, padding_idx=None, pairing="random", device="cpu", dtype=None):
    """Mixture and the table's gradient for a fixed incoming gradient."""
    permutation, lam = samples.permutation(len(ids), pairing).to(device), samples.lam(len(ids)).to(device)
    leaf = table.detach().to(device, dtype or table.dtype).requires_grad_()
    mixed = function(ids.to(device), leaf, permutation, lam, padding_idx=padding_idx)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(mixed.shape, generator=generator).to(table.dtype).to(device, mixed.dtype)
    (grad,) = torch.autograd.grad(mixed, leaf, upstream)
    return mixed.detach().cpu(), grad.cpu()


def check(ids, table, padding_idx=None, pairing="random", device="cpu"):
    mixed, grad = evaluate(embedding_mixup, ids, table, padding_idx, pairing, device)
    exact, exact_grad = evaluate(reference.embedding_mixup, ids, table, padding_idx, pairing, dtype=torch.float64)
    plain, plain_grad = evaluate(reference.embedding_mixup, ids, table, padding_idx, pairing)
    assert_close(mixed, exact, plain)
    frequent = exact_grad.abs().sum(1) > exact_grad.abs().sum(1).median()
    for rows in (frequent, ~frequent):  # sums over many tokens would hide the errors of the other rows
        assert_close(grad[rows], exact_grad[rows], plain_grad[rows], GRADIENT)
    assert not grad[~torch.isin(torch.arange(len(table)), ids)].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", samples.TABLES, ids=str)
def test_matches_the_float64_reference(shape, dtype, device):
    table = samples.examples(shape, dtype)
    for pairing in samples.PAIRINGS:
        check(samples.ids((12, 40), shape[0]), table, pairing=pairing, device=device)
    check(samples.ids((7,), shape[0]), table, device=device)
    check(samples.ids((3, 2, 5), shape[0]), table, padding_idx=0, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
def test_is_a_lookup_followed_by_a_mixup(padding_idx, dtype):
    ids, permutation, lam = samples.ids((12, 40), 30), samples.permutation(12), samples.lam(12)
    table = torch.randn(30, 20, dtype=torch.float64).to(dtype).requires_grad_()
    got = embedding_mixup(ids, table, permutation, lam, padding_idx=padding_idx)
    want = mixup(F.embedding(ids, table, padding_idx), permutation, lam)
    assert torch.equal(got, want)
    upstream = torch.randn_like(got)
    (got,), (want,) = torch.autograd.grad(got, table, upstream), torch.autograd.grad(want, table, upstream)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]  # torch sums in bfloat16
    assert torch.allclose(got, want, rtol=tolerance, atol=20 * tolerance)
    if padding_idx is not None:
        assert not got[padding_idx].any()
        assert table[padding_idx].any()


def test_derivatives_of_the_reference():
    ids, permutation, lam = samples.ids((4, 3), 6), samples.permutation(4), samples.lam(4).double()
    table = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def cubed(table):
        return embedding_mixup(ids, table, permutation, lam).pow(3)

    assert torch.autograd.gradcheck(cubed, table)
    assert torch.autograd.gradgradcheck(cubed, table)


def test_second_derivative():
    ids, permutation, lam = samples.ids((12, 40), 30), samples.permutation(12), samples.lam(12)

    def second(function, dtype, padding_idx):
        table = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        mixed = function(ids, table, permutation, lam, padding_idx=padding_idx)
        (grad,) = torch.autograd.grad(mixed.pow(3).sum(), table, create_graph=True)
        weights = torch.linspace(0.5, 1.5, grad.numel(), dtype=dtype).view(grad.shape)  # of the padding row too
        return torch.autograd.grad((grad * weights).sum(), table)[0]

    for padding_idx in (None, 3):
        exact = second(reference.embedding_mixup, torch.float64, padding_idx)
        plain = second(reference.embedding_mixup, torch.float32, padding_idx)
        assert_close(second(embedding_mixup, torch.float32, padding_idx), exact, plain, GRADIENT)


def test_a_nan_stays_in_its_row():
    ids, table = torch.tensor([[1, 2, 3], [4, 1, 0], [5, 5, 5]]), torch.randn(7, 33)
    table[1, 7] = float("nan")
    permutation = torch.tensor([1, 0, 2])
    mixed = embedding_mixup(ids, table, permutation, 0.5)
    expected = torch.zeros(3, 3, 33, dtype=torch.bool)
    expected[:2, :2, 7] = True
    assert torch.equal(mixed.isnan(), expected)
    upstream = torch.randn(3, 3, 33)
    upstream[0, 2, 5] = float("nan")
    leaf = table.nan_to_num().requires_grad_()
    (grad,) = torch.autograd.grad(embedding_mixup(ids, leaf, permutation, 0.5), leaf, upstream)
    assert grad.isnan().nonzero().tolist() == [[0, 5], [3, 5]]


def test_empty_batches_leave_a_gradient_of_zeros():
    for shape in ((0,), (0, 3), (4, 0)):
        table = torch.randn(5, 7, requires_grad=True)
        ids = torch.zeros(shape, dtype=torch.int64)
        mixed = embedding_mixup(ids, table, samples.permutation(shape[0]), samples.lam(shape[0]))
        mixed.sum().backward()
        assert mixed.shape == (*shape, 7)
        assert not table.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_stride_of_inputs_and_gradients(dtype):
    permutation, lam, wide = samples.permutation(6), samples.lam(6), torch.randn(40, 70).to(dtype)
    ids = samples.ids((10, 12), 20).T[:6]
    for table in (wide[:20, 3:36], wide[::2, :33], wide[:20, ::2], wide.T[:20, :33]):
        want = embedding_mixup(ids.contiguous(), table.contiguous(), permutation, lam)
        assert torch.equal(embedding_mixup(ids, table, permutation, lam), want)
    table = wide[:20, :33].clone().requires_grad_()
    for upstream in (wide.new_ones(()).expand(6, 10, 33), wide[:6, None, :33].expand(-1, 10, -1)):
        (got,) = torch.autograd.grad(embedding_mixup(ids, table, permutation, lam), table, upstream)
        (want,) = torch.autograd.grad(embedding_mixup(ids, table, permutation, lam), table, upstream.contiguous())
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_threads(dtype):
    ids, table = samples.ids((16, 64), 700), torch.randn(700, 300).to(dtype)
    many, threads = evaluate(embedding_mixup, ids, table), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, other in zip(evaluate(embedding_mixup, ids, table), many, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@fused
def test_registration_is_honest():
    ids, permutation, lam = samples.ids((4, 6), 9), samples.permutation(4), samples.lam(4)
    table, grad = torch.randn(9, 5, requires_grad=True), torch.randn(4, 6, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fastkd.embedding_mixup.default, (ids, table, permutation, lam, -1))
    arguments = (grad, ids, permutation, lam, 9, 2)
    torch.library.opcheck(torch.ops.fastkd.embedding_mixup_backward.default, arguments)


def test_compiles_into_one_graph_for_every_batch_size():
    def step(ids, table, permutation, lam):
        return embedding_mixup(ids, table * 2, permutation, lam, padding_idx=0).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    table = torch.randn(30, 20)
    for rows, tokens in ((3, 5), (8, 7), (21, 11)):
        batch = samples.permutation(rows), samples.lam(rows)
        ids = samples.ids((rows, tokens), 30)
        eager, fast = table.clone().requires_grad_(), table.clone().requires_grad_()
        want, got = step(ids, eager, *batch), compiled(ids, fast, *batch)
        want.sum().backward()
        got.sum().backward()
        assert torch.equal(got, want)
        assert torch.equal(fast.grad, eager.grad)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 2
    torch._dynamo.reset()


def test_compiles_with_inductor_and_uses_the_result():
    ids, permutation, lam = samples.ids((4, 6), 9), samples.permutation(4), samples.lam(4)

    def step(table):
        return embedding_mixup(ids, table.sin(), permutation, lam).exp().sum()

    eager = torch.randn(9, 40, requires_grad=True)
    fast = eager.detach().clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(fast).backward()
    step(eager).backward()
    assert torch.allclose(fast.grad, eager.grad, rtol=1e-5, atol=1e-5)


@fused
def test_offsets_beyond_two_to_the_31():
    code = """
import torch
from fastkd.losses import embedding_mixup
rows, stride = 33000, 70000  # 4.6 GB of address space, of which only the rows are ever touched
table = torch.empty_strided((rows, 40), (stride, 1), dtype=torch.float16)
table.copy_(torch.randn(rows, 40))
ids, permutation = torch.randint(32000, rows, (4, 7)), torch.tensor([1, 0, 3, 2])
got, want = (embedding_mixup(ids, t, permutation, 0.25) for t in (table, table.contiguous()))
assert torch.equal(got, want)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
