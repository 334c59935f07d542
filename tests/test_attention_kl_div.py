"""attention_kl_div on every backend against its float64 reference, and what its documentation promises about values."""

from contextlib import nullcontext
from functools import partial
from itertools import product
from unittest import mock

import attention_kl_div_samples as samples
import backends
import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, device_of

from fastkd.losses import AttentionKLDivLoss, attention_kl_div, kl_div

NAN = float("nan")
INF = float("inf")
BACKENDS = ("cpu", "triton")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, interpreting rows that the kernel then leaves out
]
check = partial(backends.check, "attention_kl_div", wanted=(0, 1))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with samples.answering(request.param):
        yield request.param


def evaluate(backend, tensors, **options):
    return backends.evaluate(attention_kl_div, *tensors, wanted=(0, 1), device=device_of(backend), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", samples.CASES)
def test_queries_match_the_float64_reference(backend, case, dtype, request):
    shapes, options = samples.CASES[case]
    if backend == "triton":  # all that the interpreter has time for
        if case == "cross with valid queries" and not torch.cpu.get_capabilities().get("avx512_f"):
            why = "off by 1.8e-6 on a CPU without AVX-512, where 1.15e-6 is allowed; why is not known"
            request.applymarker(pytest.mark.xfail(reason=why, strict=False))
        if dtype != torch.float32 and case not in ("holes", "biased", "averaged"):
            pytest.skip("the other dtypes share this path with float32")
        shapes = shapes | {"queries": min(shapes.get("queries", 37), 50)}
    check(backend, attention_kl_div, *samples.tensors(**shapes, dtype=dtype), reduction="none", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("backend", "case"),
    [*product(["cpu"], ["plain", "holes", "lengths", "grouped"]), ("triton", "lengths")],
    indirect=["backend"],
)
def test_reductions_match_the_float64_reference(backend, case, reduction, dtype):
    shapes, options = samples.CASES[case]
    tensors = samples.tensors(**shapes, dtype=dtype)
    check(backend, attention_kl_div, *tensors, reduction=reduction, **options)
    if reduction == "mean":
        for normalizer in (40.0, torch.tensor(7.0)):
            check(backend, attention_kl_div, *tensors, normalizer=normalizer, **options)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("queries", [1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 129, 257])
@pytest.mark.parametrize("dim", [1, 16, 31, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_length(backend, queries, dim, dtype):
    """Over four heads: the error of plain torch in the few rows of one is a matter of luck."""
    tensors = samples.tensors(1, 4, queries, dim=dim, seed=queries, dtype=dtype)
    check(backend, attention_kl_div, *tensors, causal=queries % 2 == 0, reduction="none")


def test_is_the_divergence_of_the_maps(backend):
    student_query, student_key, teacher_query, teacher_key = samples.tensors(dtype=torch.float32)
    maps = [
        F.log_softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
        for query, key in ((student_query, student_key), (teacher_query, teacher_key))
    ]
    wanted = F.kl_div(*maps, reduction="sum", log_target=True) / (2 * 2 * 37)
    loss = evaluate(backend, (student_query, student_key, teacher_query, teacher_key))[0]
    torch.testing.assert_close(loss, wanted)


def test_agrees_with_kl_div_of_the_scores(backend):
    def by_scores(student_query, student_key, teacher_query, teacher_key):
        return kl_div(student_query @ student_key.mT / 8**0.5, teacher_query @ teacher_key.mT / 8**0.5)

    tensors = samples.tensors()
    wanted = backends.evaluate(by_scores, *tensors, wanted=(0, 1))
    torch.testing.assert_close(evaluate(backend, tensors), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["holes", "averaged, excluding"])
def test_known_sums_of_exponentials_save_a_pass(backend, case):
    shapes, options = samples.CASES[case]
    tensors = samples.tensors(**shapes)
    for query in tensors[::2]:
        query *= 0.1  # the rounding of a large logarithm would be an error of the input
    wanted = evaluate(backend, tensors, reduction="none", **options)
    known = {}
    for model, query, key in (("student", *tensors[:2]), ("teacher", *tensors[2:])):
        scores = query @ key.mT / 8**0.5 + options.get(f"{model}_bias", 0.0)
        if "mask" in options:
            scores = scores.masked_fill(~options["mask"][:, None, None], -INF)
        if options.get("causal"):
            scores = scores.masked_fill(torch.ones(37, 37).triu(1).bool(), -INF)
        known[f"{model}_lse"] = scores.logsumexp(-1)
    with mock.patch("fastkd.kernels.attention_kl_div.sums_kernel", None) if backend == "triton" else nullcontext():
        check(backend, attention_kl_div, *tensors, reduction="none", **options, **known)
    if backend == "cpu":
        assert all(map(torch.equal, evaluate(backend, tensors, reduction="none", **options, **known), wanted))


def test_relation_heads_split_the_joined_heads(backend):
    student, teacher = samples.tensors(2, 2, 9, dim=12, teacher_heads=4, teacher_dim=6, seed=3)[::2]
    joined = [x.transpose(1, 2).reshape(2, 9, 3, 8).transpose(1, 2) for x in (student, teacher)]
    wanted = evaluate(backend, [joined[0], joined[0], joined[1], joined[1]])
    relations = evaluate(backend, [student, student, teacher, teacher], relation_heads=3)
    assert torch.equal(relations[0], wanted[0])
    for got, want in zip(relations[1:], wanted[1:], strict=True):
        assert torch.equal(got.transpose(1, 2).flatten(2), want.transpose(1, 2).flatten(2))


def test_query_and_key_may_be_one_tensor(backend):
    student, teacher = (x.to(device_of(backend)) for x in samples.tensors()[::2])
    student.requires_grad_()
    half = 0.5 * attention_kl_div(student, student, teacher, teacher)  # as evaluate weighs a single result
    (together,) = torch.autograd.grad(half, student)
    parts = evaluate(backend, [student, student.clone(), teacher, teacher])[1:]
    torch.testing.assert_close(together.cpu(), sum(parts))


def test_masked_tokens_may_hold_nan(backend):
    tensors = samples.tensors()
    options = {"mask": samples.HOLES, "reduction": "none"}
    clean = evaluate(backend, tensors, **options)
    for x in tensors:
        x.masked_fill_(~samples.HOLES[:, None, :, None], NAN)
    spoilt = evaluate(backend, tensors, **options)
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before, after)
    assert not spoilt[1].masked_select(~samples.HOLES[:, None, :, None]).any()
    assert not spoilt[2].masked_select(~samples.HOLES[:, None, :, None]).any()


@pytest.mark.parametrize("which", [0, 2])
def test_a_nan_of_a_query_stays_in_its_row_of_losses(backend, which):
    tensors = samples.tensors()
    clean = evaluate(backend, tensors, reduction="none")
    tensors[which][0, 1, 5, 2] = NAN
    loss, grad_query, _ = evaluate(backend, tensors, reduction="none")
    here = torch.zeros_like(loss, dtype=torch.bool)
    here[0, 1, 5] = True
    assert torch.equal(loss.isnan(), here)
    assert torch.equal(grad_query.isnan().any(-1), here)
    assert torch.equal(loss[~here], clean[0][~here])
    assert torch.equal(grad_query[~here], clean[1][~here])


def test_equal_models_have_no_loss_and_no_gradient(backend):
    query, key = samples.tensors()[:2]
    for result in evaluate(backend, [query, key, query.clone(), key.clone()], reduction="none"):
        assert not result.any()


def test_scores_masked_by_the_lowest_finite_number(backend):
    tensors = samples.tensors()
    bias = torch.zeros(2, 1, 1, 37).masked_fill(~samples.PADDING[:, None, None], torch.finfo(torch.float32).min)
    results = evaluate(backend, tensors, student_bias=bias, teacher_bias=bias, query_mask=samples.PADDING)
    torch.testing.assert_close(results, evaluate(backend, tensors, mask=samples.PADDING))


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 37), torch.zeros(2, dtype=torch.int64)], ids=["no token valid", "no length"]
)
def test_nothing_valid_gives_zero_with_a_gradient_attached(backend, mask):
    for result in evaluate(backend, samples.tensors(), mask=mask):
        assert not result.any()


def test_an_empty_batch_gives_zero_with_a_gradient_attached(backend):
    for tensors in ([x[:0] for x in samples.tensors()], [x[:, :, :0] for x in samples.tensors()]):
        loss, *grads = evaluate(backend, tensors)
        assert loss == 0
        assert [x.shape for x in grads] == [x.shape for x in tensors[:2]]


def test_module_computes_what_the_function_does():
    tensors = samples.tensors(teacher_heads=4)
    options = {"causal": True, "window": 5, "student_scale": 0.3, "teacher_scale": 0.4, "average_teacher_heads": True}
    call = {"mask": samples.HOLES, "normalizer": 30.0}
    assert torch.equal(AttentionKLDivLoss(**options)(*tensors, **call), attention_kl_div(*tensors, **options, **call))
    flipped = [x.transpose(1, 2) for x in tensors]
    module = AttentionKLDivLoss(relation_heads=8, layout="bthd", reduction="sum")
    assert torch.equal(module(*flipped[:2], *flipped[:2]), torch.zeros(()))
    assert "relation_heads=8" in repr(module)
