"""The attention of training on a CPU and its gradient, against torch's own in float64."""

import pytest
import torch
from backends import DTYPES, fused, threads
from subprocesses import python
from tolerance import GRADIENT, VALUE, assert_close
from torch.nn.functional import scaled_dot_product_attention

from fastkd.ops.attention import attention, has_kernel

SIZES = {
    "of one token": (2, 2, 2, 1, 1, 8),
    "of short texts": (3, 4, 4, 9, 9, 16),
    "of odd tokens and width": (2, 2, 2, 37, 37, 21),
    "with shared keys": (2, 6, 2, 33, 33, 32),
    "of more keys than queries": (1, 2, 1, 20, 300, 8),
    "of several blocks": (1, 2, 2, 290, 290, 40),
    "of wide heads": (1, 1, 1, 17, 17, 130),
    "of few rows a block": (1, 1, 1, 40, 2100, 8),
}
"""Batch, heads, key heads, queries, keys and width."""
SCALE = 0.4


def operands(batch, heads, key_heads, queries, keys, dim, dtype=torch.float32):
    """Query, key and value in storage wider than the heads, some scores large, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads, tokens, wider=3):
        return torch.randn(batch, tokens, heads, dim + wider, generator=generator)[..., :dim].to(dtype)

    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    query, key, value = (draw(*size).transpose(1, 2) for size in sizes)
    query[:, :, queries // 2 :][:, :, :1] *= 8
    return query, key, value, draw(heads, queries, wider=0)


def masks(batch, heads, queries, keys):
    """By name; in one of them a query sees nothing."""
    generator = torch.Generator().manual_seed(1)
    padded = torch.arange(keys) < torch.tensor([keys, (keys + 1) // 2, 1])[:batch, None]
    any_way = torch.rand(batch, heads, queries, keys, generator=generator) > 0.5
    any_way[-1, :, -1] = False
    return {"none": None, "padding": padded[:, None, None], "any": any_way, "one for all heads": any_way[:, :1]}


def torchs_own(query, key, value, mask, scale, causal):
    options = {"attn_mask": mask, "scale": scale, "is_causal": causal, "enable_gqa": True}
    return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def output_and_gradients(function, tensors, *options):
    *leaves, grad = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    output = function(*leaves, *options)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def check(tensors, *options):
    exact = output_and_gradients(torchs_own, [x.double() for x in tensors], *options)
    plain = output_and_gradients(torchs_own, tensors, *options)
    for index, (got, *others) in enumerate(
        zip(output_and_gradients(attention, tensors, *options), exact, plain, strict=True)
    ):
        assert got.dtype == tensors[0].dtype
        assert_close(got, *others, GRADIENT if index else VALUE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, causal, dtype):
    tensors = operands(*SIZES[size], dtype)
    if causal and tensors[0].shape[2] != tensors[1].shape[2]:
        assert not has_kernel(*tensors[:3], None, causal)
    else:
        check(tensors, None, SCALE, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["padding", "any", "one for all heads"])
@pytest.mark.parametrize("size", ["of odd tokens and width", "with shared keys", "of more keys than queries"])
def test_masks(size, kind, dtype):
    batch, heads, _, queries, keys, _ = SIZES[size]
    check(operands(*SIZES[size], dtype), masks(batch, heads, queries, keys)[kind], SCALE, False)


def test_a_query_that_sees_nothing_gives_and_gets_zeros():
    tensors, mask = operands(1, 2, 2, 5, 7, 8), torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[:, :, 3] = False
    output, of_query, *others = output_and_gradients(attention, tensors, mask, SCALE, False)
    assert output[:, 3].eq(0).all()
    assert of_query[:, :, 3].eq(0).all()
    assert all(x.isfinite().all() and x.ne(0).any() for x in (output, of_query, *others))


@pytest.mark.parametrize("size", [(0, 2, 2, 5, 5, 8), (2, 2, 2, 0, 5, 8)], ids=str)
def test_nothing_to_attend_from(size):
    output, *gradients = output_and_gradients(attention, operands(*size), None, SCALE, False)
    assert output.shape == (size[0], size[3], size[1], size[5])
    assert all(x.eq(0).all() for x in (output, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_batch_nor_threads_change_a_bit(dtype):
    tensors = operands(5, 4, 2, 70, 70, 16, dtype)
    together = output_and_gradients(attention, tensors, None, SCALE, True)
    for count in (1, 3):
        with threads(count):
            again = output_and_gradients(attention, tensors, None, SCALE, True)
        assert all(map(torch.equal, again, together))
    alone = output_and_gradients(attention, [x[2:3] for x in tensors], None, SCALE, True)
    assert all(torch.equal(x, whole[2:3]) for x, whole in zip(alone, together, strict=True))


@fused
@pytest.mark.parametrize("learns", [True, False])
def test_op_is_registered_as_torch_wants_it(learns):
    query, key, value, _ = operands(2, 4, 2, 9, 9, 8)
    for x in (query, key, value):
        x.requires_grad_(learns)
    mask = masks(2, 4, 9, 9)["any"]
    torch.library.opcheck(torch.ops.fastkd.attention_forward, (query, key, value, mask, SCALE, False))


@fused
def test_what_the_kernels_cannot_give_is_refused_not_left_out():
    query, key, value, _ = operands(1, 1, 1, 5, 5, 8)
    output = attention(query.requires_grad_(), key, value, None, SCALE, False)
    with pytest.raises(RuntimeError, match="the fused attention has no second derivative"):
        torch.autograd.grad(output.sum(), query, create_graph=True)
    output, lse = torch.ops.fastkd.attention_forward(query, key, value, None, SCALE, False)
    assert (output.requires_grad, lse.requires_grad) == (True, False)


OPERANDS = operands(2, 4, 2, 9, 9, 8)
MASK = masks(2, 4, 9, 9)["any"]


@fused
@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"key": OPERANDS[1][..., :4]}, "query and key must be"),
        ({"key": OPERANDS[1][:, :, :, ::2], "query": OPERANDS[0][..., :4]}, "the last dimension must be dense"),
        ({"key": OPERANDS[1][:, :, :0]}, "a key at least"),
        ({"value": OPERANDS[2][:, :, :5]}, "value must be shaped as key"),
        ({"value": OPERANDS[2].bfloat16()}, "must be of one dtype"),
        ({"query": OPERANDS[0][:, :, :5], "causal": True}, "causal needs as many queries as keys"),
        ({"mask": MASK.float()}, "mask must be bool"),
        ({"mask": MASK[:, :1]}, "mask must be bool"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_the_op_itself(changed, complaint):
    query, key, value, _ = OPERANDS
    fitting = {"query": query, "key": key, "value": value, "mask": None, "scale": SCALE, "causal": False}
    if "value" not in changed and "key" in changed:
        changed = {**changed, "value": changed["key"]}
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.fastkd.attention_forward(*(fitting | changed).values())


@fused
@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512-no-bf16", "avx512-no-amx"])
def test_every_instruction_set(target):
    python("-m", "pytest", "-q", "tests/test_attention.py", "-k", "sizes or masks", FASTKD_CPU_TARGET=target)
