"""Mutants of low_rank_mse and mse, in the manner of ``test_mutants``: the tests must notice every one of them."""

import pytest

ERROR, CPU = "csrc/simd/squared_error.h", "csrc/cpu/low_rank_mse.cpp"
TRITON, TRITON_ERROR = "kernels/low_rank_mse.py", "kernels/mse.py"
LOW_RANK_OP, MSE_OP = "fastkd/ops/low_rank_mse.py", "fastkd/ops/mse.py"
MUTANTS = {
    "nothing": (ERROR, "constexpr int64_t kBlock = 1024;", "constexpr int64_t kBlock = 1024;"),
    "the reference sums the columns": (
        "fastkd/reference/low_rank_mse.py",
        "error.square().mean(-1)",
        "error.square().sum(-1)",
    ),
    "the reference forgets the bias": (
        "fastkd/reference/low_rank_mse.py",
        "None if bias is None else bias.to(x.dtype)",
        "None",
    ),
    "the mask reaches only the count": (
        LOW_RANK_OP,
        "rows = Rows(target, valid, None if weights",
        "rows = Rows(target, None, None if weights",
    ),
    "weights are lost in backward": (LOW_RANK_OP, "per_row if weights is None else per_row * weights", "per_row"),
    "the projection's gradient is lost": (
        LOW_RANK_OP,
        "if output is None:\n            grad_output",
        "if True:\n            grad_output",
    ),
    "the gradient is not scaled": (LOW_RANK_OP, "(grad * grad_loss)", "grad"),
    "the kernel drops the bias": (ERROR, "if (bias) value += get(bias + j);", ""),
    "the tail of a row is lost": (ERROR, "n > 0)", "n > 99)"),
    "masked rows are read": (ERROR, "const bool counts = scale != 0.0f;", "const bool counts = true;"),
    "later chunks overwrite": (CPU, "end - begin));", "end - begin)), begin = end;"),
    "a slice keeps a part of its chunks' sum": (CPU, "product.data, a.rows * b.columns", "product.data, a.rows"),
    "slices overlap": (CPU, "int64_t begin = slice * p.slice_rows;", "int64_t begin = 0;"),
    "skipped rows keep what was in memory": (CPU, "if (skips && need_x) zero_rows(grad_x, scale);", ""),
    "rows land where they were read": (CPU, "p.index ? p.index + begin : nullptr, grad.rows", "nullptr, grad.rows"),
    "pairs forget their weights": ("csrc/cpu/mse.cpp", "1.0 : weight * inverse;", "1.0 : inverse;"),
    "float16 loses its share": (MSE_OP, "(grad * share)", "grad"),
    "Triton ignores the rows' weights": (TRITON, "slope = 2.0 * scale / n_cols", "slope = 2.0 / n_cols + 0.0 * scale"),
    "Triton reads past the target": (
        TRITON,
        "counts[:, None] & (columns < n_cols)[None, :]\n    target",
        "counts[:, None] & (columns >= 0)[None, :]\n    target",
    ),
    "Triton sums one split": (TRITON, "return sums.sum(0),", "return sums[0],"),
    "Triton lets masked rows into the products": (TRITON, "x_block = x_block.masked_fill(", "x_block.masked_fill("),
    "Triton's error forgets the addend": (TRITON_ERROR, "grad += tl.load(addend_ptr", "tl.load(addend_ptr"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, judge):
    judge(name, MUTANTS[name], "tests/test_low_rank_mse.py", "tests/test_mse.py")
