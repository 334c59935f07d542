"""embedding_mixup on every backend against its float64 reference, and what its documentation promises."""

from itertools import product

import mixup_samples as samples
import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, DTYPES, answering, device_of, evaluate, fused, threads
from subprocesses import python
from tolerance import GRADIENT, assert_close

from fastkd import reference
from fastkd.losses import embedding_mixup, mixup

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with answering("embedding_mixup", request.param), answering("mixup", request.param):
        yield request.param


def of_table(table, ids, permutation, lam, **options):
    """The function with what is differentiated first, as ``evaluate`` takes it."""
    return embedding_mixup(ids, table, permutation, lam, **options)


def check(backend, table, ids, padding_idx=None, pairing="random"):
    options = {"permutation": samples.permutation(len(ids), pairing), "lam": samples.lam(len(ids)), "ids": ids}
    options["padding_idx"] = padding_idx
    mixed, grad = evaluate(of_table, table, device=device_of(backend), **options)
    with answering("embedding_mixup", "reference"):
        exact, exact_grad = evaluate(of_table, table, dtype=torch.float64, **options)
        plain, plain_grad = evaluate(of_table, table, **options)
    assert_close(mixed, exact, plain)
    sizes = exact_grad.abs().sum(1)
    for rows in (sizes > sizes.median(), sizes <= sizes.median()):  # frequent rows would hide the errors of the others
        assert_close(grad[rows], exact_grad[rows], plain_grad[rows], GRADIENT)
    assert not grad[~torch.isin(torch.arange(len(table)), ids)].any()


ON_EACH = [*product(["cpu"], samples.TABLES), *product(["triton"], samples.TABLES[:4])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "shape"), ON_EACH, ids=str, indirect=["backend"])
def test_matches_the_float64_reference(backend, shape, dtype):
    table = samples.examples(shape, dtype)
    for pairing in samples.PAIRINGS:
        check(backend, table, samples.ids((12, 12), shape[0]), pairing=pairing)
    if backend == "cpu":
        check(backend, table, samples.ids((12, 40), shape[0]))
    check(backend, table, samples.ids((7,), shape[0]))
    check(backend, table, samples.ids((3, 2, 5), shape[0]), padding_idx=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
def test_is_a_lookup_followed_by_a_mixup(backend, padding_idx, dtype):
    ids, *pair = (each.to(device_of(backend)) for each in (samples.ids((12, 40), 30), *samples.pair(12)))
    table = torch.randn(30, 20, dtype=torch.float64).to(ids.device, dtype).requires_grad_()
    got = embedding_mixup(ids, table, *pair, padding_idx=padding_idx)
    want = mixup(F.embedding(ids, table, padding_idx), *pair)
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


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_second_derivative(backend, padding_idx):
    inputs = samples.ids((12, 40), 30), *samples.pair(12)

    def second(function, dtype, device="cpu"):
        table = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
        ids, *pair = (each.to(device) for each in inputs)
        cubed = function(ids, table, *pair, padding_idx=padding_idx).pow(3)
        (grad,) = torch.autograd.grad(cubed.sum(), table, create_graph=True)
        weights = torch.linspace(0.5, 1.5, grad.numel(), dtype=dtype, device=device)  # of the padding row too
        return torch.autograd.grad((grad * weights.view(grad.shape)).sum(), table)[0].cpu()

    exact = second(reference.embedding_mixup, torch.float64)
    plain = second(reference.embedding_mixup, torch.float32)
    assert_close(second(embedding_mixup, torch.float32, device_of(backend)), exact, plain, GRADIENT)


def test_a_nan_stays_in_its_row(backend):
    ids, table = torch.tensor([[1, 2, 3], [4, 1, 0], [5, 5, 5]]), torch.randn(7, 33)
    table[1, 7] = float("nan")
    permutation = torch.tensor([1, 0, 2])
    ids, table, permutation = (each.to(device_of(backend)) for each in (ids, table, permutation))
    mixed = embedding_mixup(ids, table, permutation, 0.5)
    expected = torch.zeros(3, 3, 33, dtype=torch.bool)
    expected[:2, :2, 7] = True
    assert torch.equal(mixed.isnan().cpu(), expected)
    upstream = torch.randn_like(mixed)
    upstream[0, 2, 5] = float("nan")
    leaf = table.nan_to_num().requires_grad_()
    (grad,) = torch.autograd.grad(embedding_mixup(ids, leaf, permutation, 0.5), leaf, upstream)
    assert grad.isnan().nonzero().tolist() == [[0, 5], [3, 5]]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_empty_batches_leave_a_gradient_of_zeros(backend, shape):
    ids, (permutation, lam) = torch.zeros(shape, dtype=torch.int64), samples.pair(shape[0])
    options = {"ids": ids, "permutation": permutation, "lam": lam}
    mixed, grad = evaluate(of_table, torch.randn(5, 7), device=device_of(backend), **options)
    assert mixed.shape == (*shape, 7)
    assert grad.shape == (5, 7)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_stride_of_inputs_and_gradients(backend, dtype):
    wide = torch.randn(40, 70).to(device_of(backend), dtype)
    ids, *pair = (each.to(wide.device) for each in (samples.ids((10, 12), 20).T[:6], *samples.pair(6)))
    for table in (wide[:20, 3:36], wide[::2, :33], wide[:20, ::2], wide.T[:20, :33]):
        want = embedding_mixup(ids.contiguous(), table.contiguous(), *pair)
        assert torch.equal(embedding_mixup(ids, table, *pair), want)
    table = wide[:20, :33].clone().requires_grad_()
    for upstream in (wide.new_ones(()).expand(6, 10, 33), wide[:6, None, :33].expand(-1, 10, -1)):
        (got,) = torch.autograd.grad(embedding_mixup(ids, table, *pair), table, upstream)
        (want,) = torch.autograd.grad(embedding_mixup(ids, table, *pair), table, upstream.contiguous())
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_threads(dtype):
    permutation, lam = samples.pair(16)
    options = {"ids": samples.ids((16, 64), 700), "permutation": permutation, "lam": lam}
    table = torch.randn(700, 300).to(dtype)
    with threads(2):
        many = evaluate(of_table, table, **options)
    with threads(1):
        one = evaluate(of_table, table, **options)
    assert all(map(torch.equal, one, many))


@fused
def test_registration_is_honest(backend):
    inputs = samples.ids((4, 6), 9), *samples.pair(4), torch.randn(9, 5), torch.randn(4, 6, 5)
    ids, *pair, table, grad = (each.to(device_of(backend)) for each in inputs)
    torch.library.opcheck(torch.ops.fastkd.embedding_mixup.default, (ids, table.requires_grad_(), *pair, -1))
    arguments = (grad.requires_grad_(), ids, *pair, 9, 2)
    torch.library.opcheck(torch.ops.fastkd.embedding_mixup_backward.default, arguments)


def test_compiles_with_inductor_and_uses_the_result():
    ids, pair = samples.ids((4, 6), 9), samples.pair(4)

    def step(table):
        return embedding_mixup(ids, table.sin(), *pair).exp().sum()

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
    python("-c", code)
