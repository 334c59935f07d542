"""topk_kl_div on every backend against its float64 reference, and what its documentation promises about values."""

import math
from functools import partial
from itertools import product

import backends
import pytest
import topk_kl_div_samples as samples
import torch
from backends import BACKENDS, DTYPES, device_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from fastkd.losses import TopkKLDivLoss, kl_div, topk_kl_div

INF = float("inf")
NAN = float("nan")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, interpreting rows that the kernel then leaves out
]
check = partial(backends.check, "topk_kl_div")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with samples.answering(request.param):
        yield request.param


def evaluate(backend, *tensors, **options):
    return backends.evaluate(topk_kl_div, *tensors, device=device_of(backend), **options)


def some_rows(k=4, vocabulary=40, seed=0, rows=6):
    """Student and teacher logits (rows, V), and ids and log-probabilities of the teacher's k most likely columns."""
    student, teacher = torch.randn(2, rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    values, ids = teacher.log_softmax(-1).topk(k)
    return student, teacher, ids, values


OPTIONS = samples.options()
CASES = [
    *(("cpu", size, ("plain", "everything") if size[0] > 1000 else tuple(OPTIONS)) for size in samples.SIZES),
    ("triton", (3, 2), ("plain",)),  # all that the interpreter has time for
    ("triton", (33, 5), ("everything",)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tail", "divergence"), samples.PAIRS)
@pytest.mark.parametrize(("backend", "size", "options"), CASES, indirect=["backend"])
def test_rows_match_the_float64_reference(backend, size, options, tail, divergence, dtype):
    for each in map(OPTIONS.get, options):
        tensors = samples.rows(*size, dtype, each.get("temperature", 1.0))
        check(
            backend,
            samples.at_loss_temperature,
            *tensors,
            tail=tail,
            divergence=divergence,
            reduction="none",
            **each,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("backend", "vocabulary", "tail"),
    [*product(["cpu"], [64, 1000], samples.TAILS), ("triton", 33, "bucket")],
    indirect=["backend"],
)
def test_reductions_match_the_float64_reference(backend, vocabulary, tail, reduction, dtype):
    finite = torch.tensor([0, 1, 2, 3, 4, 12, 13, 14, 15])
    tensors = [x[finite] for x in samples.rows(vocabulary, 6, dtype)]
    for options in ({}, {"mask": torch.arange(9) != 3}, {"labels": torch.arange(9) - 1, "ignore_index": -1}):
        check(backend, topk_kl_div, *tensors, tail=tail, reduction=reduction, **options)
    if reduction == "mean":
        for normalizer in (4.0, torch.tensor(11.0)):
            check(backend, topk_kl_div, *tensors, tail=tail, normalizer=normalizer)


@pytest.mark.parametrize(("tail", "divergence"), samples.PAIRS)
def test_is_the_textbook_formula(tail, divergence):
    """Written down from probabilities, in float64, by nothing that the package has."""
    student, teacher, ids, _ = some_rows()
    student, teacher = student.double(), teacher.double()
    q, p = (student / 2).softmax(-1).gather(-1, ids), (teacher / 2).softmax(-1).gather(-1, ids)
    values = p.log()
    if tail == "renormalize":
        q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    if tail == "bucket":
        q, p = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1) for x in (q, p))
    m = 0.3 * p + 0.7 * q
    wanted = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "jsd": 0.3 * p * (p / m).log() + 0.7 * q * (q / m).log(),
    }[divergence]
    options = {"temperature": 2.0, "teacher_temperature": 2.0, "reduction": "none", "beta": 0.3}
    for dtype in (torch.float64, torch.float32):
        got = topk_kl_div(student.to(dtype), ids, values.to(dtype), tail=tail, divergence=divergence, **options)
        torch.testing.assert_close(got.double(), 4 * wanted.sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", samples.TAILS)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_with_every_column_listed_it_is_kl_div(backend, divergence, tail):
    student, teacher, ids, values = some_rows(k=40)
    if tail == "zero" and divergence != "forward":
        return
    options = {"divergence": divergence, "temperature": 1.0, "reduction": "none"}
    wanted = backends.evaluate(kl_div, student, teacher, **options)
    got = evaluate(backend, student, ids, values, tail=tail, **options)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher_temperature", [1.0, 0.5, 3.0])
def test_renormalised_values_are_taken_to_the_temperature(backend, teacher_temperature):
    student, teacher, ids, _ = some_rows()
    listed = [x.gather(-1, ids) for x in (student, teacher)]
    wanted = kl_div(*listed, temperature=3.0, reduction="none")
    cached = teacher / teacher_temperature
    for values in (cached, cached.log_softmax(-1)):
        options = {"temperature": 3.0, "teacher_temperature": teacher_temperature, "reduction": "none"}
        got, _ = evaluate(backend, student, ids, values.gather(-1, ids), tail="renormalize", **options)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", samples.TAILS)
def test_logits_with_their_logsumexp_are_log_probabilities(backend, tail):
    student, teacher, ids, values = some_rows()
    wanted = evaluate(backend, student, ids, values, tail=tail)
    raw = teacher.gather(-1, ids)
    got = evaluate(backend, student, ids, raw, tail=tail, teacher_logsumexp=teacher.logsumexp(-1))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tail", "divergence"), samples.PAIRS)
def test_order_of_the_ids_and_padding_change_nothing(backend, tail, divergence):
    student, _, ids, values = some_rows()
    wanted = evaluate(backend, student, ids, values, tail=tail, divergence=divergence, reduction="none")
    shuffled = torch.tensor([2, 0, 4, 3, 1])
    padded = torch.cat((ids, torch.full((6, 1), -1)), 1)[:, shuffled].int()
    filled = torch.cat((values, torch.full((6, 1), NAN)), 1)[:, shuffled]
    got = evaluate(backend, student, padded, filled, tail=tail, divergence=divergence, reduction="none")
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gap", [5.0, 30.0, 300.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_bucket_with_hardly_any_student_mass_is_exact(backend, divergence, gap):
    """The rest of the vocabulary far below the listed columns: 1 − Σ q would be rounding, or nothing at all."""
    student, _, ids, values = some_rows(rows=32)
    student.scatter_add_(1, ids, torch.full(ids.shape, gap))
    check(backend, topk_kl_div, student, ids, values, divergence=divergence, reduction="none")


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_teacher_without_a_rest_stays_finite(backend, divergence):
    """Log-probabilities whose sum rounds to 1, or beyond."""
    student, _, ids, _ = some_rows()
    for values in (torch.full((6, 4), -INF), torch.full((6, 4), math.log(0.2503)), torch.full((6, 4), math.log(0.25))):
        values = values.clone()
        values[:, 0] = torch.where(values[:, 0] == -INF, 0.0, values[:, 0])
        if divergence == "reverse":
            values = values.clamp(min=-50)
        loss, grad = evaluate(backend, student, ids, values, divergence=divergence, reduction="none")
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        assert grad.any(1).all()


def test_a_bucket_no_student_has_columns_for_exists_in_neither_model(backend):
    student, _, ids, values = some_rows()
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, ids, False)
    masked = student.masked_fill(others, -INF)
    got = evaluate(backend, masked, ids, values, reduction="none")
    wanted = evaluate(backend, student, ids, values, tail="renormalize", reduction="none")
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_row_without_ids_is_all_bucket(backend):
    student, _, ids, values = some_rows()
    for tail in samples.TAILS:
        loss, grad = evaluate(backend, student, ids.clamp(max=-1), values, tail=tail, reduction="none")
        assert loss.eq(0).all()
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_one_id_has_a_loss(backend):
    """Which it has not when renormalised: that is refused."""
    student, _, ids, values = some_rows(k=1)
    for tail in ("zero", "bucket"):
        loss, grad = evaluate(backend, student, ids, values, tail=tail, reduction="none")
        assert loss.abs().min() > 1e-3
        assert grad.any(1).all()


