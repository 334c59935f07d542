"""linear_kl_div against its float64 reference: values, gradients, chunks, memory and edges."""

from importlib import import_module

import backends
import linear_kl_div_samples as samples
import pytest
import torch
from tolerance import GRADIENT, VALUE, assert_close

from fastkd.losses import LinearKLDivLoss, kl_div, linear_kl_div
from fastkd.ops.linear_kl_div import plan

pytestmark = backends.fused
OPTIONS = samples.options()


def evaluate(*tensors, dtype=None, **options):
    """The loss and the gradients of hidden states, weight and, where there is one, bias of the student."""

    def cast(x):
        return x.to(dtype) if dtype and isinstance(x, torch.Tensor) and x.is_floating_point() else x

    student, weight, *teacher = (cast(x) for x in tensors)
    options = {name: cast(value) for name, value in options.items()}
    leaves = [student.detach().requires_grad_(), weight.detach().requires_grad_()]
    if "student_bias" in options:
        options["student_bias"] = options["student_bias"].detach().requires_grad_()
        leaves.append(options["student_bias"])
    loss = linear_kl_div(leaves[0], leaves[1], *teacher, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_gradients(name, reduction, dtype):
    tensors = samples.heads(dtype)
    options = OPTIONS[name] | {"reduction": reduction}
    options = {k: v.to(dtype) if k.endswith("bias") else v for k, v in options.items()}
    actual = evaluate(*tensors, **options)
    with backends.answering("linear_kl_div", "reference"):
        exact = evaluate(*tensors, dtype=torch.float64, **options)
        plain = evaluate(*tensors, **options)
    for index, results in enumerate(zip(actual, exact, plain, strict=True)):
        assert_close(*results, GRADIENT if index > 0 else VALUE)


def test_is_kl_div_of_the_logits():
    student, weight, teacher, teacher_weight = samples.heads()
    ours = linear_kl_div(student, weight, teacher, teacher_weight, temperature=2.0, reduction="none")
    theirs = kl_div(student @ weight.T, teacher @ teacher_weight.T, temperature=2.0, reduction="none")
    torch.testing.assert_close(ours, theirs)


def test_leading_dimensions_and_strides():
    student, weight, teacher, teacher_weight = samples.heads()
    flat = linear_kl_div(student[:36], weight, teacher[:36], teacher_weight, reduction="none")
    batched = linear_kl_div(
        student[:36].reshape(4, 9, -1).transpose(0, 1),
        weight.T.contiguous().T,
        teacher[:36].reshape(4, 9, -1).transpose(0, 1),
        teacher_weight,
        reduction="none",
    )
    torch.testing.assert_close(batched.T.reshape(-1), flat)


def test_frozen_parts_get_no_gradient():
    student, weight, teacher, teacher_weight = samples.heads()
    both = evaluate(student, weight, teacher, teacher_weight)
    hidden = student.clone().requires_grad_()
    linear_kl_div(hidden, weight, teacher, teacher_weight).backward()
    assert torch.equal(hidden.grad, 2 * both[1])  # evaluate halves a scalar
    head = weight.clone().requires_grad_()
    linear_kl_div(student, head, teacher, teacher_weight).backward()
    assert torch.equal(head.grad, 2 * both[2])


def test_common_vocabulary_compares_the_first_columns():
    student, weight, teacher, teacher_weight = samples.heads()
    padded = torch.cat([weight, torch.full((20, samples.HIDDEN), 9.0)]).requires_grad_()
    loss = linear_kl_div(student, padded, teacher, teacher_weight, common_vocab=samples.VOCABULARY)
    assert torch.equal(loss, linear_kl_div(student, weight, teacher, teacher_weight))
    loss.backward()
    assert padded.grad[: samples.VOCABULARY].any()
    assert not padded.grad[samples.VOCABULARY :].any()


def test_result_hardly_depends_on_the_chunks():
    tensors = samples.heads()
    whole, chunked = (evaluate(*tensors, memory_budget=budget) for budget in (None, 20_000))
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_many_chunks_are_not_summed_in_half_precision():
    """Six hundred equal terms: their sum in bfloat16 would stand still before the end."""
    student, weight, teacher, teacher_weight = samples.heads(torch.bfloat16)
    tensors = (student[:1].repeat(600, 1), weight, teacher[:1].repeat(600, 1), teacher_weight)
    whole, row_by_row = (evaluate(*tensors, memory_budget=budget)[2] for budget in (None, 1))
    torch.testing.assert_close(row_by_row, whole, rtol=0.02, atol=1e-6)


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """The largest tensors that the op makes are chunks, whatever the number of rows."""
    module = import_module("fastkd.ops.linear_kl_div")
    made = []
    original = torch.Tensor.new_empty

    def recording(self, *shape, **options):
        tensor = original(self, *shape, **options)
        made.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", recording)
    _, weight, _, teacher_weight = samples.heads()
    for rows in (100, 1000):
        made.clear()
        student, teacher = torch.randn(rows, samples.HIDDEN), torch.randn(rows, samples.TEACHER_HIDDEN)
        module._fused(student, weight, None, *_arguments(teacher, teacher_weight, budget=40_000))
        assert max(made) <= 40_000


def _arguments(teacher, teacher_weight, budget):
    options = (teacher, teacher_weight, None, 1.0, 1.0, None, None, None, 1.0, 0, 0.5, None, None, 0.0, True, budget)
    return (*options, torch.ones(()), True, True, False)


@pytest.mark.parametrize("budget", [0, 20_000])
@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
def test_everything_is_made_on_the_device_of_the_tensors(dtype, budget):
    """On "meta" a tensor that was made elsewhere is an error, as it is on a GPU."""
    module = import_module("fastkd.ops.linear_kl_div")

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    per_row, labels = meta(40, dtype=torch.float32), meta(40, dtype=torch.int64)
    teacher = (meta(40, 28), meta(300, 28), meta(300))
    options = (*teacher, 0.5, 2.0, 3.0, 4.0, per_row, 1.0, 0, 0.5, None, labels, 0.5, True, budget)
    student = (meta(40, 20), meta(300, 20), meta(300))
    _, *grads = module._fused(*student, *options, per_row[0], True, True, True)
    assert [(x.shape, x.dtype, x.device) for x in grads] == [(x.shape, x.dtype, x.device) for x in student]


def test_scaled_loss_scales_gradients():
    student, weight, teacher, teacher_weight = samples.heads()
    student.requires_grad_()
    loss = linear_kl_div(student, weight, teacher, teacher_weight)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, student)
    torch.testing.assert_close(twice, 2 * once)


