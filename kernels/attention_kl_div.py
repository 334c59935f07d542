"""KL of attention maps and its gradient, with no map in memory: tiles of scores are made anew where they are needed.

Three sweeps, each of which owns what it writes, so that nothing is added atomically and results repeat bit for bit:

    maximum and sum of exponentials of a row  2·T²·d FLOPs a head and model
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

from fastkd.kernels._math import ABSENT, exp, origin


@triton.jit
def _load(ptr, stride, tokens, there, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """(TOKENS, BLOCK_DIM), zeros where there is nothing or nothing that counts."""
    dims = tl.arange(0, BLOCK_DIM)
    mask = there[:, None] & (dims < DIM)[None, :]
    return tl.load(ptr + tokens[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _there(mask_ptr, batch, tokens, count):
    there = tokens < count
    if mask_ptr is not None:
        there &= tl.load(mask_ptr + batch * count + tokens, mask=there, other=0) != 0
    return there


@triton.jit
def _visible(queries, keys, counts, exists, ahead, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    distance = keys.to(tl.int32)[None, :] - (queries + ahead).to(tl.int32)[:, None]
    visible = counts[:, None] & exists[None, :]
    if CAUSAL:
        visible &= distance <= 0
    if WINDOW:
        visible &= (distance < window) & (-distance < window)
    return visible


@triton.jit
def _scores(query, key, scale, bias_ptr, bias_stride, queries, keys, visible):
    """−inf where a query sees no key."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + queries[:, None] * bias_stride + keys[None, :], mask=visible, other=0.0)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _load_sums(sums_ptr, row, inside):
    """Maximum and Z of a row; Z is 1 where the row is empty, so that nothing is divided by 0."""
    top = tl.load(sums_ptr + 2 * row, mask=inside, other=float("-inf"))
    total = tl.load(sums_ptr + 2 * row + 1, mask=inside, other=0.0)
    return top, tl.where(total == 0.0, 1.0, total), total == 0.0