@pytest.mark.parametrize("tail", samples.TAILS)
def test_gradient_outside_the_ids(backend, tail):
    student, _, ids, values = some_rows()
    _, grad = evaluate(backend, student, ids, values, tail=tail, reduction="none")
    outside = torch.ones_like(student, dtype=torch.bool).scatter_(1, ids, False)
    assert grad[outside].any() == (tail != "renormalize")
    if tail == "bucket":
        torch.testing.assert_close(grad.sum(-1), torch.zeros(6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"tail": "renormalize"},
        {"tail": "zero"},
        {"teacher_logsumexp": torch.full((6,), 0.5)},
        {"divergence": "reverse"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "beta": 0.2},
        {"tail": "renormalize", "temperature": 1.5},
        {"tail": "renormalize", "teacher_temperature": 1.5},
        {"labels": torch.tensor([1, -100, 2, 0, 3, 3])},
        {"labels": torch.tensor([1, 3, 2, 0, 1, 1]), "ignore_index": 2},
        {"mask": torch.tensor([1, 1, 0, 1, 1, 1])},
        {"reduction": "sum"},
        {"normalizer": 2.0},
        {"tail": "renormalize", "temperature": 1.5, "scale_by_temperature": False},
    ],
    ids=str,
)
def test_every_argument_changes_loss_and_gradient(backend, change):
    student, _, ids, values = some_rows()
    simpler = dict([*change.items()][:-1]) if len(change) > 1 else {}
    before, after = (evaluate(backend, student, ids, values, **options) for options in (simpler, change))
    for old, new in zip(before, after, strict=True):
        assert not torch.allclose(old, new, rtol=1e-3)


