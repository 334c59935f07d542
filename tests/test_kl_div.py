"""kl_div on every backend of this machine against its float64 reference, and what its documentation promises."""

import math
import os
import subprocess
import sys
from pathlib import Path

import kl_div_samples as samples
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import GRADIENT, assert_close

from fastkd.losses import KLDivLoss, kl_div
from fastkd.ops import _extension

INF = float("inf")
ROOT = Path(__file__).parent.parent
DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABELLED = {"labels": True, "cross_entropy_weight": 0.7, "temperature": 2.0}

fused = pytest.mark.skipif(_extension.fused_backend("cpu")[0] is None, reason="the compiled module is not built")


@pytest.fixture(autouse=True)
def poisoned():
    """Fill fresh memory with NaN, so that nothing unwritten can pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def evaluate(student, teacher, device="cpu", dtype=None, **options):
    """Loss and gradient of the logits moved to a device and, for references, to another dtype."""
    student = student.detach().to(device, dtype or student.dtype).requires_grad_()
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss = kl_div(student, teacher.to(device, student.dtype), **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=device).reshape(loss.shape)
    (grad,) = torch.autograd.grad((loss * weights).nan_to_num(posinf=0.0).sum(), student)
    return loss.detach().cpu(), grad.cpu()


def check(student, teacher, device, **options):
    loss, grad = evaluate(student, teacher, device, **options)
    exact_loss, exact_grad = evaluate(student, teacher, dtype=torch.float64, **options)
    plain_loss, plain_grad = plain(student, teacher, **options)
    assert_close(loss, exact_loss, plain_loss)
    assert_close(grad, exact_grad, plain_grad, GRADIENT)


def plain(student, teacher, **options):
    """The reference in the dtype under test: its own arithmetic in float32, its gradient rounded once at the end."""
    backend, _extension.backend = _extension.backend, lambda *_: "reference"
    try:
        return evaluate(student, teacher, **options)
    finally:
        _extension.backend = backend


def with_labels(options, vocabulary):
    return options | {"labels": samples.labels(vocabulary)} if options.get("labels") is True else options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
@pytest.mark.parametrize("vocabulary", samples.VOCABULARIES)
def test_rows_match_the_float64_reference(vocabulary, divergence, dtype, device):
    student, teacher = samples.rows(vocabulary, dtype)
    for options in (*samples.OPTIONS.values(), LABELLED):
        if "normalizer" not in options:
            options = with_labels(options, vocabulary)
            check(student, teacher, device, divergence=divergence, reduction="none", **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("vocabulary", [3, 64, 1000])
def test_reductions_match_the_float64_reference(vocabulary, reduction, dtype, device):
    keep = [0, 1, 2, 3, 4, 5, 12, 13, 14]  # the rows with a finite loss
    student, teacher = (logits[keep] for logits in samples.rows(vocabulary, dtype))
    labels = samples.labels(vocabulary)[keep]
    labels[5] = vocabulary - 1
    for options in ({}, {"labels": labels, "cross_entropy_weight": 0.5}, {"mask": torch.arange(9) != 3}):
        check(student, teacher, device, reduction=reduction, **options)
    if reduction == "mean":
        check(student, teacher, device, normalizer=4.0)
        check(student, teacher, device, normalizer=torch.tensor(11.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [3, 33, 1000])
def test_stats_match_the_float64_reference(vocabulary, device):
    student, teacher = samples.rows(vocabulary)
    student[11, 0] = teacher[11, 0] = 200.0
    options = {"labels": samples.labels(vocabulary), "temperature": samples.temperatures(), "reduction": "none"}
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    _, stats = kl_div(student.to(device), teacher.to(device), return_stats=True, **moved)
    _, exact = kl_div(student.double(), teacher.double(), return_stats=True, **options)
    for name, got, want in zip(stats._fields, stats, exact, strict=True):
        finite = want.isfinite()
        assert torch.equal(got.cpu().isfinite(), finite), name
        assert torch.allclose(got.cpu().double()[finite], want[finite], rtol=1e-5, atol=1e-5), name
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


@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
def test_derivatives_of_the_reference(divergence):
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64).unbind()
    student[1, 2] = teacher[1, 2] = -INF
    labels = torch.tensor([3, 0, -100, 5])

    def loss(logits):
        kept = torch.where(student == -INF, student, logits)
        return kl_div(kept, teacher, temperature=0.7, divergence=divergence, labels=labels, cross_entropy_weight=0.5)

    logits = student.nan_to_num(neginf=0.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@fused
def test_second_derivative_is_refused():
    student = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(kl_div(student, torch.randn(4, 6)), student, create_graph=True)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.5},
        {"divergence": "reverse"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "beta": 0.2},
        {"labels": torch.tensor([1, -100, 2, 0])},
        {"labels": torch.tensor([1, -100, 2, 0]), "ignore_index": 2},
        {"labels": torch.tensor([1, 3, 2, 0]), "cross_entropy_weight": 0.5},
        {"mask": torch.tensor([1, 1, 0, 1])},
        {"reduction": "sum"},
        {"normalizer": 2.0},
        {"temperature": 1.5, "scale_by_temperature": False},
    ],
    ids=str,
)
def test_every_argument_changes_loss_and_gradient(change):
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).unbind()
    if change.get("ignore_index") == 2:
        change = change | {"labels": torch.tensor([1, 3, 2, 0])}
    loss, grad = evaluate(student, teacher)
    changed_loss, changed_grad = evaluate(student, teacher, **change)
    assert not torch.allclose(loss, changed_loss, rtol=1e-3)
    assert not torch.allclose(grad, changed_grad, rtol=1e-3)


def test_module_computes_what_the_function_does():
    student, teacher, labels = *torch.randn(2, 4, 6).unbind(), torch.tensor([1, 3, -1, 0])
    options = {"temperature": 3.0, "divergence": "jsd", "beta": 0.2, "ignore_index": -1, "cross_entropy_weight": 0.1}
    module = KLDivLoss(reduction="sum", scale_by_temperature=False, **options)
    want = kl_div(student, teacher, labels=labels, reduction="sum", scale_by_temperature=False, **options)
    assert torch.equal(module(student, teacher, labels=labels), want)
    assert "jsd" in repr(module)
    assert "beta=0.2" in repr(module)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [5, 300])
def test_a_nan_stays_in_its_row(vocabulary, dtype):
    student, teacher = torch.randn(2, 5, vocabulary).to(dtype).unbind()
    clean_loss, clean_grad = evaluate(student, teacher, reduction="none")
    student[1, 2] = teacher[3, 0] = float("nan")
    loss, grad = evaluate(student, teacher, reduction="none")
    others = torch.tensor([0, 2, 4])
    assert loss[[1, 3]].isnan().all()
    assert torch.equal(loss[others], clean_loss[others])
    assert torch.equal(grad[others], clean_grad[others])
    masked, grad = evaluate(student, teacher, mask=torch.tensor([1, 0, 1, 0, 1]))
    assert masked.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_valid_gives_zero_with_a_gradient_attached(dtype):
    for shape in ((3, 7), (0, 7), (2, 0, 300)):
        student = torch.randn(shape, dtype=dtype, requires_grad=True)
        loss = kl_div(student, torch.randn(shape, dtype=dtype), mask=torch.zeros(shape[:-1], dtype=torch.bool))
        loss.backward()
        assert loss.item() == 0.0
        assert student.grad.shape == student.shape
        assert not student.grad.any()


@pytest.mark.parametrize("vocabulary", [3, 300])
def test_any_row_stride_and_leading_shape(vocabulary):
    student, teacher = torch.randn(2, 2, 3, 2 * vocabulary).unbind()
    views = student[..., :vocabulary], teacher[..., vocabulary:]
    copies = views[0].contiguous(), views[1].contiguous()
    assert torch.equal(kl_div(*views, reduction="none"), kl_div(*copies, reduction="none"))
    assert kl_div(*views, reduction="none").shape == (2, 3)
    loss, grad = evaluate(student[..., ::2], teacher[..., ::2])
    want_loss, want_grad = evaluate(student[..., ::2].contiguous(), teacher[..., ::2].contiguous())
    assert torch.equal(loss, want_loss)
    assert torch.equal(grad, want_grad)


def test_mixed_dtypes_are_promoted():
    student, teacher = torch.randn(4, 9), torch.randn(4, 9).bfloat16()
    assert torch.equal(kl_div(student, teacher), kl_div(student, teacher.float()))


@pytest.mark.parametrize("vocabulary", [3, 100, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_neither_on_its_batch_nor_on_the_threads(vocabulary, dtype):
    student, teacher = torch.randn(2, 70, vocabulary).to(dtype).unbind()

    def run(rows):
        logits = student[rows].clone().requires_grad_()
        loss = kl_div(logits, teacher[rows], reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0], kl_div(logits, teacher[rows]).detach()

    loss, grad, mean = run(slice(None))
    for row in (0, 37, 69):
        alone, grad_alone, _ = run(slice(row, row + 1))
        assert torch.equal(loss[row : row + 1], alone)
        assert torch.equal(grad[row : row + 1], grad_alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, many in zip(run(slice(None)), (loss, grad, mean), strict=True):
            assert torch.equal(one, many)
    finally:
        torch.set_num_threads(threads)


finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=40),
    st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e3]),
    st.sampled_from(samples.DIVERGENCES),
)
def test_finite_logits_give_finite_results(pairs, temperature, divergence):
    student, teacher = torch.tensor(pairs).T.contiguous().unbind()
    loss, grad = evaluate(student[None], teacher[None], temperature=temperature, divergence=divergence)
    assert math.isfinite(loss)
    assert grad.isfinite().all()
    assert loss >= -1e-3 * temperature**2


@fused
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_registration_is_honest(reduction, need_grad):
    student, teacher = torch.randn(2, 6, 33).unbind()
    labels, valid = torch.randint(33, (6,)), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    count = valid.sum(dtype=torch.float32)
    arguments = (student, teacher, None, 2.0, 0, 0.5, valid, labels, 0.5, reduction, count, True, need_grad, True)
    torch.library.opcheck(torch.ops.fastkd.kl_div.default, arguments)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_into_one_graph_for_every_batch_size(reduction):
    def step(student, teacher, mask):
        return kl_div(student * 2, teacher, temperature=2.0, mask=mask, reduction=reduction)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 8, 21):
        student, teacher = torch.randn(2, rows, 40).unbind()
        mask = torch.arange(rows) % 2 == 0
        eager, fast = student.clone().requires_grad_(), student.clone().requires_grad_()
        want, got = step(eager, teacher, mask), compiled(fast, teacher, mask)
        want.sum().backward()
        got.sum().backward()
        assert torch.equal(got, want)
        assert torch.allclose(fast.grad, eager.grad, rtol=1e-6, atol=1e-8)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 2
    torch._dynamo.reset()


def test_compiles_with_inductor_and_uses_the_result():
    def step(student, teacher):
        return kl_div(student.sin(), teacher, temperature=2.0, divergence="jsd").exp()

    student, teacher = torch.randn(2, 5, 300).unbind()
    eager, fast = student.clone().requires_grad_(), student.clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(fast, teacher).backward()
    step(eager, teacher).backward()
    assert torch.allclose(fast.grad, eager.grad, rtol=1e-5, atol=1e-7)


def test_autocast_and_accumulated_gradients():
    layer, teacher = torch.nn.Linear(8, 30), torch.randn(6, 30)
    inputs = torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(inputs)
        loss = kl_div(logits, teacher)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    whole = torch.autograd.grad(kl_div(layer(inputs), teacher), layer.weight)[0]
    for part in (slice(0, 1), slice(1, 6)):
        kl_div(layer(inputs[part]), teacher[part], normalizer=6).backward()
    assert torch.allclose(layer.weight.grad, whole, atol=1e-6)


@fused
@pytest.mark.parametrize("vocabulary", [64, 300])
def test_offsets_beyond_two_to_the_31(vocabulary):
    code = f"""
import torch
from fastkd.losses import kl_div
rows, stride = 33000, 70000  # 4.6 GB of address space, of which only the rows are ever touched
s = torch.empty_strided((rows, {vocabulary}), (stride, 1), dtype=torch.float16)
t = torch.empty_strided((rows, {vocabulary}), (stride, 1), dtype=torch.float16)
s[-1], t[-1] = torch.randn(2, {vocabulary}).half().unbind()
mask = torch.zeros(rows, dtype=torch.bool); mask[-1] = True
got, want = kl_div(s, t, mask=mask), kl_div(s[-1:].clone(), t[-1:].clone())
assert torch.equal(got, want), (got, want)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_at_every_length_and_alignment(target):
    environment = os.environ | {"FASTKD_CPU_TARGET": target, "PYTHONPATH": os.pathsep.join([str(ROOT), "tests"])}
    subprocess.run([sys.executable, "tests/kl_div_lengths.py"], check=True, cwd=ROOT, env=environment)
