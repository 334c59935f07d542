"""mixup on every backend against its float64 reference, and what its documentation promises."""

from itertools import product

import mixup_samples as samples
import pytest
import torch
from backends import BACKENDS, DTYPES, answering, device_of, evaluate, fused, threads
from subprocesses import python
from tolerance import GRADIENT, VALUE, assert_close

from fastkd import reference
from fastkd.losses import mixup

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with answering("mixup", request.param):
        yield request.param


def check(backend, x, pairing="random"):
    """Each kind of example by itself: the large ones would hide the errors of the small ones."""
    options = {"permutation": samples.permutation(len(x), pairing), "lam": samples.lam(len(x))}
    actual = evaluate(mixup, x, device=device_of(backend), **options)
    with answering("mixup", "reference"):
        exact, plain = evaluate(mixup, x, dtype=torch.float64, **options), evaluate(mixup, x, **options)
    for kind in range(samples.KINDS):
        for factor, *results in zip((VALUE, GRADIENT), actual, exact, plain, strict=True):
            assert_close(*(result[kind :: samples.KINDS] for result in results), factor)


ON_EACH = [*product(["cpu"], samples.SHAPES), *product(["triton"], samples.SHAPES[:-1])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "shape"), ON_EACH, ids=str, indirect=["backend"])
def test_matches_the_float64_reference(backend, shape, dtype):
    for pairing in samples.PAIRINGS:
        check(backend, samples.examples(shape, dtype), pairing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_formula_as_users_write_it(backend, dtype):
    x, permutation = torch.randn(6, 4, 5, dtype=dtype, device=device_of(backend)), samples.permutation(6)
    permutation, lam = permutation.to(x.device), samples.lam(6).to(x)
    weight = lam[:, None, None]
    want = weight * x + (1 - weight) * x[permutation]
    assert torch.allclose(mixup(x, permutation, lam), want, rtol=1e-6, atol=1e-7)
    for number in (0.25, torch.tensor(0.25, device=x.device), torch.tensor(0.25, device=x.device).half()):
        want = 0.25 * x + 0.75 * x[permutation]
        assert torch.allclose(mixup(x, permutation, number), want, rtol=1e-6, atol=1e-7)


def test_float64_keeps_every_digit_of_lam():
    x, permutation = torch.randn(3, 2, dtype=torch.float64), torch.tensor([1, 2, 0])
    lam = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    assert torch.equal(mixup(x, permutation, lam), lam[:, None] * x + (1 - lam[:, None]) * x[permutation])
    assert torch.equal(mixup(x, permutation, 0.1), 0.1 * x + (1 - 0.1) * x[permutation])


@pytest.mark.parametrize("pairing", samples.PAIRINGS)
def test_derivatives_of_the_reference(pairing):
    x, lam = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), samples.lam(5).double()
    permutation = samples.permutation(5, pairing)
    assert torch.autograd.gradcheck(lambda x: mixup(x, permutation, lam), x)
    assert torch.autograd.gradgradcheck(lambda x: mixup(x, permutation, lam).pow(3), x)


def test_second_derivative(backend):
    permutation, lam = samples.permutation(7), samples.lam(7)

    def second(function, dtype, device="cpu"):
        x = samples.examples((7, 33)).mul(0.01).to(device, dtype).requires_grad_()
        cubed = function(x, permutation.to(device), lam.to(device)).pow(3)
        (grad,) = torch.autograd.grad(cubed.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0].cpu()

    exact, plain = second(reference.mixup, torch.float64), second(reference.mixup, torch.float32)
    assert_close(second(mixup, torch.float32, device_of(backend)), exact, plain, GRADIENT)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_nan_stays_in_its_example_and_where_that_is_the_partner(backend, dtype):
    x, upstream = torch.randn(2, 6, 35).to(device_of(backend), dtype)
    pair = torch.tensor([1, 2, 0, 4, 3, 5]).to(x.device), samples.lam(6).to(x.device)

    def run(x):
        mixed = mixup(x.requires_grad_(), *pair)
        return mixed.detach(), torch.autograd.grad(mixed, x, upstream)[0]

    clean, clean_grad = run(x.clone())
    x[1, 33] = float("nan")
    mixed, grad = run(x)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[:2, 33] = True
    assert torch.equal(mixed.isnan(), expected)
    assert torch.equal(mixed[~expected], clean[~expected])
    assert torch.equal(grad, clean_grad)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (4, 0, 2)], ids=str)
def test_empty_batches_and_examples(backend, shape):
    mixed, grad = evaluate(
        mixup,
        torch.randn(shape),
        device=device_of(backend),
        permutation=samples.permutation(shape[0]),
        lam=samples.lam(shape[0]),
    )
    assert mixed.shape == grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_stride_of_inputs_and_gradients(backend, dtype):
    wide = torch.randn(10, 8, 66).to(device_of(backend), dtype)
    pair = samples.permutation(5).to(wide.device), samples.lam(5).to(wide.device)
    strided = [each.repeat_interleave(2)[::2] for each in pair]
    for view in (wide[::2], wide[:5, :, ::2], wide[:5].transpose(1, 2), wide[:5, :1].expand(-1, 8, -1)):
        assert torch.equal(mixup(view, *strided), mixup(view.contiguous(), *pair))
    x = wide[:5].clone().requires_grad_()
    for upstream in (wide.new_ones(()).expand(5, 8, 66), wide[5:, :1].expand(-1, 8, -1), wide[::2]):
        (got,) = torch.autograd.grad(mixup(x, *pair), x, upstream)
        (want,) = torch.autograd.grad(mixup(x, *pair), x, upstream.contiguous())
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 3), (9, 70000), (2, 300001)], ids=str)
def test_results_do_not_depend_on_the_threads(shape, dtype):
    x = samples.examples(shape, dtype)
    options = {"permutation": samples.permutation(len(x)), "lam": samples.lam(len(x))}
    with threads(2):
        many = evaluate(mixup, x, **options)
    with threads(1):
        one = evaluate(mixup, x, **options)
    assert all(map(torch.equal, one, many))


@fused
@pytest.mark.parametrize("transpose", [False, True])
def test_registration_is_honest(backend, transpose):
    device = device_of(backend)
    arguments = (torch.randn(6, 33), samples.permutation(6), samples.lam(6))
    x, *pair = (argument.to(device) for argument in arguments)
    torch.library.opcheck(torch.ops.fastkd.mixup.default, (x.requires_grad_(), *pair, transpose))


def test_compiles_with_inductor_and_uses_the_result():
    def step(x, permutation, lam):
        return mixup(x.sin(), permutation, lam).exp().sum()

    x, permutation, lam = torch.randn(5, 300), samples.permutation(5), samples.lam(5)
    eager, fast = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(fast, permutation, lam).backward()
    step(eager, permutation, lam).backward()
    assert torch.allclose(fast.grad, eager.grad, rtol=1e-5, atol=1e-6)


@fused
def test_offsets_beyond_two_to_the_31():
    python("-c", """
import torch
from fastkd.losses import mixup
rows, stride = 33000, 70000  # 4.6 GB of address space, of which only the examples are ever touched
x = torch.empty_strided((rows, 40), (stride, 1), dtype=torch.float16)
x.copy_(torch.randn(rows, 40))
permutation = torch.arange(rows).flip(0)
assert torch.equal(mixup(x, permutation, 0.25), mixup(x.contiguous(), permutation, 0.25))
""")  # fmt: skip


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_at_every_length_and_alignment(target):
    python("tests/mixup_lengths.py", FASTKD_CPU_TARGET=target)
