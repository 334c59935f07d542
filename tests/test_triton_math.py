"""The shared steps of the streaming kernels, each alone, against float64."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastkd.kernels import _math  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where infinities meet on purpose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
NAN = float("nan")


def tensor(values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


@triton.jit
def _advance_kernel(x_ptr, old_ptr, weights_ptr, below_ptr, rows_ptr, inv_t, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    tile = row[:, None] * BLOCK + columns[None, :]
    old_max = tl.load(old_ptr + row)
    new_max, x, weights, decay, rise = _math.advance(tl.load(x_ptr + tile), old_max, inv_t + tl.zeros_like(old_max))
    tl.store(weights_ptr + tile, weights)
    tl.store(below_ptr + tile, x)
    tl.store(rows_ptr + row, new_max)
    tl.store(rows_ptr + ROWS + row, decay)
    tl.store(rows_ptr + 2 * ROWS + row, rise)
    tl.store(rows_ptr + 3 * ROWS + row, _math.first_at_max(x, columns).to(tl.float32))


def advance(x, old_max, inv_t=1.0):
    x, old_max = tensor(x), tensor(old_max)
    weights, below, rows = torch.empty_like(x), torch.empty_like(x), x.new_empty(4, len(x))
    _advance_kernel[(1,)](x, old_max, weights, below, rows, inv_t, *x.shape)
    return weights, below, *rows


def test_advance_moves_the_maximum_and_says_by_how_much():
    x = [[1.0, 5.0, 5.0, -3.0], [1.0, 0.0, -2.0, 0.5]]
    weights, below, new_max, decay, rise, first = advance(x, [2.0, 4.0], inv_t=0.5)
    assert new_max.tolist() == [5.0, 4.0]
    assert below.tolist() == [[-4.0, 0.0, 0.0, -8.0], [-3.0, -4.0, -6.0, -3.5]]
    torch.testing.assert_close(weights, torch.exp(below * 0.5))
    torch.testing.assert_close(decay, tensor([math.exp(-1.5), 1.0]))
    assert rise.tolist() == [3.0, 0.0]
    assert first[0] == 1, "of tied maxima the first counts"


def test_a_row_of_absent_columns_leaves_the_sums_alone():
    weights, below, new_max, decay, rise, _ = advance([[-INF] * 4] * 2, [-INF, 3.0])
    assert new_max.tolist() == [-INF, 3.0]
    assert weights.eq(0).all()
    assert below.eq(_math.ABSENT.value).all()
    assert decay.tolist() == [0.0, 1.0]
    assert rise.tolist() == [0.0, 0.0]


def test_the_first_column_found_decays_the_empty_sums_to_zero():
    _, below, new_max, decay, _, first = advance([[-INF, -1e4, -INF, -2e4]] * 2, [-INF, -INF], inv_t=1e3)
    assert new_max.tolist() == [-1e4, -1e4]
    assert decay.tolist() == [0.0, 0.0], "a maximum of -inf must not become exp(+large)"
    assert below[0, [1, 3]].tolist() == [0.0, -1e4]
    assert below[0, [0, 2]].eq(_math.ABSENT.value).all()
    assert first.tolist() == [1.0, 1.0]


def test_the_sum_keeps_the_nan_that_the_maximum_passes_over():
    weights, _, new_max, decay, _, _ = advance([[NAN, -INF, -INF, -INF], [0.0, NAN, 1.0, -INF]], [-INF, 5.0])
    assert new_max.tolist() == [-INF, 5.0]
    assert weights.sum(1).isnan().all()
    assert decay.tolist() == [0.0, 1.0]


@triton.jit
def _lacks_kernel(x_ptr, other_ptr, out_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    lacks = _math.lacks_any(tl.load(x_ptr + tile), tl.load(other_ptr + tile))
    tl.store(out_ptr + tl.arange(0, ROWS), lacks.to(tl.float32))


def test_lacks_any_asks_for_a_column_that_only_the_other_model_has():
    x = tensor([[0.0, -INF], [-INF, -INF], [-INF, 0.0], [-INF, 0.0]])
    other = tensor([[-INF, -INF], [-INF, -INF], [-3e38, 0.0], [NAN, 0.0]])
    out = tensor([NAN] * 4)
    _lacks_kernel[(1,)](x, other, out, 4, 2)
    assert out.tolist() == [0.0, 0.0, 1.0, 0.0]


@triton.jit
def _beside_kernel(x_ptr, y_ptr, at_ptr, out_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)
    tile = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = tl.load(y_ptr + tile)
    reference = _math.at_max(tl.load(x_ptr + tile), y)
    tl.store(at_ptr + row, reference)
    tl.store(out_ptr + tile, _math.beside(y, reference))


def test_beside_counts_from_the_column_where_the_other_model_is_surest():
    bound = -_math.ABSENT.value
    x = tensor([[0.0, -1.0, -2.0, 0.0], [-1.0, 0.0, -2.0, -3.0], [0.0, -1.0, -2.0, -3.0], [-1.0, 0.0, 0.0, -1.0]])
    y = tensor([[5.0, 9.0, -INF, 3.0], [1.0, -INF, 0.0, NAN], [-3e38, 3e38, 0.0, -INF], [0.0, NAN, 4.0, 5.0]])
    at, out = tensor([NAN] * 4), torch.full_like(x, NAN)
    _beside_kernel[(1,)](x, y, at, out, *x.shape)
    assert at.tolist() == tensor([5.0, -bound, -bound, 4.0]).tolist(), "the larger one of ties, and finite"
    assert out[0].tolist() == tensor([0.0, 4.0, -bound, -2.0]).tolist()
    assert out[1, :3].tolist() == tensor([bound, -bound, bound]).tolist()
    assert out[1, 3].isnan()
    assert out[2].tolist() == tensor([-bound, bound, bound, -bound]).tolist()
    assert out[3, [0, 2, 3]].tolist() == [-4.0, 0.0, 1.0]


@triton.jit
def _shifted_kernel(sums_ptr, out_ptr, fall, factor):
    tl.store(out_ptr, _math.shifted(tl.load(sums_ptr), tl.load(sums_ptr + 1), fall, factor))


def test_shifted_equals_the_sum_taken_anew():
    generator = torch.Generator().manual_seed(0)
    w, y = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    fall, factor = 3.5, 0.25
    out = tensor([0.0])
    _shifted_kernel[(1,)](tensor([float((w * y).sum()), float(w.sum())]), out, fall, factor)
    torch.testing.assert_close(out.cpu().double()[0], (factor * w * (y - fall)).sum(), rtol=1e-6, atol=0)


def test_shifted_forgets_what_lies_infinitely_deep():
    out = tensor([NAN])
    _shifted_kernel[(1,)](tensor([1.0, 16.0]), out, 3e38, 0.0)
    assert out.tolist() == [0.0]


@triton.jit
def _sweep_kernel(x_ptr, out_ptr, n_cols, REVERSED: tl.constexpr, BLOCK: tl.constexpr):
    visited = 0.0
    row_ptr = x_ptr + tl.zeros((1,), tl.int64)
    for step in range(0, n_cols, BLOCK):
        columns = _math.tile_columns(step, n_cols, BLOCK, REVERSED)
        x = _math.load_tile(row_ptr, tl.full((1,), True, tl.int1), columns, n_cols)
        visited += 1.0
        x = tl.where(x == float("-inf"), 0.0, x * visited)
        tl.store(out_ptr + columns[None, :], x, mask=(columns < n_cols)[None, :])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n_cols", [1, 3, 4, 5, 8, 11])
def test_a_sweep_meets_every_column_once_in_either_order(n_cols, reverse):
    sentinel = -7.0
    out = tensor([sentinel] * 16)
    source = tensor([1.0] * n_cols + [NAN] * (16 - n_cols))
    _sweep_kernel[(1,)](source, out, n_cols, REVERSED=reverse, BLOCK=4)
    tiles = -(-n_cols // 4)
    order = [tiles - tile if reverse else tile + 1 for tile in range(tiles)]
    assert out[:n_cols].tolist() == [order[column // 4] for column in range(n_cols)]
    assert out[n_cols:].eq(sentinel).all()
