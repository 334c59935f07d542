"""KL of attention maps and its gradient, with no map in memory: tiles of scores are made anew where they are needed.

Three sweeps, each of which owns what it writes, so that nothing is added atomically and results repeat bit for bit:

    maximum and sum of exponentials of a row  2·T²·d FLOPs a head and model, none where the caller has their logarithm
    loss of a row and its query's gradient    6·T²·d
    a key's gradient                          6·T²·d

16·T²·d FLOPs in all, where 12 would do with atomic additions; half if causal, since tiles that no query sees are passed
over. With x = score − row maximum and Z = Σ exp(x), KL = Σ exp(x_t)/Z_t·(x_t − x_s) + log(Z_s/Z_t): x_t − x_s is taken
inside the sum, before anything large has cancelled. The difference of probabilities is formed in float32 and rounded to
the dtype of the tensors for its product.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels._attention import (
    Model,
    Tokens,
    both_tiles,
    key_range,
    load_key,
    load_query,
    load_sums,
    place,
    query_range,
    scores,
    there,
    visible,
)
from fastkd.kernels._math import ABSENT, exp, origin


@triton.jit
def _above_absent(x):
    return tl.maximum(x, ABSENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sums_kernel(model, tokens, ROWS: tl.constexpr, KEYS: tl.constexpr):
    batch, head, block = place(model.HEADS)
    first = block * ROWS
    queries = first + tl.arange(0, ROWS)
    counts = there(tokens.query_mask, batch, queries, tokens.n_queries)
    query = load_query(model, batch, head, queries, counts)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    begin, end = key_range(tokens, first, ROWS, KEYS)
    for step in range(begin, end, KEYS):
        keys = step + tl.arange(0, KEYS)
        exists = there(tokens.key_mask, batch, keys, tokens.n_keys)
        key = load_key(model, batch, head, keys, exists)
        seen = visible(tokens, queries, keys, counts, exists)
        tile = scores(model, batch, head, query, key, queries, keys, seen)
        new_top = tl.maximum(top, tl.max(tile, axis=1))
        total = total * exp(top - origin(new_top), 1.0) + tl.sum(exp(tile - origin(new_top)[:, None], 1.0), axis=1)
        top = new_top
    row, inside = (batch * model.HEADS + head) * tokens.n_queries + queries, queries < tokens.n_queries
    tl.store(model.sums + 2 * row, top, mask=inside)
    tl.store(model.sums + 2 * row + 1, total, mask=inside)


@triton.jit
def loss_kernel(
    loss_ptr, row_scale_ptr, grad_ptr, grad_batch, grad_head, grad_token, weight_ptr, student, teacher, tokens,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch, head, block = place(student.HEADS)
    first = block * ROWS
    queries = first + tl.arange(0, ROWS)
    inside = queries < tokens.n_queries
    row = (batch * student.HEADS + head) * tokens.n_queries + queries
    counts = there(tokens.query_mask, batch, queries, tokens.n_queries)
    query = load_query(student, batch, head, queries, counts)
    top, z, empty = load_sums(student, tokens, batch, head, queries)
    cross, mass, lacking, last_z_t = tl.zeros_like(z), tl.zeros_like(z), tl.zeros_like(z), tl.zeros_like(z) + 1.0
    grad = tl.zeros((ROWS, student.BLOCK_DIM), tl.float32)
    begin, end = key_range(tokens, first, ROWS, KEYS)
    for step in range(begin, end, KEYS):
        keys = step + tl.arange(0, KEYS)
        exists = there(tokens.key_mask, batch, keys, tokens.n_keys)
        key = load_key(student, batch, head, keys, exists)
        of_student, raw_t, z_t = both_tiles(
            student, teacher, tokens, batch, head, query, key, queries, keys, counts, exists
        )
        missing = (of_student == float("-inf")) & (raw_t > float("-inf"))
        lacking = tl.maximum(lacking, tl.max(missing.to(tl.float32), axis=1))
        x_s, x_t = _above_absent(of_student - origin(top)[:, None]), _above_absent(raw_t)
        e_t = exp(x_t, 1.0)
        cross += tl.sum(e_t * (x_t - x_s), axis=1)
        mass += tl.sum(e_t, axis=1)
        last_z_t = z_t
        if grad_ptr is not None:
            difference = exp(x_s, 1.0) / z[:, None] - e_t / z_t[:, None]
            grad += tl.dot(difference.to(key.dtype), key, input_precision="ieee")
    t_empty = mass == 0.0
    infinite = (lacking > 0.0) | (empty != t_empty)
    alive = counts & ~infinite & ~empty
    loss = cross / last_z_t + tl.log(z / last_z_t)
    loss = tl.where(alive, loss, tl.where(infinite & counts, float("inf"), 0.0))
    tl.store(loss_ptr + row, loss, mask=inside)
    if grad_ptr is not None:
        row_scale = tl.where(alive, tl.load(weight_ptr + row, mask=inside, other=0.0) * student.scale, 0.0)
        tl.store(row_scale_ptr + row, row_scale, mask=inside)
        grad = tl.where(alive[:, None], grad * row_scale[:, None], 0.0)
        dims = tl.arange(0, student.BLOCK_DIM)
        grad_base = grad_ptr + batch * grad_batch + head * grad_head
        mask = inside[:, None] & (dims < student.DIM)[None, :]
        tl.store(grad_base + queries[:, None] * grad_token + dims[None, :], grad, mask=mask)


@triton.jit
def key_gradient_kernel(
    row_scale_ptr, grad_ptr, grad_batch, grad_head, grad_token, student, teacher, tokens,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch, of_key, block = place(student.HEADS // student.GROUP)
    first = block * KEYS
    keys = first + tl.arange(0, KEYS)
    exists = there(tokens.key_mask, batch, keys, tokens.n_keys)
    key = load_key(student, batch, of_key * student.GROUP, keys, exists)
    grad = tl.zeros((KEYS, student.BLOCK_DIM), tl.float32)
    begin, end = query_range(tokens, first, KEYS, ROWS)
    for head in range(of_key * student.GROUP, (of_key + 1) * student.GROUP):
        for step in range(begin, end, ROWS):
            queries = step + tl.arange(0, ROWS)
            row = (batch * student.HEADS + head) * tokens.n_queries + queries
            row_scale = tl.load(row_scale_ptr + row, mask=queries < tokens.n_queries, other=0.0)
            top, z, _ = load_sums(student, tokens, batch, head, queries)
            counts = there(tokens.query_mask, batch, queries, tokens.n_queries)
            query = load_query(student, batch, head, queries, counts)
            of_student, x_t, z_t = both_tiles(
                student, teacher, tokens, batch, head, query, key, queries, keys, counts, exists
            )
            p_s = exp(of_student - origin(top)[:, None], 1.0) / z[:, None]
            difference = (p_s - exp(x_t, 1.0) / z_t[:, None]) * row_scale[:, None]
            difference = tl.where((row_scale != 0.0)[:, None], difference, 0.0)
            grad += tl.dot(tl.trans(difference).to(query.dtype), query, input_precision="ieee")
    dims = tl.arange(0, student.BLOCK_DIM)
    mask = (keys < tokens.n_keys)[:, None] & (dims < student.DIM)[None, :]
    grad_base = grad_ptr + batch * grad_batch + of_key * grad_head
    tl.store(grad_base + keys[:, None] * grad_token + dims[None, :], grad, mask=mask)


def block_dim(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def tile(kernel: Any, dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Rows and keys of a tile, warps, and loads that run ahead: what the registers leave room for."""
    if dtype == torch.float32 and kernel is key_gradient_kernel:
        return {"ROWS": 16, "KEYS": 16, "num_warps": 8, "num_stages": 1}
    if dtype == torch.float32:
        return {"ROWS": 16, "KEYS": 16, "num_warps": 4 if dim <= 64 else 8, "num_stages": 2}
    if dim <= 64:
        return {"ROWS": 64, "KEYS": 32, "num_warps": 8, "num_stages": 2}
    return {"ROWS": 32, "KEYS": 32, "num_warps": 8}