def test_normalizer_replaces_the_count():
    tensors = samples.heads()
    total = linear_kl_div(*tensors, reduction="sum")
    torch.testing.assert_close(linear_kl_div(*tensors, normalizer=8.0), total / 8)
    torch.testing.assert_close(linear_kl_div(*tensors, normalizer=torch.tensor(8.0)), total / 8)


def test_float16_gradients_survive_a_loss_scale():
    """Weights that would carry hidden states, but not gradients, beyond the largest float16."""
    student, weight, teacher, teacher_weight = samples.heads(torch.float16)
    leaves = student.requires_grad_(), weight.requires_grad_()
    rows = linear_kl_div(*leaves, teacher, teacher_weight, reduction="none")
    scaled = torch.autograd.grad(rows, leaves, torch.full_like(rows, 2.0**13), retain_graph=True)
    plain = torch.autograd.grad(rows, leaves, torch.ones_like(rows))
    assert (student.abs().max() * 2**13).isinf()
    for ours, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float() * 2**13, rtol=2e-2, atol=2.0)


def test_teacher_comes_in_parts():
    _, weight, _, teacher_weight = samples.heads()
    student, teacher = torch.randn(300, samples.HIDDEN), torch.randn(300, samples.TEACHER_HIDDEN)
    ours = evaluate(student, weight, teacher, teacher_weight)
    with backends.answering("linear_kl_div", "reference"):
        theirs = evaluate(student, weight, teacher, teacher_weight)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    student, weight, teacher, teacher_weight = (x[:7].double() for x in samples.heads())
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    leaves = student.requires_grad_(), weight.requires_grad_(), bias

    def function(hidden, weight, bias):
        return linear_kl_div(hidden, weight, teacher, teacher_weight, student_bias=bias, student_softcap=4.0)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivative_is_refused():
    student, weight, teacher, teacher_weight = samples.heads()
    loss = linear_kl_div(student.requires_grad_(), weight, teacher, teacher_weight)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_opcheck(needs, by_columns):
    student, weight, teacher, teacher_weight = samples.heads()
    if by_columns:
        student, weight = student.T.contiguous().T, weight.T.contiguous().T
    arguments = (student, weight, None, *_arguments(teacher, teacher_weight, budget=20_000)[:-3], *needs, False)
    torch.library.opcheck(
        torch.ops.fastkd.linear_kl_div.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_module():
    tensors = samples.heads()
    loss = LinearKLDivLoss(temperature=2.0, reduction="sum")(*tensors)
    assert torch.equal(loss, linear_kl_div(*tensors, temperature=2.0, reduction="sum"))
    with pytest.raises(TypeError, match="temprature"):
        LinearKLDivLoss(temprature=2.0)


def test_no_rows():
    student, weight, teacher, teacher_weight = samples.heads()
    hidden = student[:0].requires_grad_()
    loss = linear_kl_div(hidden, weight.requires_grad_(), teacher[:0], teacher_weight)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("lent", [0, 3, 1000])
@pytest.mark.parametrize("most", [2, 3, 7, 64])
@pytest.mark.parametrize("rows", [0, 1, 5, 100])
def test_chunks_hold_every_row_once_within_their_memory(rows, most, lent):
    chunks = plan(rows, most, lent)
    assert [row for chunk, _ in chunks for row in range(rows)[chunk]] == list(range(rows))
    for index, (chunk, theirs) in enumerate(chunks):
        ours = chunk.stop - chunk.start
        assert ours >= theirs >= 1
        assert ours <= most if lent and index == 0 else ours + theirs <= most
        assert index > 0 or theirs <= (lent or most)
