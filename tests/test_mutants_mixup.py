"""Mutants of mixup and embedding_mixup: each is one plausible mistake, and the tests must notice every one of them."""

import pytest

PAIRING = "csrc/cpu/pairing.h"
EMBEDDING = "csrc/cpu/embedding_mixup.cpp"
LOOKUP = "csrc/simd/embedding_mixup.h"
MIX = "csrc/simd/mix.h"
TRITON = "kernels/mixup.py"
TRITON_EMBEDDING = "kernels/embedding_mixup.py"
MUTANTS = {
    "nothing": (PAIRING, "transpose ? inverse[i] : of[i]", "transpose ? inverse[i] : of[i]"),
    "the reference mixes by one weight": ("fastkd/reference/mixup.py", "(1 - weight) * wide", "weight * wide"),
    "the gradient follows the permutation": (PAIRING, "transpose ? inverse[i] : of[i]", "of[i]"),
    "the gradient takes its own weight": (PAIRING, "first[transpose ? inverse[i] : i]", "first[i]"),
    "an index may come twice": (PAIRING, " && inverse[of[i]] < 0", ""),
    "the mixture's tail is one short": (
        MIX,
        "load_tail(y + i, n - i)), n - i);",
        "load_tail(y + i, n - i)), n - i - 1);",
    ),
    "pairs change places": (MIX, "(low >> 16) | (high & 0xffff0000)", "(high >> 16) | (low & 0xffff0000)"),
    "only the first chunk is mixed": ("csrc/simd/mixup.h", "unit / task.rows * task.chunk", "0"),
    "partners share the example's ids": (
        LOOKUP,
        "table + task.ids[beside] * task.stride",
        "table + task.ids[at] * task.stride",
    ),
    "frequent tokens are forgotten": (EMBEDDING, "if (count >= kFrequent) frequent.push_back(v);", ""),
    "the last block of columns is forgotten": (
        EMBEDDING,
        "(task.columns + kColumns - 1) / kColumns",
        "task.columns / kColumns",
    ),
    "padding is ignored": (
        "fastkd/ops/embedding_mixup.py",
        "NO_PADDING if padding_idx is None else padding_idx",
        "NO_PADDING",
    ),
    "the second derivative forgets padding": (
        "fastkd/ops/embedding_mixup.py",
        "if ctx.padding_idx != NO_PADDING:",
        "if False:",
    ),
    "padding counts from the front": (
        "fastkd/losses/embedding_mixup.py",
        "padding_idx %= vocabulary",
        "padding_idx = abs(padding_idx)",
    ),
    "an ignored label has weight": (
        "fastkd/losses/mixup.py",
        "weights.append(w.where(counts, 0.0))",
        "weights.append(w)",
    ),
    "labels are not permuted": ("fastkd/losses/mixup.py", "safe[permutation]", "safe"),
    "masks are intersected": ("fastkd/mixup.py", "torch.maximum(mask,", "torch.minimum(mask,"),
    "targets are not mixed": ("fastkd/mixup.py", "else mixup(targets, *mix)", "else targets"),
    "Triton's gradient takes its own weight": (TRITON, "(1 - lam)[inverse]", "1 - lam"),
    "Triton's gradient follows the permutation": (TRITON, "permutation.argsort()", "permutation"),
    "Triton reads a partner out of range": (
        TRITON,
        "known = inside & (partner >= 0) & (partner < n_rows)",
        "known = inside",
    ),
    "Triton ignores padding": (
        TRITON_EMBEDDING,
        "tl.where(row == padding_idx, start, tl.load(first_ptr + row + 1))",
        "tl.load(first_ptr + row + 1)",
    ),
    "Triton sums one tile of tokens": (
        TRITON_EMBEDDING,
        "for k in range(start, stop, TOKENS)",
        "for k in range(start, tl.minimum(stop, start + 1), TOKENS)",
    ),
    "Triton reads an id out of range": (TRITON_EMBEDDING, "((other >= 0) & (other < vocabulary))", "(other >= 0)"),
}

TESTS = [f"tests/test_{name}.py" for name in ("mixup", "embedding_mixup", "triton_mixup", "mix_batch", "mixup_errors")]
QUICK = "not compiles and not offsets and not instruction and not threads"


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, judge):
    path = MUTANTS[name][0]
    chosen = f"({'triton or range' if path.startswith('kernels') else 'not triton'}) and {QUICK}"
    judge(name, MUTANTS[name], *TESTS, chosen=chosen)