def _model(query: Tensor, key: Tensor, bias: Tensor | None, lse: Tensor | None, scale: float) -> Model:
    """A known log Σ exp stands for the maximum of its row, whose Z is then 1; of an empty row it is ±inf."""
    heads, dim = query.shape[1], query.shape[3]
    if lse is None:
        sums = query.new_empty((*query.shape[:3], 2), dtype=torch.float32)
    else:
        empty = lse.isinf()
        sums = torch.stack((lse.masked_fill(empty, float("-inf")), torch.where(empty, 0.0, 1.0)), dim=-1)
    strides = [n for x in (query, key, bias) for n in ((0, 0, 0) if x is None else x.stride()[:3])]
    constants = (tl.constexpr(n) for n in (heads, heads // key.shape[1], dim, block_dim(dim)))
    return Model(sums, query, key, bias, *strides, scale, *constants)


def launch_attention_kl_div(
    student: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    scales: tuple[float, float],
    causal: bool,
    window: int,
    row_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (B, H, T_q) and gradients of query and key, empty without ``row_weight``.

    A model is query, key, bias and log Σ exp of its rows of scores, (B, H, T_q) float32.
    """
    query, key = student[:2]
    batch, heads, n_queries, dim = query.shape
    n_keys, key_heads = key.shape[2], key.shape[1]
    loss = query.new_empty(query.shape[:-1], dtype=torch.float32)
    grads = [x.new_empty(0) if row_weight is None else torch.empty_like(x) for x in (query, key)]
    if not loss.numel() or not n_keys:
        return loss.zero_(), grads[0].zero_(), grads[1].zero_()
    wider = max(dim, teacher[0].shape[3])
    sizes, key_sizes = (tile(kernel, query.dtype, wider) for kernel in (loss_kernel, key_gradient_kernel))
    masks = [None if mask is None else mask.contiguous() for mask in (query_mask, key_mask)]
    tokens = Tokens(*masks, n_queries, n_keys, window, tl.constexpr(causal), tl.constexpr(window > 0))
    models = [_model(*model, scale) for model, scale in zip((student, teacher), scales, strict=True)]
    row_blocks, key_blocks = triton.cdiv(n_queries, sizes["ROWS"]), triton.cdiv(n_keys, key_sizes["KEYS"])
    with torch.cuda.device_of(query):
        for model, (*_, lse) in zip(models, (student, teacher), strict=True):
            if lse is None:
                sums_kernel[(batch * model.query.shape[1], row_blocks)](model, tokens, **sizes)
        if row_weight is None:
            loss_kernel[(batch * heads, row_blocks)](loss, None, None, 0, 0, 0, None, *models, tokens, **sizes)
            return loss, grads[0], grads[1]
        row_scale = torch.empty_like(loss)
        loss_kernel[(batch * heads, row_blocks)](
            loss, row_scale, grads[0], *grads[0].stride()[:3], row_weight.contiguous(), *models, tokens, **sizes
        )
        key_gradient_kernel[(batch * key_heads, key_blocks)](
            row_scale, grads[1], *grads[1].stride()[:3], *models, tokens, **key_sizes
        )
    return loss, grads[0], grads[1]
