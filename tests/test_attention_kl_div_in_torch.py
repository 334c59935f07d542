"""attention_kl_div as a citizen of torch: derivatives, registration, strides, threads, memory."""

import attention_kl_div_samples as samples
import pytest
import torch
from backends import device_of, evaluate, fused, threads
from subprocesses import python

from fastkd.losses import attention_kl_div

BACKENDS = ("cpu",)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with samples.answering(request.param):
        yield request.param


def test_derivatives_of_the_reference():
    shapes, options = samples.CASES["averaged, excluding"]
    options = {name: x[..., :6, :6].double() if name == "teacher_bias" else x for name, x in options.items()}
    options["mask"] = torch.tensor([6, 4])
    query, key, *teacher = samples.tensors(**shapes | {"queries": 6}, dtype=torch.float64)

    def loss(query, key):
        return attention_kl_div(query, key, *teacher, causal=True, reduction="none", **options)

    leaves = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@fused
def test_second_derivative_is_refused(backend):
    query, *others = (x.to(device_of(backend)) for x in samples.tensors())
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(attention_kl_div(query, *others), query, create_graph=True)


@fused
@pytest.mark.parametrize("need_grad", [True, False])
def test_registration_is_honest(backend, need_grad):
    device = device_of(backend)
    tensors = [x.to(device) for x in samples.tensors(queries=12, teacher_heads=4)]
    bias = samples.bias(12, 12).to(device).expand(2, 2, 12, 12)
    mask = samples.HOLES[:, :12].to(device)
    weight = torch.ones((), device=device).expand(2, 2, 12) if need_grad else None
    arguments = (*tensors, bias, None, None, None, mask, mask, 0.3, 0.4, True, 5, weight)
    torch.library.opcheck(torch.ops.fastkd.attention_kl_div.default, arguments)


@fused
def test_gradients_are_laid_out_as_their_tensors(backend):
    tensors = [x.to(device_of(backend)) for x in samples.tensors()]
    weight = torch.ones(2, 2, 37, device=tensors[0].device)
    options = (*[None] * 6, 0.3, 0.3, False, 0)
    loss, *grads = torch.ops.fastkd.attention_kl_div(*tensors, *options, weight)
    assert [x.stride() for x in grads] == [torch.empty_like(x).stride() for x in tensors[:2]]
    alone = torch.ops.fastkd.attention_kl_div(*tensors, *options, None)
    assert torch.equal(alone[0], loss)
    assert [x.numel() for x in alone[1:]] == [0, 0]


def test_mixed_dtypes_are_promoted(backend):
    query, key, *teacher = (x.to(device_of(backend)) for x in samples.tensors())
    teacher = [x.bfloat16() for x in teacher]
    wanted = attention_kl_div(query, key, *(x.float() for x in teacher))
    assert torch.equal(attention_kl_div(query, key, *teacher), wanted)


def test_any_strides_and_both_layouts(backend):
    dense = [x.contiguous() for x in samples.tensors()]
    options = {"device": device_of(backend), "reduction": "none", "wanted": (0, 1)}
    wanted = evaluate(attention_kl_div, *dense, **options)
    gaps = [torch.stack((x, x + 1), -1)[..., 0] for x in dense]
    far = [torch.stack((x, x + 1), 2)[:, :, 0] for x in dense]
    for tensors in (gaps, far, samples.tensors()):
        for got, want in zip(evaluate(attention_kl_div, *tensors, **options), wanted, strict=True):
            assert torch.equal(got, want)
    swapped = [x.transpose(1, 2).contiguous() for x in dense]
    loss, *grads = evaluate(attention_kl_div, *swapped, layout="bthd", **options)
    assert torch.equal(loss, wanted[0])
    assert all(torch.equal(got.transpose(1, 2), want) for got, want in zip(grads, wanted[1:], strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_neither_batch_nor_threads_change_a_bit(backend, reduction):
    tensors = samples.tensors(6, 4, 70, key_heads=2)
    options = {"device": device_of(backend), "wanted": (0, 1), "causal": True}
    together = evaluate(attention_kl_div, *tensors, reduction=reduction, **options)
    for count in (1, 3):
        with threads(count):
            again = evaluate(attention_kl_div, *tensors, reduction=reduction, **options)
        assert all(map(torch.equal, again, together))
    if reduction == "none":
        alone = evaluate(attention_kl_div, *(x[2:3] for x in tensors), reduction="none", **options)
        assert torch.equal(alone[0], together[0][2:3])


def test_no_map_is_ever_in_memory():
    """One map of the call would take 64 MiB; all that is allocated are gradients of 128 KiB each, and the losses."""
    tensors = [x.contiguous() for x in samples.tensors(1, 1, 4096)]
    leaves = [x.requires_grad_() for x in tensors[:2]]
    with torch.profiler.profile(profile_memory=True) as profile:
        attention_kl_div(*tensors).backward()
    assert all(x.grad.abs().sum() > 0 for x in leaves)
    taken = [event.cpu_memory_usage for event in profile.key_averages()]
    assert 2**17 <= max(taken) < 2**20


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512-no-bf16", "avx512-no-amx", "avx512"])
def test_every_instruction_set(target):
    chosen = "cpu and (float or length)"
    python("-m", "pytest", "-q", "tests/test_attention_kl_div.py", "-k", chosen, FASTKD_CPU_TARGET=target)
