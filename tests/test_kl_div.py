"""kl_div on every backend against its float64 reference, and what its documentation promises about values."""

import math
from functools import partial
from itertools import product

import backends
import kl_div_samples as samples
import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, DTYPES, device_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from fastkd.losses import KLDivLoss, kl_div

INF = float("inf")
NAN = float("nan")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, interpreting rows that the kernel then leaves out
]
check = partial(backends.check, "kl_div")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with samples.answering(request.param):
        yield request.param


def evaluate(backend, student, teacher, **options):
    return backends.evaluate(kl_div, student, teacher, device=device_of(backend), **options)


def launch(
    backend, student, teacher, *, divergence="forward", labels=None, weight=0.0, need_grad=True, need_stats=True
):
    """The op itself: losses, gradient and statistics of every row at T = 2."""
    device = device_of(backend)
    options = (None, 2.0, samples.DIVERGENCES.index(divergence), 0.3, None, labels, weight, 0, None, True)
    op = torch.ops.fastkd.kl_div
    return [output.cpu() for output in op(student.to(device), teacher.to(device), *options, need_grad, need_stats)]


VOCABULARIES = [*product(["cpu"], samples.VOCABULARIES), *product(["triton"], [1, 3, 16, 17, 33])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
@pytest.mark.parametrize(("backend", "vocabulary"), VOCABULARIES, indirect=["backend"])
def test_rows_match_the_float64_reference(backend, vocabulary, divergence, dtype):
    options = samples.options(vocabulary)
    if backend == "triton" and (vocabulary, dtype) != (33, torch.float32):
        options = {"everything": options["everything"]}  # all the interpreter has time for
    for each in options.values():
        check(backend, kl_div, *samples.rows(vocabulary, dtype), divergence=divergence, reduction="none", **each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("backend", "vocabulary"), [("cpu", 3), ("cpu", 64), ("cpu", 1000), ("triton", 33)], indirect=["backend"]
)
def test_reductions_match_the_float64_reference(backend, vocabulary, reduction, dtype):
    logits = [model[samples.FINITE] for model in samples.rows(vocabulary, dtype)]
    labels = samples.labels(vocabulary)[samples.FINITE]
    for options in ({}, {"labels": labels, "cross_entropy_weight": 0.5}, {"mask": torch.arange(9) != 3}):
        check(backend, kl_div, *logits, reduction=reduction, **options)
    if reduction == "mean":
        for normalizer in (4.0, torch.tensor(11.0)):
            check(backend, kl_div, *logits, normalizer=normalizer)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_rows_that_nearly_agree_match_the_reference(backend, divergence, temperature):
    student, noise = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(3))
    logits = student * 3 + 20, student * 3 + 0.01 * noise
    check(backend, kl_div, *logits, divergence=divergence, temperature=temperature, reduction="none")


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_rows_far_apart_match_the_reference(backend, divergence, temperature):
    logits = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(1)) * 60
    check(backend, kl_div, *logits, divergence=divergence, temperature=temperature, reduction="none")


@pytest.mark.parametrize(
    ("backend", "vocabulary"), [("cpu", 3), ("cpu", 33), ("cpu", 1000), ("triton", 33)], indirect=["backend"]
)
def test_stats_match_the_float64_reference(backend, vocabulary):
    student, teacher = samples.rows(vocabulary)
    student[11, 0] = teacher[11, 0] = 200.0
    options = {"labels": samples.labels(vocabulary), "temperature": samples.temperatures(), "reduction": "none"}
    device = device_of(backend)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    _, stats = kl_div(student.to(device), teacher.to(device), return_stats=True, **moved)
    with backends.answering("kl_div", "reference"):
        _, plain = kl_div(student, teacher, return_stats=True, **options)
        _, exact = kl_div(student.double(), teacher.double(), return_stats=True, **options)
    for results in zip(stats, exact, plain, strict=True):
        assert_close(results[0].cpu(), *results[1:])
    assert stats.agreement[11] == 1.0


