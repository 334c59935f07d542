"""Tiles of attention scores of student and teacher, for kernels that make them anew wherever they are needed."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels._math import ABSENT, exp, origin


class Model(NamedTuple):
    """Pointers and strides of one model; ``sums`` holds the maximum and Z of every row of scores, side by side."""

    sums: Any
    query: Any
    key: Any
    bias: Any
    query_batch: int
    query_head: int
    query_token: int
    key_batch: int
    key_head: int
    key_token: int
    bias_batch: int
    bias_head: int
    bias_token: int
    scale: float
    HEADS: Any
    GROUP: Any  # heads that share a key head
    DIM: Any
    BLOCK_DIM: Any


class Tokens(NamedTuple):
    """Which tokens there are, and which of them see each other."""

    query_mask: Any
    key_mask: Any
    n_queries: int
    n_keys: int
    window: int
    CAUSAL: Any
    WINDOW: Any


@triton.jit
def place(HEADS):
    """Batch, head and block of this program: heads of all examples come first, since other dimensions end at 65,535."""
    pair = tl.program_id(0).to(tl.int64)
    return pair // HEADS, pair % HEADS, tl.program_id(1).to(tl.int64)


@triton.jit
def load_rows(base, stride, tokens, there, model):
    """(TOKENS, BLOCK_DIM), zeros where there is nothing or nothing that counts."""
    dims = tl.arange(0, model.BLOCK_DIM)
    mask = there[:, None] & (dims < model.DIM)[None, :]
    return tl.load(base + tokens[:, None].to(tl.int64) * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def load_query(model, batch, head, queries, counts):
    base = model.query + batch * model.query_batch + head * model.query_head
    return load_rows(base, model.query_token, queries, counts, model)


@triton.jit
def load_key(model, batch, head, keys, exists):
    base = model.key + batch * model.key_batch + head // model.GROUP * model.key_head
    return load_rows(base, model.key_token, keys, exists, model)


@triton.jit
def there(mask, batch, tokens, count):
    inside = tokens < count
    if mask is not None:
        inside &= tl.load(mask + batch * count + tokens, mask=inside, other=0) != 0
    return inside


@triton.jit
def visible(tokens, queries, keys, counts, exists):
    ahead = tokens.n_keys - tokens.n_queries
    distance = keys.to(tl.int32)[None, :] - (queries + ahead).to(tl.int32)[:, None]
    seen = counts[:, None] & exists[None, :]
    if tokens.CAUSAL:
        seen &= distance <= 0
    if tokens.WINDOW:
        seen &= (distance < tokens.window) & (-distance < tokens.window)
    return seen


@triton.jit
def key_range(tokens, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Keys that some of the queries from ``first`` on see, the beginning a multiple of BLOCK."""
    ahead = tokens.n_keys - tokens.n_queries
    begin, end = 0, tokens.n_keys
    if tokens.WINDOW:
        begin = tl.maximum(first + ahead - tokens.window + 1, 0) // BLOCK * BLOCK
        end = tl.minimum(end, first + ROWS - 1 + ahead + tokens.window)
    if tokens.CAUSAL:
        end = tl.minimum(end, first + ROWS + ahead)
    return begin, end


@triton.jit
def query_range(tokens, first, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Queries that see some of the keys from ``first`` on, the beginning a multiple of BLOCK."""
    ahead = tokens.n_keys - tokens.n_queries
    begin, end = 0, tokens.n_queries
    if tokens.CAUSAL:
        begin = tl.maximum(first - ahead, 0) // BLOCK * BLOCK
    elif tokens.WINDOW:
        begin = tl.maximum(first - tokens.window + 1 - ahead, 0) // BLOCK * BLOCK
    if tokens.WINDOW:
        end = tl.minimum(end, first + KEYS - 1 + tokens.window - ahead)
    return begin, end


@triton.jit
def scores(model, batch, head, query, key, queries, keys, seen):
    """−inf where a query sees no key."""
    tile = tl.dot(query, tl.trans(key), input_precision="ieee") * model.scale
    if model.bias is not None:
        base = model.bias + batch * model.bias_batch + head * model.bias_head
        rows = base + queries[:, None].to(tl.int64) * model.bias_token
        tile += tl.load(rows + keys[None, :], mask=seen, other=0.0)
    return tl.where(seen, tile, float("-inf"))


@triton.jit
def load_sums(model, tokens, batch, head, queries):
    """Maximum, Z and whether the row is empty; Z is then 1, so that nothing is divided by 0."""
    row, inside = (batch * model.HEADS + head) * tokens.n_queries + queries, queries < tokens.n_queries
    top = tl.load(model.sums + 2 * row, mask=inside, other=float("-inf"))
    total = tl.load(model.sums + 2 * row + 1, mask=inside, other=0.0)
    return top, tl.where(total == 0.0, 1.0, total), total == 0.0


@triton.jit
def teacher_tile(model, tokens, batch, head, queries, keys, counts, exists, seen, AVERAGED: tl.constexpr):
    """x and Z of the teacher; of AVERAGED heads x is the logarithm of their mean probability, and Z is 1."""
    total, members, allowed = tl.zeros_like(seen.to(tl.float32)), tl.zeros_like(counts.to(tl.float32)), seen
    x, z = total, members + 1.0
    for m in tl.static_range(AVERAGED):
        member = head * AVERAGED + m
        query = load_query(model, batch, member, queries, counts)
        key = load_key(model, batch, member, keys, exists)
        tile = scores(model, batch, member, query, key, queries, keys, seen)
        top, of_member, empty = load_sums(model, tokens, batch, member, queries)
        if AVERAGED == 1:
            x, z = tile - origin(top)[:, None], of_member
        else:
            here = tile != float("-inf")
            allowed = here if m == 0 else allowed | here
            total += exp(tile - origin(top)[:, None], 1.0) / of_member[:, None]
            members += tl.where(empty, 0.0, 1.0)
    if AVERAGED > 1:
        mean = total / tl.maximum(members, 1.0)[:, None]
        x = tl.where(allowed, tl.where(mean == 0.0, ABSENT, tl.log(mean)), float("-inf"))
    return x, z


@triton.jit
def both_tiles(student, teacher, tokens, batch, head, query, key, queries, keys, counts, exists):
    """The student's scores, and x and Z of the teacher."""
    seen = visible(tokens, queries, keys, counts, exists)
    of_student = scores(student, batch, head, query, key, queries, keys, seen)
    AVERAGED: tl.constexpr = teacher.HEADS // student.HEADS
    x, z = teacher_tile(teacher, tokens, batch, head, queries, keys, counts, exists, seen, AVERAGED)
    return of_student, x, z
