"""kl_div as a citizen of torch: derivatives, registration, compilation, strides, threads, large offsets."""

import kl_div_samples as samples
import pytest
import torch
from backends import BACKENDS, DTYPES, device_of, evaluate, fused, threads
from subprocesses import python

from fastkd.losses import kl_div

INF = float("inf")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with samples.answering(request.param):
        yield request.param


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
def test_second_derivative_is_refused(backend):
    student = torch.randn(4, 6, device=device_of(backend), requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(kl_div(student, student.detach() + 1), student, create_graph=True)


@fused
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_registration_is_honest(backend, reduction, need_grad):
    student, teacher = torch.randn(2, 6, 33, device=device_of(backend)).unbind()
    labels, valid = torch.randint(33, (6,), device=student.device), torch.arange(6, device=student.device) != 2
    count = valid.sum(dtype=torch.float32)
    arguments = (student, teacher, None, 2.0, 0, 0.5, valid, labels, 0.5, reduction, count, True, need_grad, True)
    torch.library.opcheck(torch.ops.fastkd.kl_div.default, arguments)


@fused
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("divergence", range(3))
@pytest.mark.parametrize(
    ("backend", "vocabulary"),
    [("cpu", 3), ("cpu", 33), ("cpu", 600), ("triton", 3), ("triton", 33)],  # of 33 columns Triton makes several tiles
    indirect=["backend"],
)
def test_gradient_in_place_of_the_logits(backend, vocabulary, divergence, weight):
    student, teacher = (logits.to(device_of(backend)).contiguous() for logits in samples.rows(vocabulary))
    labels = samples.labels(vocabulary).clamp(min=0).to(student.device)
    options = (teacher, None, 2.0, divergence, 0.3, None, labels, weight, 0, None, True)
    loss, grad, stats = torch.ops.fastkd.kl_div(student, *options, True, True)
    loss_, stats_ = torch.ops.fastkd.kl_div_(student, *options, True)
    for ours, theirs in ((loss_, loss), (student, grad), (stats_, stats)):
        assert torch.equal(ours.nan_to_num(nan=-1.0), theirs.nan_to_num(nan=-1.0))


@fused
@pytest.mark.parametrize("divergence", range(3))
def test_what_is_not_needed_is_not_made_and_changes_nothing(backend, divergence):
    student, teacher = (logits.to(device_of(backend)) for logits in samples.rows(33))
    options = (student, teacher, None, 2.0, divergence, 0.3, None, None, 0.0, 0, None, True)
    op = torch.ops.fastkd.kl_div
    loss, grad, stats = op(*options, True, True)
    alone = op(*options, False, False)
    assert [output.numel() for output in alone] == [samples.ROWS, 0, 0]
    assert torch.equal(alone[0], loss)
    assert torch.equal(op(*options, True, False)[1], grad)
    assert torch.equal(op(*options, False, True)[2], stats)


def test_compiles_with_inductor_and_uses_the_result():
    def step(student, teacher):
        return kl_div(student.sin(), teacher, temperature=2.0, divergence="jsd").exp()

    student, teacher = torch.randn(2, 5, 300).unbind()
    eager, fast = student.clone().requires_grad_(), student.clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(fast, teacher).backward()
    step(eager, teacher).backward()
    assert torch.allclose(fast.grad, eager.grad, rtol=1e-5, atol=1e-7)


def test_mixed_dtypes_are_promoted(backend):
    student, teacher = torch.randn(2, 4, 9, device=device_of(backend)).unbind()
    assert torch.equal(kl_div(student, teacher.bfloat16()), kl_div(student, teacher.bfloat16().float()))


@pytest.mark.parametrize("vocabulary", [3, 300])
def test_any_row_stride_and_leading_shape(backend, vocabulary):
    student, teacher = torch.randn(2, 2, 3, 2 * vocabulary).unbind()
    pairs = (student[..., :vocabulary], teacher[..., vocabulary:]), (student[..., ::2], teacher[..., ::2])
    options = {"device": device_of(backend), "reduction": "none"}
    for views in pairs:
        copies = [view.contiguous() for view in views]
        for got, want in zip(evaluate(kl_div, *views, **options), evaluate(kl_div, *copies, **options), strict=True):
            assert got.shape[:2] == (2, 3)
            assert torch.equal(got, want)


def test_row_vectors_may_have_gaps(backend):
    student, teacher = samples.rows(17)
    dense = samples.options(17)["everything"] | {"reduction": "none", "device": device_of(backend)}
    gaps = {
        name: torch.stack((dense[name], dense[name].flip(0)), 1)[:, 0] for name in ("temperature", "mask", "labels")
    }
    assert all(vector.stride() == (2,) for vector in gaps.values())
    wanted = evaluate(kl_div, student, teacher, **dense)
    assert all(map(torch.equal, evaluate(kl_div, student, teacher, **dense | gaps), wanted))


@pytest.mark.parametrize(
    ("backend", "vocabulary"), [("cpu", 3), ("cpu", 100), ("cpu", 5000), ("triton", 33)], indirect=["backend"]
)
@pytest.mark.parametrize("divergence", samples.DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_neither_on_its_batch_nor_on_the_threads(backend, vocabulary, divergence, dtype):
    count = 70 if backend == "cpu" else 10
    student, teacher = torch.randn(2, count, vocabulary).to(device_of(backend), dtype).unbind()

    def run(rows):
        logits = student[rows].clone().requires_grad_()
        loss = kl_div(logits, teacher[rows], divergence=divergence, reduction="none")
        mean = kl_div(logits, teacher[rows], divergence=divergence).detach()
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0], mean

    together = run(slice(None))
    for row in (0, count // 2, count - 1):
        alone = run(slice(row, row + 1))
        for one, many in zip(alone[:2], together[:2], strict=True):
            assert torch.equal(one, many[row : row + 1])
    for count in (1, 3):
        with threads(count):
            assert all(map(torch.equal, run(slice(None)), together))


FAR_ROWS = """
import kl_div_samples, torch
from backends import device_of, evaluate
from fastkd.losses import kl_div

# 4.6 GB of address space, of which only the rows are ever touched.
logits = torch.empty_strided((33, 2 * {vocabulary}), (2**26, 1), dtype=torch.float16, device=device_of("{backend}"))
logits.copy_(torch.randn(logits.shape))

def run(logits):
    student, teacher = logits[:, :{vocabulary}], logits[:, {vocabulary}:]
    return evaluate(kl_div, student, teacher, device=logits.device, reduction="none")

with kl_div_samples.answering("{backend}"):
    assert all(map(torch.equal, run(logits), run(logits.contiguous())))
"""


@fused
@pytest.mark.parametrize(("name", "vocabulary"), [("cpu", 64), ("cpu", 600), ("triton", 32)])
def test_offsets_beyond_two_to_the_31(name, vocabulary):
    """Rows 2²⁶ elements apart: an int32 offset would leave the memory that is promised to them."""
    python(
        "-c",
        FAR_ROWS.format(backend=name, vocabulary=vocabulary),
        TRITON_INTERPRET="0" if device_of(name) == "cuda" else "1",
    )


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_at_every_length_and_alignment(target):
    python("tests/kl_div_lengths.py", FASTKD_CPU_TARGET=target)