def test_stats_of_a_mean_are_means_over_valid_rows():
    student, teacher = torch.randn(2, 6, 9).unbind()
    mask = torch.tensor([True, False, True, True, False, True])
    _, stats = kl_div(student, teacher, mask=mask, return_stats=True)
    _, rows = kl_div(student[mask], teacher[mask], return_stats=True, reduction="none")
    assert torch.allclose(stats.student_entropy, rows.student_entropy.mean())
    assert torch.allclose(stats.agreement, rows.agreement.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_torch_and_scipy_conventions(dtype):
    student, teacher = torch.randn(2, 8, 50, dtype=dtype).unbind()
    p_s, p_t = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    m = 0.3 * p_t + 0.7 * p_s
    forward = 4 * F.kl_div(p_s.log(), p_t, reduction="batchmean")
    reverse = 4 * F.kl_div(p_t.log(), p_s, reduction="batchmean")
    jsd = 0.3 * F.kl_div(m.log(), p_t, reduction="batchmean") + 0.7 * F.kl_div(m.log(), p_s, reduction="batchmean")
    assert torch.allclose(kl_div(student, teacher, temperature=2.0), forward, rtol=1e-5)
    assert torch.allclose(kl_div(student, teacher, temperature=2.0, divergence="reverse"), reverse, rtol=1e-5)
    got = kl_div(student, teacher, temperature=2.0, divergence="jsd", beta=0.3)
    assert torch.allclose(got, 4 * jsd, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.5},
        {"temperature": torch.tensor([1.0, 1.0, 1.0, 1.5])},
        {"divergence": "reverse"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "beta": 0.2},
        {"labels": torch.tensor([1, -100, 2, 0])},
        {"labels": torch.tensor([1, 3, 2, 0]), "ignore_index": 2},
        {"labels": torch.tensor([1, 3, 2, 0]), "cross_entropy_weight": 0.5},
        {"mask": torch.tensor([1, 1, 0, 1])},
        {"reduction": "sum"},
        {"normalizer": 2.0},
        {"temperature": 1.5, "scale_by_temperature": False},
    ],
    ids=str,
)
def test_every_argument_changes_loss_and_gradient(backend, change):
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).unbind()
    simpler = dict([*change.items()][:-1]) if len(change) > 1 else {}
    before, after = (evaluate(backend, student, teacher, **options) for options in (simpler, change))
    for old, new in zip(before, after, strict=True):
        assert not torch.allclose(old, new, rtol=1e-3)


def test_module_computes_what_the_function_does():
    student, teacher, labels = *torch.randn(2, 4, 6).unbind(), torch.tensor([1, 3, -1, 0])
    options = {"temperature": 3.0, "divergence": "jsd", "beta": 0.2, "ignore_index": -1, "cross_entropy_weight": 0.1}
    module = KLDivLoss(reduction="sum", scale_by_temperature=False, **options)
    want = kl_div(student, teacher, labels=labels, reduction="sum", scale_by_temperature=False, **options)
    assert torch.equal(module(student, teacher, labels=labels), want)
    assert "jsd" in repr(module)
    assert "beta=0.2" in repr(module)


@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_a_column_absent_from_both_models_might_as_well_not_be_there(backend, divergence):
    student, teacher = (logits[:1] for logits in samples.rows(40))
    present = launch(backend, student[:, 20:], teacher[:, 20:], divergence=divergence)
    student[:, :20] = teacher[:, :20] = -INF
    loss, grad, stats = launch(backend, student, teacher, divergence=divergence)
    torch.testing.assert_close([loss, grad[:, 20:], stats], present)
    assert grad[:, :20].eq(0).all()