def test_module_computes_what_the_function_does():
    student, _, ids, values = some_rows()
    labels = torch.tensor([1, 3, -1, 0, 1, 1])
    options = {"temperature": 3.0, "teacher_temperature": 3.0, "divergence": "jsd", "beta": 0.2, "ignore_index": -1}
    module = TopkKLDivLoss(reduction="sum", scale_by_temperature=False, **options)
    extra = {"labels": labels, "teacher_logsumexp": torch.full((6,), 0.1)}
    want = topk_kl_div(student, ids, values, reduction="sum", scale_by_temperature=False, **extra, **options)
    assert torch.equal(module(student, ids, values, **extra), want)
    assert "bucket" in repr(module)


@pytest.mark.parametrize("tail", samples.TAILS)
def test_a_nan_stays_in_its_row(backend, tail):
    student, _, ids, values = some_rows()
    clean = evaluate(backend, student, ids, values, tail=tail, reduction="none")
    others = torch.tensor([0, 1, 2, 4, 5])
    for broken in ("student", "teacher"):
        logits, cached = student.clone(), values.clone()
        if broken == "student":
            logits[3, ids[3, 0]] = NAN
        else:
            cached[3, 0] = NAN
        loss, grad = evaluate(backend, logits, ids, cached, tail=tail, reduction="none")
        assert loss[3].isnan()
        assert grad[3, ids[3]].isnan().all()
        assert torch.equal(loss[others], clean[0][others])
        assert torch.equal(grad[others], clean[1][others])
        masked = evaluate(backend, logits, ids, cached, tail=tail, mask=torch.arange(6) != 3)
        assert all(x.isfinite().all() for x in masked)


def test_a_nan_outside_the_ids_reaches_whoever_reads_it(backend):
    student, _, ids, values = some_rows()
    student[3, next(c for c in range(40) if c not in ids[3])] = NAN
    for tail in samples.TAILS:
        loss, _ = evaluate(backend, student, ids, values, tail=tail, reduction="none")
        assert loss.isnan().tolist() == [tail != "renormalize" and row == 3 for row in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tail", samples.TAILS)
def test_nothing_valid_gives_zero_with_a_gradient_attached(backend, tail, dtype):
    for shape in ((3, 7), (0, 7), (2, 0, 300)):
        student = torch.randn(shape, dtype=dtype, device=device_of(backend), requires_grad=True)
        ids = torch.arange(4, device=student.device).expand(*shape[:-1], 4)
        mask = torch.zeros(shape[:-1], device=student.device)
        loss = topk_kl_div(student, ids, torch.full(ids.shape, -2.0, device=student.device), tail=tail, mask=mask)
        loss.backward()
        assert loss.item() == 0.0
        assert student.grad.shape == student.shape
        assert not student.grad.any()


def test_values_of_another_dtype_than_the_student(backend):
    student, _, ids, values = some_rows()
    rounded = values.half()
    for dtype in DTYPES:
        wanted = evaluate(backend, student.to(dtype), ids, rounded.float(), reduction="none")
        got = evaluate(backend, student.to(dtype), ids, rounded, reduction="none")
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_rows_whose_first_columns_do_not_exist(backend, divergence):
    """Every lane of the running maximum begins at nothing, and later meets logits below 0."""
    student, _, ids, values = some_rows(vocabulary=1100, rows=2)
    student = student / 100 - 88.7  # e^88.7 is 2^128, for which a float32 has infinity
    student[:, :600] = -INF
    ids = ids % 400 + 650
    ids += torch.arange(4) * 3
    check(backend, topk_kl_div, student, ids.sort(-1).values + torch.arange(4), values, reduction="none")


finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(finite, finite), min_size=3, max_size=40),
    st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e3]),
    st.sampled_from(samples.PAIRS),
)
def test_finite_logits_give_finite_results(backend, pairs, temperature, pair):
    student, teacher = torch.tensor(pairs).T.contiguous().unbind()
    tail, divergence = pair
    values, ids = (teacher / temperature).log_softmax(-1).topk(2)
    options = {"temperature": temperature, "teacher_temperature": temperature, "tail": tail, "divergence": divergence}
    loss, grad = evaluate(backend, student[None], ids[None], values[None], **options)
    assert math.isfinite(loss)
    assert grad.isfinite().all()
    if tail != "zero":
        assert loss >= -1e-3 * temperature**2


def test_zero_tail_may_be_negative():
    student, _, ids, values = some_rows(k=1)
    student.scatter_(1, ids, 30.0)
    loss = topk_kl_div(student, ids, values, tail="zero", reduction="none")
    assert_close(loss, (values.exp() * values)[:, 0], loss)
    assert (loss < 0).all()
