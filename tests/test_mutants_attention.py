"""Mutants of the attention of training, in the manner of ``test_mutants``: the tests must notice every one of them."""

import pytest

HEAD, HEADS, MATMUL, AMX = (f"csrc/simd/{name}.h" for name in ("attention", "heads", "matmul", "amx"))
OP, TRAINING = "fastkd/ops/attention.py", "fastkd/training/attention.py"
MUTANTS = {
    "nothing": (HEAD, "Vec total{}, sum{};", "Vec total{}, sum{};"),
    "the scale is left out of the scores": (HEAD, "load(row + j) * task.scale", "load(row + j)"),
    "the scale is left out of the gradient": (HEAD, "- mean) * task.scale", "- mean)"),
    "causal is off by one": (HEAD, "task.causal ? query + 1", "task.causal ? query"),
    "keys past the last are seen": (HEAD, "return left < kLanes ?", "return left < 0 ?"),
    "masks are of the first head": (HEAD, " + head * task.mask_head", ""),
    "masks are of the first query": (HEAD, " + query * task.mask_query", ""),
    "a query that sees nothing takes all": (HEAD, "select(none, Vec{}, 1.0f / total)", "1.0f / total"),
    "the mean is left in the gradient": (HEAD, "(load(of_map + j) - mean)", "load(of_map + j)"),
    "the sum of a map is taken for one": (HEAD, "fold_lanes(sum, sum_of) * by", "fold_lanes(sum, sum_of)"),
    "scores of an earlier block are left": (HEAD, "for (; j < width; j += kLanes) put<Unit>(row, j, Vec{});", ""),
    "heads read the wrong keys": (HEAD, "head = key_head * group;", "head = key_head;"),
    "a block overwrites the keys' gradient": (
        HEAD,
        "{grad_keys.data + j, grad_keys.row}, true);",
        "{grad_keys.data + j, grad_keys.row}, false);",
    ),
    "gradients of keys and values are swapped": (HEAD, "turned_outputs, {right_maps", "turned_queries, {right_maps"),
    "the last tokens' gradients are lost": (HEADS, "std::min<int64_t>(kLanes, tokens - i)", "(tokens - i) / 4 * 4"),
    "lower tiles are lost": (AMX, "FASTKD_MULTIPLY_TILES(3, 5, 7)", "FASTKD_MULTIPLY_TILES(3, 5, 6)"),
    "tiles forget what they are added to": (AMX, "if (accumulate) {", "if (false) {"),
    "one row of tiles too few": (MATMUL, "i + kTile < rows", "i + 2 * kTile < rows"),
    "a gradient forgets the mask": (OP, "_backward(grad, *tensors,", "_backward(grad, *tensors[:3], None,"),
    "training forgets the scale": (TRAINING, "if scaling is None else scaling", "if True else scaling"),
    "training drops a bias": (TRAINING, '("position_bias", "cache", "softcap")', '("cache", "softcap")'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, judge):
    judge(name, MUTANTS[name], "tests/test_attention.py", "tests/test_training_attention.py")
