"""Steps of a softmax that streams over tiles, shared by the kernels. Tiles are (ROWS, BLOCK), row values (ROWS,).

A column that is −inf does not exist. Three rules keep it out of the arithmetic without a branch:

* a row that has met nothing but −inf subtracts 0, not −inf (:func:`origin`);
* below its row's maximum nothing lies deeper than ``ABSENT``: its exponential is 0, yet it is finite, so that
  0 · ABSENT is 0 and two absent columns differ by 0 (:func:`below`);
* a row is empty when its sum of exponentials is 0, never by its maximum, which passes over a NaN.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ABSENT = tl.constexpr(-1e30)


@triton.jit
def tile_columns(step, n_cols, BLOCK: tl.constexpr, REVERSED: tl.constexpr):
    """Columns of the tile ``step`` elements into a sweep, which may run from the last tile to the first."""
    first = step
    if REVERSED:
        first = (n_cols - 1) // BLOCK * BLOCK - step
    return first + tl.arange(0, BLOCK)


@triton.jit
def load_tile(row_ptr, rows, columns, n_cols):
    """Logits in float32; −inf outside ``rows``, which is a mask, and beyond the last column."""
    mask = rows[:, None] & (columns < n_cols)[None, :]
    return tl.load(row_ptr[:, None] + columns[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def exp(x, inv_t):
    """exp(x/T), 0 where it underflows: shorter than ``tl.exp``, which keeps subnormal results."""
    return tl.exp2(x * (inv_t * LOG2E))


@triton.jit
def lacks_any(x, other):
    """Whether the row of ``x`` has no column somewhere where ``other`` has one."""
    return tl.max(tl.where(x == float("-inf"), other, float("-inf")), axis=1) > float("-inf")


@triton.jit
def origin(maximum):
    """What a row subtracts before it exponentiates."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def below(x, maximum):
    x -= origin(maximum)[:, None]
    return tl.where(x < ABSENT, ABSENT, x)


@triton.jit
def beside(y, reference):
    """y from a reference that is not its maximum, held within ±ABSENT so that absent columns still differ by 0."""
    y = below(y, reference)
    return tl.where(y > -ABSENT, -ABSENT, y)


@triton.jit
def at_max(x, y):
    """y in the column that holds the row's maximum, from x :func:`below` it; finite even where y is not there."""
    found = tl.max(tl.where(x == 0, y, float("-inf")), axis=1)
    return tl.clamp(found, ABSENT, -ABSENT)


@triton.jit
def first_at_max(x, columns):
    """First column that holds the row's maximum, from x :func:`below` it."""
    return tl.min(tl.where(x == 0, columns[None, :], 2147483647), axis=1)


@triton.jit
def decay(old_max, new_max, inv_t):
    """Factor that moves Σ exp((x − old_max)/T) to the new maximum; 0 where the old one was −inf."""
    return exp(old_max - origin(new_max), inv_t)


@triton.jit
def advance(x, old_max, inv_t):
    """One tile onwards: the new maximum, x below it, exp(that/T), the decay of older sums, the rise of the maximum."""
    new_max = tl.maximum(old_max, tl.max(x, axis=1))
    x = below(x, new_max)
    rise = origin(new_max) - origin(old_max)
    return new_max, x, exp(x, inv_t[:, None]), decay(old_max, new_max, inv_t), rise


@triton.jit
def shifted(total, weight, fall, factor):
    """Σ w·y from the old Σ w·y and Σ w, after each y fell by ``fall`` and each w was multiplied by ``factor``.

    A factor of 0 wins over a fall so deep that it overflows.
    """
    return tl.where(factor == 0, 0.0, factor * (total - fall * weight))
