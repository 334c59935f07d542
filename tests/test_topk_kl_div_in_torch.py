"""topk_kl_div as a citizen of torch: derivatives, registration, compilation, autocast, strides, threads, far rows."""

import pytest
import topk_kl_div_samples as samples
import torch
from backends import BACKENDS, DTYPES, device_of, evaluate, fused, threads
from subprocesses import python
from torch._dynamo.testing import CompileCounterWithBackend

from fastkd.losses import topk_kl_div

INF = float("inf")
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with samples.answering(request.param):
        yield request.param


def inputs(rows=6, vocabulary=33, k=5, device="cpu", dtype=torch.float32):
    student, teacher = torch.randn(2, rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    values, ids = teacher.log_softmax(-1).topk(k)
    return student.to(device, dtype), ids.to(device), values.to(device)


@pytest.mark.parametrize(("tail", "divergence"), samples.PAIRS)
def test_derivatives_of_the_reference(tail, divergence):
    student, ids, values = inputs(4, 8, 3, dtype=torch.float64)
    student[1, 7] = -INF
    ids[1] = torch.tensor([2, 5, -1])

    def loss(logits):
        kept = torch.where(student == -INF, student, logits)
        options = {"temperature": 0.7, "teacher_temperature": 0.7, "mask": torch.tensor([1, 1, 0, 1])}
        return topk_kl_div(kept, ids, values.double(), tail=tail, divergence=divergence, **options)

    logits = student.nan_to_num(neginf=0.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@fused
def test_second_derivative_is_refused(backend):
    student, ids, values = inputs(device=device_of(backend))
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="fused topk_kl_div has no second derivative"):
        torch.autograd.grad(topk_kl_div(student, ids, values), student, create_graph=True)


def arguments(backend, reduction=2, rest=1):
    """Of the op itself, without its last flag."""
    student, ids, values = inputs(device=device_of(backend))
    ids = ids.sort(-1).values
    valid = torch.arange(6, device=student.device) != 2
    weight = torch.linspace(0.5, 1.0, 6, device=student.device)
    count = valid.sum(dtype=torch.float32)
    outcomes = torch.cat((values, values[:, :rest]), 1)
    return student, ids, outcomes, None, 2.0, 0, 0.5, valid, weight, reduction, count, True


@fused
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("reduction", [0, 2])
def test_registration_is_honest(backend, reduction, need_grad):
    torch.library.opcheck(torch.ops.fastkd.topk_kl_div.default, (*arguments(backend, reduction), need_grad))


@fused
@pytest.mark.parametrize("rest", [0, 1])
def test_gradient_in_place_of_the_logits(backend, rest):
    student, *options = arguments(backend, 0, rest)
    loss, grad = torch.ops.fastkd.topk_kl_div(student, *options, True)
    alone, nothing = torch.ops.fastkd.topk_kl_div(student, *options, False)
    loss_ = torch.ops.fastkd.topk_kl_div_(student, *options)
    assert grad.any()
    assert torch.equal(loss_, loss)
    assert torch.equal(alone, loss)
    assert torch.equal(student, grad)
    assert nothing.numel() == 0


@pytest.mark.parametrize("tail", samples.TAILS)
def test_compiles_into_one_graph_for_every_batch_size(backend, tail):
    def step(student, ids, values, mask):
        return topk_kl_div(student * 2, ids, values, tail=tail, mask=mask)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 8, 21):
        student, ids, values = inputs(rows, device=device_of(backend))
        mask = torch.arange(rows, device=student.device) % 2 == 0
        eager, fast = student.clone().requires_grad_(), student.clone().requires_grad_()
        want, got = step(eager, ids, values, mask), compiled(fast, ids, values, mask)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(fast.grad, eager.grad, rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 2  # the first batch may be taken for a constant
    torch._dynamo.reset()


def test_compiles_with_inductor_and_uses_the_result():
    def step(student, ids, values, temperature):
        loss = topk_kl_div(student.sin(), ids, values, temperature=temperature, teacher_temperature=temperature)
        return loss.exp()

    student, ids, values = inputs(5, 300)
    temperature = torch.linspace(1, 3, 5)
    eager, fast = student.clone().requires_grad_(), student.clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(fast, ids, values, temperature).backward()
    step(eager, ids, values, temperature).backward()
    assert torch.allclose(fast.grad, eager.grad, rtol=1e-5, atol=1e-7)


def test_autocast_and_accumulated_gradients(backend):
    device = device_of(backend)
    _, ids, values = inputs(device=device)
    layer, x = torch.nn.Linear(8, 33).to(device), torch.randn(6, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = layer(x)
        loss = topk_kl_div(logits, ids, values)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    whole = torch.autograd.grad(topk_kl_div(layer(x), ids, values), layer.weight)[0]
    for part in (slice(0, 1), slice(1, 6)):
        topk_kl_div(layer(x[part]), ids[part], values[part], normalizer=6).backward()
    assert torch.allclose(layer.weight.grad, whole, atol=1e-6)


@pytest.mark.parametrize("tail", samples.TAILS)
def test_any_row_stride_and_leading_shape(backend, tail):
    wide = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(1))
    _, ids, values = inputs(6, 40)
    ids = torch.stack((ids, ids), -1).reshape(2, 3, -1)[..., ::2]
    values = values.T.contiguous().T.reshape(2, 3, 5)
    options = {"device": device_of(backend), "reduction": "none", "tail": tail}
    for view in (wide[..., :40], wide[..., ::2]):
        got = evaluate(topk_kl_div, view, ids, values, **options)
        want = evaluate(topk_kl_div, view.contiguous(), ids.contiguous(), values, **options)
        assert got[0].shape == (2, 3)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("vocabulary", [100, 5000])
@pytest.mark.parametrize("tail", samples.TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@fused
def test_a_row_depends_neither_on_its_batch_nor_on_the_threads(vocabulary, tail, dtype):
    student, ids, values = inputs(70, vocabulary, dtype=dtype)

    def run(rows):
        with samples.answering("cpu"):
            tensors = student[rows], ids[rows], values[rows]
            return *evaluate(topk_kl_div, *tensors, tail=tail, reduction="none"), topk_kl_div(*tensors, tail=tail)

    together = run(slice(None))
    for row in (0, 35, 69):
        alone = run(slice(row, row + 1))
        assert torch.equal(alone[0], together[0][row : row + 1])
    for count in (1, 3):
        with threads(count):
            assert all(map(torch.equal, run(slice(None)), together))


FAR_ROWS = """
import topk_kl_div_samples, torch
from backends import device_of, evaluate
from fastkd.losses import topk_kl_div

# 4.6 GB of address space, of which only the rows are ever touched.
logits = torch.empty_strided((33, {vocabulary}), (2**26, 1), dtype=torch.float16, device=device_of("{backend}"))
logits.copy_(torch.randn(logits.shape))
values, ids = torch.randn(logits.shape).log_softmax(-1).topk(4)

def run(logits):
    return evaluate(topk_kl_div, logits, ids, values, device=logits.device, reduction="none")

with topk_kl_div_samples.answering("{backend}"):
    assert all(map(torch.equal, run(logits), run(logits.contiguous())))
"""


@fused
@pytest.mark.parametrize(("name", "vocabulary"), [("cpu", 600), ("triton", 32)])
def test_offsets_beyond_two_to_the_31(name, vocabulary):
    """Rows 2²⁶ elements apart: an int32 offset would leave the memory that is promised to them."""
    python(
        "-c",
        FAR_ROWS.format(backend=name, vocabulary=vocabulary),
        TRITON_INTERPRET="0" if device_of(name) == "cuda" else "1",
    )


LENGTHS = """
import torch
from backends import DTYPES, check
from topk_kl_div_samples import PAIRS
from fastkd.losses import topk_kl_div

# Every length around the vector widths and the blocks, at every alignment, between guards.
for vocabulary in (*range(2, 19), 31, 33, 63, 65, 511, 512, 513, 514, 1023, 1025, 1040):
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(vocabulary)
        storage = torch.full((6 * (vocabulary + 3),), 42.0).to(dtype)
        offset = vocabulary % 7
        view = storage[offset : offset + 5 * (vocabulary + 1)].view(5, vocabulary + 1)[:, :vocabulary]
        view.copy_(3 * torch.randn(5, vocabulary, generator=generator))
        values, ids = torch.randn(5, vocabulary, generator=generator).log_softmax(-1).topk(2)
        before = storage.clone()
        tail, divergence = PAIRS[vocabulary % len(PAIRS)]
        check("topk_kl_div", "cpu", topk_kl_div, view, ids, values, tail=tail, divergence=divergence, reduction="none")
        check("topk_kl_div", "cpu", topk_kl_div, view, ids, values, reduction="none")
        assert torch.equal(storage, before), "the logits were written to"
"""


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_at_every_length_and_alignment(target):
    python("-c", LENGTHS, FASTKD_CPU_TARGET=target)
