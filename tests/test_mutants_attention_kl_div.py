"""Mutants of attention_kl_div, in the manner of ``test_mutants``: the tests must notice every one of them."""

import pytest

HEAD, ROWS, MATMUL = "csrc/simd/attention_kl_div.h", "csrc/simd/attention_rows.h", "csrc/simd/matmul.h"
TRITON, TILES = "kernels/attention_kl_div.py", "kernels/_attention.py"
MUTANTS = {
    "nothing": (ROWS, "RowSums sums{};", "RowSums sums{};"),
    "the reference forgets the scale": (
        "fastkd/reference/attention_kl_div.py",
        "key.transpose(-1, -2)) * scale",
        "key.mT)",
    ),
    "the reference ignores the window": (
        "fastkd/reference/attention_kl_div.py",
        "ahead.abs() < window",
        "ahead == ahead",
    ),
    "the gradient is not scaled": ("fastkd/ops/attention_kl_div.py", "(grad * grad_loss)", "grad"),
    "the gradient forgets the scale": (HEAD, "per_t = weight * student.scale", "per_t = weight"),
    "causal is off by one": (ROWS, "keys.end = position + 1;", "keys.end = position;"),
    "absent keys are seen": (HEAD, "present[j] = here ? 0.0f : -kInfinity;", "present[j] = 0.0f;"),
    "absent keys are read": (HEAD, "if (j < task.keys && exists(j))", "if (j < task.keys)"),
    "teacher heads share the wrong keys": (
        HEAD,
        "(head * averaged + m) / shared",
        "(head * averaged + m) % teacher.key_heads",
    ),
    "a group's last head overwrites the keys' gradient": (
        HEAD,
        "{grad_keys.data + j, grad_keys.row}, true);",
        "{grad_keys.data + j, grad_keys.row}, false);",
    ),
    "rows left over from a strip are lost": (
        MATMUL,
        "if (i < rows) product_rest",
        "if (i + 1 < rows) product_rest",
    ),
    "later parts of the depth overwrite": (MATMUL, "accumulate ? load(to) + part : part", "part"),
    "neighbours of a pair are swapped": (MATMUL, "r % 2 ? (VecBits)load(pair)", "r % 2 == 0 ? (VecBits)load(pair)"),
    "what follows the last pair of rows is left": (MATMUL, "r % kLanes; ++r)", "r % 1; ++r)"),
    "infinite rows are missed": (ROWS, "select((raw_s == none) & (raw_t > none), splat(1.0f), Vec{})", "Vec{}"),
    "Triton drops the scale": (TILES, 'input_precision="ieee") * model.scale', 'input_precision="ieee")'),
    "Triton's causal is off by one": (TILES, "seen &= distance <= 0", "seen &= distance < 0"),
    "Triton ignores the masks": (TILES, "inside &= tl.load(", "inside |= tl.load("),
    "Triton maps heads to the wrong keys": (
        TILES,
        "head // model.GROUP * model.key_head",
        "head % model.GROUP * model.key_head",
    ),
    "Triton keeps one head's gradient of the keys": (
        TRITON,
        "(of_key + 1) * student.GROUP):",
        "of_key * student.GROUP + 1):",
    ),
    "Triton misses keys that only late queries see": (TILES, "first + ROWS + ahead)", "first + ahead)"),
    "Triton forgets that Z is 1 where the sum is known": (
        TRITON,
        "torch.where(empty, 0.0, 1.0)",
        "torch.where(empty, 0.0, 2.0)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, judge):
    judge(name, MUTANTS[name], "tests/test_attention_kl_div.py")