@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_rows_that_begin_with_absent_columns_and_go_on_below_zero(backend, divergence):
    """2^128 overflows: no running maximum may be counted from the 0 that stands for nothing met so far."""
    vocabulary = 1100 if backend == "cpu" else 40
    student, noise = torch.randn(2, 4, vocabulary, generator=torch.Generator().manual_seed(5)) * 0.05 - 88.7
    teacher = student - 3 * noise / 88.7
    student[:, : vocabulary // 2] = teacher[:, : vocabulary // 2] = -INF
    student[2, ::16] = teacher[2, ::16] = -INF
    check(backend, kl_div, student, teacher, divergence=divergence, reduction="none")


def test_mass_on_a_column_the_other_model_lacks_is_infinite_even_if_it_underflows(backend):
    lacking, full = torch.zeros(1, 20), torch.zeros(1, 20)
    lacking[0, 3], full[0, 3] = -INF, -1e4
    for infinite, finite, *logits in (("forward", "reverse", lacking, full), ("reverse", "forward", full, lacking)):
        loss, grad, stats = launch(backend, *logits, divergence=infinite)
        assert loss.tolist() == [INF]
        assert grad.eq(0).all()
        assert stats.isfinite().all()
        for divergence in (finite, "jsd"):
            loss, grad, _ = launch(backend, *logits, divergence=divergence)
            assert loss.isfinite().all()
            assert grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_columns_masked_by_the_lowest_finite_number(backend, divergence, dtype, temperature):
    lowest = torch.finfo(dtype).min
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    student, teacher = (logits[:3].contiguous() for logits in samples.rows(33, dtype))
    student[0, :20] = teacher[0, :20] = lowest
    student[1, 16], teacher[2, 16] = lowest, lowest
    loss, grad = evaluate(backend, student, teacher, **options)
    assert not loss.isnan().any()
    assert grad.isfinite().all()
    student[0, :20] = teacher[0, :20] = -INF
    absent_loss, absent_grad = evaluate(backend, student, teacher, **options)
    assert torch.equal(loss[0], absent_loss[0])
    assert torch.equal(grad[0], absent_grad[0])


@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_equal_models_have_no_loss_and_no_gradient(backend, divergence):
    student = samples.rows(50)[0][[0, 1, 2, 4, 5, 8]]
    loss, grad, stats = launch(backend, student, student.clone(), divergence=divergence)
    assert loss.eq(0).all()
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)
    assert torch.equal(stats[1], stats[2])
    assert stats[3].tolist() == [1.0] * 5 + [0.0]  # of the last row nothing exists


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
@pytest.mark.parametrize("vocabulary", [5, 33, 300])
def test_a_nan_stays_in_its_row(backend, vocabulary, divergence, which):
    logits = torch.randn(2, 5, vocabulary)
    clean = launch(backend, *logits, divergence=divergence)
    logits[which, 3, vocabulary // 2] = NAN
    loss, grad, stats = launch(backend, *logits, divergence=divergence)
    others = torch.tensor([0, 1, 2, 4])
    assert loss[3].isnan()
    assert grad[3].isnan().all()
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])
    assert torch.equal(stats[:, others], clean[2][:, others])
    masked, grad = evaluate(backend, *logits, divergence=divergence, mask=torch.tensor([1, 1, 1, 0, 1]))
    assert masked.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
@pytest.mark.parametrize("vocabulary", [5, 33, 300])
def test_one_empty_model_is_infinite_whatever_the_other_holds(backend, vocabulary, divergence, which):
    logits = torch.randn(2, 1, vocabulary)
    logits[which] = -INF
    logits[1 - which, 0, vocabulary // 2] = NAN
    loss, grad, stats = launch(backend, *logits, divergence=divergence)
    assert loss.eq(INF).all()
    assert grad.eq(0).all()
    assert stats.eq(0).all()


@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_a_row_of_nan_and_absent_columns_is_not_empty(backend, divergence):
    student = torch.full((1, 20), -INF)
    student[0, 4] = NAN
    loss, grad, _ = launch(backend, student, student.clone(), divergence=divergence)
    assert loss.isnan().all()
    assert grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_valid_gives_zero_with_a_gradient_attached(backend, dtype):
    for shape in ((3, 7), (0, 7), (2, 0, 300)):
        student = torch.randn(shape, dtype=dtype, device=device_of(backend), requires_grad=True)
        loss = kl_div(student, student.detach() + 1, mask=torch.zeros(shape[:-1], device=student.device))
        loss.backward()
        assert loss.item() == 0.0
        assert student.grad.shape == student.shape
        assert not student.grad.any()


finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=40),
    st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e3]),
    st.sampled_from(samples.DIVERGENCES),
)
def test_finite_logits_give_finite_results(backend, pairs, temperature, divergence):
    student, teacher = torch.tensor(pairs).T.contiguous().unbind()
    loss, grad = evaluate(backend, student[None], teacher[None], temperature=temperature, divergence=divergence)
    assert math.isfinite(loss)
    assert grad.isfinite().all()
    assert loss >= -1e-3 * temperature**2
