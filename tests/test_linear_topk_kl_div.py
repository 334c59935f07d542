"""linear_topk_kl_div against its float64 reference: values, gradients, chunks, memory and edges."""

from importlib import import_module

import backends
import pytest
import torch
from tolerance import GRADIENT, VALUE, assert_close

from fastkd.losses import LinearTopkKLDivLoss, linear_topk_kl_div, topk_kl_div

pytestmark = backends.fused
ROWS, VOCABULARY, HIDDEN, K = 37, 300, 24, 6


def inputs(dtype=torch.float32, rows=ROWS):
    """Hidden states, weight, ids and log-probabilities; some rows peaked, flat, or without some of their ids."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    hidden[1] *= 5
    hidden[3] = 0
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.5
    values, ids = (torch.randn(rows, VOCABULARY, generator=generator) * 3).log_softmax(-1).topk(K)
    ids[2, 3:] = -1
    return hidden.to(dtype), weight.to(dtype), ids, values


SOME = torch.arange(ROWS) % 3 != 1
TEMPERATURES = 0.5 + 3 * torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))
OPTIONS = {
    "plain": {},
    "chunked": {"memory_budget": 20_000, "temperature": 2.0, "teacher_temperature": 2.0},
    "masked": {"mask": SOME, "memory_budget": 20_000, "student_bias": BIAS},
    "nothing valid": {"mask": torch.zeros(ROWS)},
    "zero": {"tail": "zero", "memory_budget": 30_000, "labels": torch.arange(ROWS) - 1, "ignore_index": -1},
    "renormalize": {"tail": "renormalize", "teacher_temperature": 0.5, "divergence": "jsd"},
    "everything": {"student_bias": BIAS, "student_softcap": 3.0, "student_logit_scale": 0.5, "mask": SOME}
    | {"temperature": TEMPERATURES, "teacher_temperature": TEMPERATURES, "divergence": "reverse"}
    | {"memory_budget": 20_000},
}  # fmt: skip


def evaluate(*tensors, dtype=None, **options):
    """The loss and the gradients of hidden states, weight and, where there is one, bias."""

    def cast(x):
        return x.to(dtype) if dtype and isinstance(x, torch.Tensor) and x.is_floating_point() else x

    hidden, weight, ids, values = (cast(x) for x in tensors)
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    if "student_bias" in options:
        leaves.append(options["student_bias"].to(weight.dtype).requires_grad_())
        options = options | {"student_bias": leaves[2]}
    loss = linear_topk_kl_div(leaves[0], leaves[1], ids, values, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", backends.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_gradients(name, reduction, dtype):
    tensors = inputs(dtype)
    options = OPTIONS[name] | {"reduction": reduction}
    actual = evaluate(*tensors, **options)
    with backends.answering("linear_topk_kl_div", "reference"):
        exact = evaluate(*tensors, dtype=torch.float64, **options)
        plain = evaluate(*tensors, **options)
    for index, results in enumerate(zip(actual, exact, plain, strict=True)):
        assert_close(*results, GRADIENT if index > 0 else VALUE)


def test_is_topk_kl_div_of_the_logits():
    hidden, weight, ids, values = inputs()
    ours = linear_topk_kl_div(hidden, weight, ids, values, reduction="none")
    theirs = topk_kl_div(hidden @ weight.T, ids, values, reduction="none")
    torch.testing.assert_close(ours, theirs)


def test_frozen_parts_get_no_gradient():
    tensors = inputs()
    both = evaluate(*tensors)
    hidden, weight, *teacher = tensors
    head = weight.clone().requires_grad_()
    linear_topk_kl_div(hidden, head, *teacher).backward()
    assert torch.equal(head.grad, 2 * both[2])  # evaluate halves a scalar


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    """The largest tensors that the op makes are chunks, whatever the number of rows."""
    module = import_module("fastkd.ops.linear_topk_kl_div")
    made = []
    original = torch.Tensor.new_empty

    def recording(self, *shape, **options):
        tensor = original(self, *shape, **options)
        made.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", recording)
    for rows in (100, 1000):
        made.clear()
        hidden, weight, ids, values = inputs(rows=rows)
        options = (ids.sort(-1).values, values, 1.0, None, None, 1.0, 0, 0.5, None, None, True, 40_000)
        module._fused(hidden, weight, None, *options, torch.ones(()), True, True, False)
        assert max(made) <= 40_000


def test_gradcheck():
    hidden, weight, _, values = (x[:5] for x in inputs())
    ids, values = torch.tensor([[0, 3], [1, 2], [4, -1], [3, 2], [0, 1]]), values[:, :2]
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()

    def function(hidden, weight):
        return linear_topk_kl_div(hidden, weight, ids, values.double(), student_softcap=4.0, tail="zero")

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivative_is_refused():
    hidden, *others = inputs()
    loss = linear_topk_kl_div(hidden.requires_grad_(), *others)
    with pytest.raises(RuntimeError, match="fused linear_topk_kl_div has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (False, False)])
def test_opcheck(needs, by_columns):
    hidden, weight, ids, values = inputs()
    if by_columns:
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    options = (ids.sort(-1).values, values, 1.0, None, None, 1.0, 0, 0.5, None, None, True, 20_000)
    arguments = (hidden, weight, None, *options, torch.ones(()), *needs, False)
    torch.library.opcheck(
        torch.ops.fastkd.linear_topk_kl_div.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_whole_without_a_recompilation_by_batch():
    hidden, weight, ids, values = inputs()
    weight.requires_grad_()

    def step(hidden, ids, values, mask):
        return linear_topk_kl_div(hidden * 2, weight, ids, values, mask=mask) * 3

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (ROWS, 20, 11):
        hidden_rows, *others = (x[:count].clone() for x in (hidden, ids, values, SOME))
        tensors = hidden_rows.requires_grad_(), *others
        with torch.compiler.set_stance("default" if count == ROWS else "fail_on_recompile"):
            loss = compiled(*tensors)
            grads = torch.autograd.grad(loss, (tensors[0], weight))
        expected = step(*tensors)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, (tensors[0], weight)))


def test_module_and_bad_input():
    tensors = inputs()
    options = {"tail": "renormalize", "reduction": "sum"}
    assert torch.equal(LinearTopkKLDivLoss(**options)(*tensors), linear_topk_kl_div(*tensors, **options))
    with pytest.raises(TypeError, match="temprature"):
        LinearTopkKLDivLoss(temprature=2.0)
    with pytest.raises(ValueError, match="student_hidden and student_weight must be"):
        linear_topk_kl_div(tensors[0][:, 1:], *tensors[1:])
    with pytest.raises(ValueError, match="memory_budget must be a positive"):
        linear_topk_kl_div(*tensors, memory_budget=0)
    with pytest.raises(ValueError, match=r"teacher_ids holds 300, outside \[0, 300\)"):
        linear_topk_kl_div(*tensors[:2], tensors[2].clamp(min=300), tensors[3])


def test_no_rows():
    hidden, weight, ids, values = inputs()
    hidden = hidden[:0].requires_grad_()
    loss = linear_topk_kl_div(hidden, weight.requires_grad_(), ids[:0], values[:0])
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()
