"""Mutants: each is one plausible mistake in kl_div, and the tests must notice every one of them.

The first changes nothing and must pass: without it, a tree that fails for another reason would kill every mutant.
"""

import pytest

KERNEL, SUMS, TILES = (f"csrc/simd/{name}.h" for name in ("kl_div", "kl_div_sums", "tiles"))
TRITON = "kernels/kl_div.py"
MUTANTS = {
    "nothing": (SUMS, "constexpr float kLowest = -1e30f;", "constexpr float kLowest = -1e30f;"),
    "the reference drops T²": ("fastkd/reference/kl_div.py", "temperature.squeeze(-1).square()", "1.0"),
    "the reference swaps the roles": ("fastkd/reference/kl_div.py", "(finite_t - finite_s)", "(finite_s - finite_t)"),
    "the mask is ignored": ("fastkd/losses/_checks.py", "valid = row_mask(mask, of, logits)", "valid = None"),
    "the normalizer is ignored": ("fastkd/ops/kl_div.py", "if normalizer is not None:", "if False:"),
    "the gradient is not scaled": ("fastkd/ops/kl_div.py", "(grad * grad_loss)", "grad"),
    "the kernel drops T²": (KERNEL, "bool square = task.scale_by_temperature;", "bool square = false;"),
    "the kernel swaps the roles": (SUMS, "fma(e_t, b - a, both)", "fma(e_s, b - a, both)"),
    "the tail is one column short": (TILES, "tail(columns % kLanes)", "tail(columns % kLanes - 1)"),
    "a group's rows get each other's sums": (TILES, "splat(v[r])", "splat(v[r ^ 1])"),
    "maxima are not carried on": (SUMS, "sum_s[0] *= decay_s;", ""),
    "the gradient forgets its block's maximum": (
        KERNEL,
        "u *= all.decay_s(tile.maxima().first(begin / Tile::kBlock));",
        "",
    ),
    "infinite rows are missed": (SUMS, "all.infinite |= excluded<D>(tile);", ""),
    "the label is off by one": (SUMS, "label[k] = (float)task.labels[r];", "label[k] = (float)task.labels[r] + 1;"),
    "the mixture forgets beta": (SUMS, "larger = select(r > none, beta, 1.0f - beta)", "larger = beta"),
    "Triton drops T²": (TRITON, "scale = temperature if SCALE_BY_TEMPERATURE else inv_t", "scale = inv_t"),
    "Triton forgets that the student's maximum rose": (TRITON, "new_from - from_t - rise_s", "new_from - from_t"),
    "Triton counts from the first top it met": (TRITON, "            from_t = new_from\n", ""),
    "Triton counts from the teacher's top": (TRITON, "at_max(x_s, t), from_t)", "new_t, from_t)"),
    "Triton reads past the row": (
        "kernels/_math.py",
        "rows[:, None] & (columns < n_cols)",
        "rows[:, None] & (columns >= 0)",
    ),
    "Triton ignores the mask": (TRITON, "valid = inside & (tl.load", "valid = inside | (tl.load"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, judge):
    judge(name, MUTANTS[name], "tests/test_kl_div.py")
