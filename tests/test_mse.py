"""mse over many pairs on every backend of this machine against its float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, DTYPES, answering, device_of, fused, threads
from tolerance import GRADIENT, assert_close

from fastkd.losses import mse

SHAPES = [(6, 5, 7), (6, 5, 48), (6, 5, 1), (6, 5, 2100)]
MATRICES = [(17, 33), (300,), (2, 3, 4, 5)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned():
    """Fill fresh memory with NaN, so that nothing unwritten can pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with answering("mse", request.param):
        yield request.param


def pairs(shapes, dtype=torch.float32, seed=0):
    """Students and teachers in storage wider than their rows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(2, *shape[:-1], shape[-1] + 3, generator=generator)[..., : shape[-1]] for shape in shapes]
    return [d[0].to(dtype) for d in drawn], [d[1].to(dtype) for d in drawn]


def evaluate(students, teachers, device="cpu", dtype=None, scale=1.5, **options):
    students = [s.detach().to(device, dtype or s.dtype).requires_grad_() for s in students]
    teachers = [t.to(device, s.dtype) for s, t in zip(students, teachers, strict=True)]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    total, values = mse(students, teachers, **options)
    grads = torch.autograd.grad(total * scale, students)
    return tuple(t.detach().cpu() for t in (total, values, *grads))


MASK = torch.arange(30).reshape(6, 5) % 3 != 1
OPTIONS = [{}, {"mask": MASK}, {"weights": [0.5, 2.0, 0.0, 3.0]}, {"mask": MASK, "normalizer": 7.5}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [*OPTIONS, {"reduction": "sum"}], ids=str)
def test_matches_the_float64_reference(backend, options, dtype):
    students, teachers = pairs(SHAPES, dtype)
    actual = evaluate(students, teachers, device=device_of(backend), **options)
    with answering("mse", "reference"):
        exact = evaluate(students, teachers, dtype=torch.float64, **options)
        plain = evaluate(students, teachers, **options)
    for results in zip(actual, exact, plain, strict=True):
        assert_close(*results, GRADIENT)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_agrees_with_mse_loss_whatever_the_shapes(backend, dtype):
    students, teachers = pairs(MATRICES, dtype)
    total, values, *grads = evaluate(students, teachers, device=device_of(backend), scale=1.0)
    leaves = [s.detach().double().requires_grad_() for s in students]
    wanted = [F.mse_loss(s, t.double()) for s, t in zip(leaves, teachers, strict=True)]
    torch.testing.assert_close(values.double(), torch.stack(wanted).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(total.double(), sum(wanted).detach(), rtol=1e-5, atol=0)
    for got, want in zip(grads, torch.autograd.grad(sum(wanted), leaves), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps * 2, atol=1e-7)


def test_weights_and_mask_may_have_any_stride(backend):
    students, teachers = pairs([(3, 5), (3, 7)])
    device = device_of(backend)
    mask = torch.tensor([True, True, False, True, False, False])[::2]
    for weights in (torch.tensor([1.0, 100.0, 3.0, 4.0])[::2], torch.tensor(2.0).expand(2)):
        strided = evaluate(students, teachers, device=device, weights=weights, mask=mask)
        dense = evaluate(students, teachers, device=device, weights=weights.tolist(), mask=mask.clone())
        assert all(map(torch.equal, strided, dense))
        torch.testing.assert_close(dense[0], (weights * dense[1]).sum())


def test_values_are_unweighted_and_detached(backend):
    students, teachers = pairs(SHAPES)
    total, values, *_ = evaluate(students, teachers, device=device_of(backend), weights=[0.5, 2.0, 0.0, 3.0])
    torch.testing.assert_close(total, (values * torch.tensor([0.5, 2.0, 0.0, 3.0])).sum())
    assert not mse([students[0].requires_grad_()], teachers[:1])[1].requires_grad


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_masked_rows_stay_out_of_the_arithmetic(backend, dtype):
    students, teachers = pairs(SHAPES, dtype)
    clean = evaluate(students, teachers, device=device_of(backend), mask=MASK)
    for tensor in (*students, *teachers[:1]):
        tensor[~MASK] = float("nan")
    for got, want in zip(evaluate(students, teachers, device=device_of(backend), mask=MASK), clean, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shapes", [[(3, 4)], [(0, 4), (0, 2)]], ids=str)
def test_nothing_valid_gives_zero_with_gradients_attached(backend, shapes):
    students, teachers = pairs(shapes)
    mask = torch.zeros(shapes[0][0], dtype=torch.bool)
    total, values, *grads = evaluate(students, teachers, device=device_of(backend), mask=mask)
    assert total.item() == 0.0
    assert not values.any()
    for grad, shape in zip(grads, shapes, strict=True):
        assert grad.shape == shape
        assert not grad.any()


def test_a_frozen_student_costs_no_gradient(backend):
    students, teachers = ([t.to(device_of(backend)) for t in side] for side in pairs(SHAPES[:2]))
    students[1].requires_grad_()
    total, _ = mse(students, teachers)
    (grad,) = torch.autograd.grad(total, students[1])
    torch.testing.assert_close(grad, 2 * (students[1] - teachers[1]).detach() / grad.numel())


@fused
def test_second_derivative_is_refused(backend):
    student = torch.randn(3, 4, device=device_of(backend), requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(mse([student], [student.detach() + 1])[0], student, create_graph=True)


def test_derivatives_of_the_reference():
    students, teachers = pairs([(3, 4), (2, 3)], torch.float64)
    leaves = [s.clone().requires_grad_() for s in students]
    loss = lambda *s: mse(s, teachers, weights=[2.0, 0.5])[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@fused
@pytest.mark.parametrize("need", [[True, False], [False, False]], ids=str)
def test_registration_is_honest(backend, need):
    students, teachers = ([t.to(device_of(backend)) for t in side] for side in pairs([(6, 5), (6, 9)]))
    ones = torch.ones(2, device=students[0].device)
    valid = torch.arange(6, device=ones.device) != 2
    torch.library.opcheck(torch.ops.fastkd.mse.default, (students, teachers, valid, ones, 5 * ones, need))


@fused
def test_the_number_of_threads_changes_no_bit():
    students, teachers = pairs([(700, 90)])
    with threads(1):
        one = evaluate(students, teachers)
    with threads(2):
        two = evaluate(students, teachers)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
def test_mixed_dtypes_are_promoted(dtypes):
    (student,), (teacher,) = pairs([(4, 9)])
    wide = torch.promote_types(*dtypes)
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    assert torch.equal(mse([student], [teacher])[0], mse([student.to(wide)], [teacher.to(wide)])[0])