@triton.jit
def _above_absent(x):
    return tl.maximum(x, ABSENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _key_range(first, ROWS: tl.constexpr, n_keys, ahead, window, BLOCK: tl.constexpr, CAUSAL, WINDOW):
    """Keys that some of the queries from ``first`` on see, the beginning a multiple of BLOCK."""
    begin, end = 0, n_keys
    if WINDOW:
        begin = tl.maximum(first + ahead - window + 1, 0) // BLOCK * BLOCK
        end = tl.minimum(end, first + ROWS - 1 + ahead + window)
    if CAUSAL:
        end = tl.minimum(end, first + ROWS + ahead)
    return begin, end


@triton.jit
def _query_range(first, KEYS: tl.constexpr, n_queries, ahead, window, BLOCK: tl.constexpr, CAUSAL, WINDOW):
    """Queries that see some of the keys from ``first`` on, the beginning a multiple of BLOCK."""
    begin, end = 0, n_queries
    if CAUSAL:
        begin = tl.maximum(first - ahead, 0) // BLOCK * BLOCK
    elif WINDOW:
        begin = tl.maximum(first - window + 1 - ahead, 0) // BLOCK * BLOCK
    if WINDOW:
        end = tl.minimum(end, first + KEYS - 1 + window - ahead)
    return begin, end


@triton.jit
def sums_kernel(
    sums_ptr, query_ptr, key_ptr, bias_ptr, query_mask_ptr, key_mask_ptr,
    query_batch, query_head, query_token, key_batch, key_head, key_token, bias_batch, bias_head, bias_token,
    n_queries, n_keys, window, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    batch, head = tl.program_id(1).to(tl.int64) // HEADS, tl.program_id(1).to(tl.int64) % HEADS
    queries, ahead = first + tl.arange(0, ROWS), n_keys - n_queries
    counts = _there(query_mask_ptr, batch, queries, n_queries)
    query_base = query_ptr + batch * query_batch + head * query_head
    key_base = key_ptr + batch * key_batch + head // GROUP * key_head
    bias_base = None if bias_ptr is None else bias_ptr + batch * bias_batch + head * bias_head
    query = _load(query_base, query_token, queries, counts, DIM, BLOCK_DIM)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    begin, end = _key_range(first, ROWS, n_keys, ahead, window, KEYS, CAUSAL, WINDOW)
    for step in range(begin, end, KEYS):
        keys = step + tl.arange(0, KEYS)
        exists = _there(key_mask_ptr, batch, keys, n_keys)
        key = _load(key_base, key_token, keys, exists, DIM, BLOCK_DIM)
        visible = _visible(queries, keys, counts, exists, ahead, window, CAUSAL, WINDOW)
        scores = _scores(query, key, scale, bias_base, bias_token, queries, keys, visible)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        total = total * exp(top - origin(new_top), 1.0) + tl.sum(exp(scores - origin(new_top)[:, None], 1.0), axis=1)
        top = new_top
    row, inside = (batch * HEADS + head) * n_queries + queries, queries < n_queries
    tl.store(sums_ptr + 2 * row, top, mask=inside)
    tl.store(sums_ptr + 2 * row + 1, total, mask=inside)


@triton.jit
def _teacher(
    sums_ptr, query_base, key_base, bias_base, query_head, query_token, key_head, key_token, bias_head, bias_token,
    head, queries, keys, counts, exists, visible, n_queries, scale, AVERAGED: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """x and Z of the teacher; of AVERAGED heads x is the logarithm of their mean probability, and Z is 1."""
    total, members, allowed = tl.zeros_like(visible.to(tl.float32)), tl.zeros_like(counts.to(tl.float32)), visible
    x, z = total, members + 1.0
    for m in tl.static_range(AVERAGED):
        member = head * AVERAGED + m
        query = _load(query_base + member * query_head, query_token, queries, counts, DIM, BLOCK_DIM)
        key = _load(key_base + member // GROUP * key_head, key_token, keys, exists, DIM, BLOCK_DIM)
        bias = None if bias_base is None else bias_base + member * bias_head
        scores = _scores(query, key, scale, bias, bias_token, queries, keys, visible)
        top, of_member, empty = _load_sums(sums_ptr, member * n_queries + queries, queries < n_queries)
        if AVERAGED == 1:
            x, z = scores - origin(top)[:, None], of_member
        else:
            here = scores != float("-inf")
            allowed = here if m == 0 else allowed | here
            total += exp(scores - origin(top)[:, None], 1.0) / of_member[:, None]
            members += tl.where(empty, 0.0, 1.0)
    if AVERAGED > 1:
        mean = total / tl.maximum(members, 1.0)[:, None]
        x = tl.where(allowed, tl.where(mean == 0.0, ABSENT, tl.log(mean)), float("-inf"))
    return x, z


@triton.jit
def loss_kernel(
    loss_ptr, row_scale_ptr, grad_ptr, weight_ptr, sums_ptr, query_ptr, key_ptr, bias_ptr,
    t_sums_ptr, t_query_ptr, t_key_ptr, t_bias_ptr, query_mask_ptr, key_mask_ptr,
    grad_batch, grad_head, grad_token, query_batch, query_head, query_token, key_batch, key_head, key_token,
    bias_batch, bias_head, bias_token, t_query_batch, t_query_head, t_query_token, t_key_batch, t_key_head,
    t_key_token, t_bias_batch, t_bias_head, t_bias_token, n_queries, n_keys, window, scale, t_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, AVERAGED: tl.constexpr,
    T_GROUP: tl.constexpr, T_DIM: tl.constexpr, T_BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    batch, head = tl.program_id(1).to(tl.int64) // HEADS, tl.program_id(1).to(tl.int64) % HEADS
    queries, ahead = first + tl.arange(0, ROWS), n_keys - n_queries
    inside = queries < n_queries
    row = (batch * HEADS + head) * n_queries + queries
    counts = _there(query_mask_ptr, batch, queries, n_queries)
    key_base = key_ptr + batch * key_batch + head // GROUP * key_head
    bias_base = None if bias_ptr is None else bias_ptr + batch * bias_batch + head * bias_head
    t_bias_base = None if t_bias_ptr is None else t_bias_ptr + batch * t_bias_batch
    query = _load(query_ptr + batch * query_batch + head * query_head, query_token, queries, counts, DIM, BLOCK_DIM)
    top, z, empty = _load_sums(sums_ptr, row, inside)
    cross, mass, lacking, last_z_t = tl.zeros_like(z), tl.zeros_like(z), tl.zeros_like(z), tl.zeros_like(z) + 1.0
    grad = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    begin, end = _key_range(first, ROWS, n_keys, ahead, window, KEYS, CAUSAL, WINDOW)
    for step in range(begin, end, KEYS):
        keys = step + tl.arange(0, KEYS)
        exists = _there(key_mask_ptr, batch, keys, n_keys)
        key = _load(key_base, key_token, keys, exists, DIM, BLOCK_DIM)
        visible = _visible(queries, keys, counts, exists, ahead, window, CAUSAL, WINDOW)
        scores = _scores(query, key, scale, bias_base, bias_token, queries, keys, visible)
        raw_t, z_t = _teacher(
            t_sums_ptr + 2 * batch * HEADS * AVERAGED * n_queries, t_query_ptr + batch * t_query_batch,
            t_key_ptr + batch * t_key_batch, t_bias_base, t_query_head, t_query_token, t_key_head, t_key_token,
            t_bias_head, t_bias_token, head, queries, keys, counts, exists, visible, n_queries, t_scale, AVERAGED,
            T_GROUP, T_DIM, T_BLOCK_DIM,
        )  # fmt: skip
        missing = (scores == float("-inf")) & (raw_t > float("-inf"))
        lacking = tl.maximum(lacking, tl.max(missing.to(tl.float32), axis=1))
        x_s, x_t = _above_absent(scores - origin(top)[:, None]), _above_absent(raw_t)
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
        row_scale = tl.where(alive, tl.load(weight_ptr + row, mask=inside, other=0.0) * scale, 0.0)
        tl.store(row_scale_ptr + row, row_scale, mask=inside)
        grad = tl.where(alive[:, None], grad * row_scale[:, None], 0.0)
        dims = tl.arange(0, BLOCK_DIM)
        grad_base = grad_ptr + batch * grad_batch + head * grad_head
        mask = inside[:, None] & (dims < DIM)[None, :]
        tl.store(grad_base + queries[:, None] * grad_token + dims[None, :], grad, mask=mask)


@triton.jit
def key_gradient_kernel(
    row_scale_ptr, grad_ptr, sums_ptr, query_ptr, key_ptr, bias_ptr, t_sums_ptr, t_query_ptr, t_key_ptr, t_bias_ptr,
    query_mask_ptr, key_mask_ptr,
    grad_batch, grad_head, grad_token, query_batch, query_head, query_token, key_batch, key_head, key_token,
    bias_batch, bias_head, bias_token, t_query_batch, t_query_head, t_query_token, t_key_batch, t_key_head,
    t_key_token, t_bias_batch, t_bias_head, t_bias_token, n_queries, n_keys, window, scale, t_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, AVERAGED: tl.constexpr,
    T_GROUP: tl.constexpr, T_DIM: tl.constexpr, T_BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    first, key_heads = tl.program_id(0).to(tl.int64) * KEYS, HEADS // GROUP
    batch, of_key = tl.program_id(1).to(tl.int64) // key_heads, tl.program_id(1).to(tl.int64) % key_heads
    keys, ahead = first + tl.arange(0, KEYS), n_keys - n_queries
    exists = _there(key_mask_ptr, batch, keys, n_keys)
    key = _load(key_ptr + batch * key_batch + of_key * key_head, key_token, keys, exists, DIM, BLOCK_DIM)
    t_bias_base = None if t_bias_ptr is None else t_bias_ptr + batch * t_bias_batch
    grad = tl.zeros((KEYS, BLOCK_DIM), tl.float32)
    begin, end = _query_range(first, KEYS, n_queries, ahead, window, ROWS, CAUSAL, WINDOW)
    for head in range(of_key * GROUP, (of_key + 1) * GROUP):
        query_base = query_ptr + batch * query_batch + head * query_head
        bias_base = None if bias_ptr is None else bias_ptr + batch * bias_batch + head * bias_head
        for step in range(begin, end, ROWS):
            queries = step + tl.arange(0, ROWS)
            row, inside = (batch * HEADS + head) * n_queries + queries, queries < n_queries
            row_scale = tl.load(row_scale_ptr + row, mask=inside, other=0.0)
            top, z, _ = _load_sums(sums_ptr, row, inside)
            counts = _there(query_mask_ptr, batch, queries, n_queries)
            query = _load(query_base, query_token, queries, counts, DIM, BLOCK_DIM)
            visible = _visible(queries, keys, counts, exists, ahead, window, CAUSAL, WINDOW)
            scores = _scores(query, key, scale, bias_base, bias_token, queries, keys, visible)
            raw_t, z_t = _teacher(
                t_sums_ptr + 2 * batch * HEADS * AVERAGED * n_queries, t_query_ptr + batch * t_query_batch,
                t_key_ptr + batch * t_key_batch, t_bias_base, t_query_head, t_query_token, t_key_head, t_key_token,
                t_bias_head, t_bias_token, head, queries, keys, counts, exists, visible, n_queries, t_scale, AVERAGED,
                T_GROUP, T_DIM, T_BLOCK_DIM,
            )  # fmt: skip
            p_s = exp(scores - origin(top)[:, None], 1.0) / z[:, None]
            p_t = exp(raw_t, 1.0) / z_t[:, None]
            difference = tl.where((row_scale != 0.0)[:, None], (p_s - p_t) * row_scale[:, None], 0.0)
            grad += tl.dot(tl.trans(difference).to(query.dtype), query, input_precision="ieee")
    dims = tl.arange(0, BLOCK_DIM)
    mask = (keys < n_keys)[:, None] & (dims < DIM)[None, :]
    grad_base = grad_ptr + batch * grad_batch + of_key * grad_head
    tl.store(grad_base + keys[:, None] * grad_token + dims[None, :], grad, mask=mask)


def block_dim(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def tile(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Rows and keys of a tile and warps: what the registers of the gradients' accumulators leave room for."""
    if dtype == torch.float32:
        return {"ROWS": 16, "KEYS": 16, "num_warps": 4 if dim <= 64 else 8}
    return {"ROWS": 64 if dim <= 64 else 32, "KEYS": 32, "num_warps": 8}


def launch_attention_kl_div(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    *,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    scales: tuple[float, float],
    causal: bool,
    window: int,
    row_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (B, H, T_q) and gradients of query and key, empty without ``row_weight``; a model is query, key, bias."""
    query, key, bias = student
    batch, heads, n_queries, dim = query.shape
    n_keys = key.shape[2]
    loss = query.new_empty(query.shape[:-1], dtype=torch.float32)
    need_grad = row_weight is not None
    grads = [torch.empty_like(x) if need_grad else x.new_empty(0) for x in (query, key)]
    if not loss.numel() or not n_keys:
        return loss.zero_(), grads[0].zero_(), grads[1].zero_()
    sizes = tile(query.dtype, max(dim, teacher[0].shape[3]))
    masks = [None if mask is None else mask.contiguous() for mask in (query_mask, key_mask)]
    shared: dict[str, Any] = {"CAUSAL": causal, "WINDOW": window > 0, **sizes}
    row_blocks = triton.cdiv(n_queries, sizes["ROWS"])

    def model(query: Tensor, key: Tensor, bias: Tensor | None) -> tuple[list[Any], list[int]]:
        strides = [n for x in (query, key, bias) for n in ((0, 0, 0) if x is None else x.stride()[:3])]
        return [query, key, bias], strides

    sums = []
    for (q, k, b), scale in zip((student, teacher), scales, strict=True):
        tensors, strides = model(q, k, b)
        sums.append(q.new_empty((*q.shape[:-1], 2), dtype=torch.float32))
        sums_kernel[(row_blocks, batch * q.shape[1])](
            sums[-1], *tensors, *masks, *strides, n_queries, n_keys, window, scale,
            HEADS=q.shape[1], GROUP=q.shape[1] // k.shape[1], DIM=q.shape[3], BLOCK_DIM=block_dim(q.shape[3]), **shared,
        )  # fmt: skip
    tensors, strides = model(query, key, bias)
    t_tensors, t_strides = model(*teacher)
    operands = sums[0], *tensors, sums[1], *t_tensors, *masks
    sizes_and_scales = *strides, *t_strides, n_queries, n_keys, window, *scales
    t_heads, t_dim = teacher[0].shape[1], teacher[0].shape[3]
    shared |= {"HEADS": heads, "GROUP": heads // key.shape[1], "DIM": dim, "BLOCK_DIM": block_dim(dim)}
    shared |= {"AVERAGED": t_heads // heads, "T_GROUP": t_heads // teacher[1].shape[1]}
    shared |= {"T_DIM": t_dim, "T_BLOCK_DIM": block_dim(t_dim)}
    row_scale = torch.empty_like(loss) if need_grad else None
    weight = None if row_weight is None else row_weight.contiguous()
    grad_query = grads[0] if need_grad else None
    grad_strides = grads[0].stride()[:3] if need_grad else (0, 0, 0)
    loss_kernel[(row_blocks, batch * heads)](
        loss, row_scale, grad_query, weight, *operands, *grad_strides, *sizes_and_scales, **shared
    )
    if need_grad:
        key_gradient_kernel[(triton.cdiv(n_keys, sizes["KEYS"]), batch * key.shape[1])](
            row_scale, grads[1], *operands, *grads[1].stride()[:3], *sizes_and_scales, **shared
        )
    return loss, grads[0], grads[1]
