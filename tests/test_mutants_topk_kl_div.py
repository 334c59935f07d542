"""Mutants of topk_kl_div, in the manner of ``test_mutants``: the tests must notice every one of them."""

import pytest

KERNEL, TRITON = "csrc/simd/topk_kl_div.h", "kernels/topk_kl_div.py"
OP, LOSS = "fastkd/ops/topk_kl_div.py", "fastkd/losses/topk_kl_div.py"
REFERENCE = "fastkd/reference/topk_kl_div.py"
MUTANTS = {
    "nothing": (KERNEL, "class Rest {", "class Rest {"),
    "the reference counts listed columns as rest": (REFERENCE, "listed.scatter_(1, ids", "listed.scatter(1, ids"),
    "the reference forgets T in the rest": (REFERENCE, "logsumexp(-1) * temperature.squeeze(-1)", "logsumexp(-1)"),
    "the reference keeps a bucket without columns": (REFERENCE, ".masked_fill(rest == NEG_INF, NEG_INF)", ""),
    "a teacher's rest may vanish": (REFERENCE, "clamp(min=LEAST_REST)", "clamp(min=0)"),
    "the zero tail is normalised": (OP, "if mass is None:\n        return loss", "if True:\n        return loss"),
    "padding has the teacher's mass": (OP, '.masked_fill(teacher.ids < 0, float("-inf"))', ""),
    "values stay in their order": (LOSS, "reshape(-1, k).gather(-1, order)", "reshape(-1, k)"),
    "the teacher's temperature is ignored": (LOSS, "values * _column(teacher_temperature)", "values"),
    "another temperature is accepted": (
        LOSS,
        'if tail != "renormalize":\n            raise',
        "if False:\n            raise",
    ),
    "the normaliser is ignored": (LOSS, "if logsumexp is not None:", "if False:"),
    "duplicates are accepted": (LOSS, "if bool(twice.any()):", "if False:"),
    "the kernel counts listed columns as rest": (KERNEL, "kept[*ids] = -kInfinity", "(void)kept[*ids]"),
    "maxima are not carried on": (KERNEL, "total *= power(before, reference);", ""),
    "the gradient forgets its block's maximum": (
        KERNEL,
        "per * power(load(maxima + begin / kRestColumns * kLanes), splat(top))",
        "splat(per)",
    ),
    "references may lie above the maximum": (
        KERNEL,
        "exp2(min(Vec{}, (from - to) * scale))",
        "exp2((from - to) * scale)",
    ),
    "the listed columns keep the rest's gradient": (
        KERNEL,
        "if (ids[j] >= 0) store_tail",
        "if (ids[j] < -1) store_tail",
    ),
    "the weight of a row is left out of its gradient": (KERNEL, "weight * task.grad_scale", "task.grad_scale"),
    "the tail is one column short": (
        KERNEL,
        "load_tail(row + whole, end - whole)",
        "load_tail(row + whole, end - whole - 1)",
    ),
    "Triton skips ids": (TRITON, "position += 1", "position += 2"),
    "Triton counts listed columns as rest": (TRITON, "columns[None, :] == next_id", "columns[None, :] < 0"),
    "Triton forgets T in the rest": (TRITON, "temperature * tl.log(total)", "tl.log(total)"),
    "Triton trusts ids": (TRITON, "(column < -1) | (column >= n_cols)", "column < -1"),
    "Triton leaves the row's weight out": (TRITON, "slopes * row_weight[:, None]", "slopes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, judge):
    tests = ("tests/test_topk_kl_div.py", "tests/test_topk_kl_div_errors.py", "tests/test_triton_topk_kl_div.py")
    judge(name, MUTANTS[name], *tests)
