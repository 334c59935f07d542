"""What only the Triton kernel of kl_div has: tiles, labels it does not trust, registers. The rest is in test_kl_div."""

import backends
import kl_div_samples as samples
import pytest
import torch
from backends import device_of
from kl_div_samples import DIVERGENCES

from fastkd.losses import kl_div

pytest.importorskip("triton")

from triton_compile import CAPABILITIES, Job, assert_nothing_spills

from fastkd.kernels import kl_div as kernel

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize("n_cols", [3, 1000, 4095, 4097])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_reference_in_the_tiles_of_real_vocabularies(divergence, n_cols):
    student, teacher = (logits[[0, 1, 2, 3, 4, 5, 11]] for logits in samples.rows(n_cols, torch.bfloat16))
    options = {"labels": torch.full((7,), n_cols - 1), "cross_entropy_weight": 0.5, "temperature": 2.0, "beta": 0.3}
    with backends.answering("kl_div", "triton"):
        backends.check("kl_div", "triton", kl_div, student, teacher, divergence=divergence, reduction="none", **options)


@pytest.mark.parametrize("label", [-1, 20, 2**40])
def test_a_label_outside_the_vocabulary_makes_its_row_nan(label):
    student, teacher = (logits[:4].to(device_of("triton")) for logits in samples.rows(20))
    labels = torch.tensor([1, label, 3, 19], device=student.device)
    with samples.answering("triton"):
        arguments = (None, 2.0, 0, 0.5, None, labels, 1.0, 0, None, True, True, False)
        rows, grad, _ = torch.ops.fastkd.kl_div(student, teacher, *arguments)
    assert rows.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().all(1).tolist() == [False, True, False, False]
    assert grad[[0, 2, 3]].isfinite().all()


ARGUMENTS = {
    "rows_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "row_temperature_ptr": "*fp32",
    "valid_ptr": "*i1",
    "labels_ptr": "*i64",
    "grad_scale_ptr": "*fp32",
    "student_stride": "i32",
    "teacher_stride": "i32",
    "n_rows": "i32",
    "n_cols": "i32",
    "temperature": "fp32",
    "beta": "fp32",
    "cross_entropy_weight": "fp32",
    "DIVERGENCE": "constexpr",
    "SCALE_BY_TEMPERATURE": "constexpr",
    "CROSS_ENTROPY": "constexpr",
    "ROWS": "constexpr",
    "BLOCK": "constexpr",
}
EVERYTHING = ()
GRADIENT = ("stats_ptr", "row_temperature_ptr", "valid_ptr", "labels_ptr")
LOSS = (*GRADIENT, "grad_ptr", "grad_scale_ptr")


def compile_job(capability, divergence, logits, n_cols, without):
    """The launch at ``n_cols`` columns, without some of the kernel's optional tensors."""
    index = DIVERGENCES.index(divergence)
    tile = kernel._tile(n_cols, index)
    constexprs = {
        "DIVERGENCE": index,
        "SCALE_BY_TEMPERATURE": True,
        "CROSS_ENTROPY": "labels_ptr" not in without,
        "ROWS": tile.rows,
        "BLOCK": tile.columns,
    }
    constexprs |= dict.fromkeys(without)
    if n_cols == 1:
        constexprs["n_cols"] = 1
    tensors = dict.fromkeys(("student_ptr", "teacher_ptr"), f"*{logits}")
    signature = {**tensors, "rows_ptr": "*fp32", "grad_ptr": f"*{logits}", **ARGUMENTS}
    names = [name for name in signature if name.endswith("_ptr") and name not in constexprs]
    aligned = [*names, *(("n_cols", "student_stride", "teacher_stride") if n_cols % 16 == 0 else ())]
    options = {"num_warps": tile.num_warps, "maxnreg": tile.maxnreg}
    return Job("fastkd.kernels.kl_div:_kl_div_kernel", signature, constexprs, aligned, options, capability)


def test_compiles_without_spills():
    """The widest tile, with everything in it, of each divergence on each generation, and a few of the others."""
    widest = [(capability, name, "fp32", 32768, EVERYTHING) for capability in CAPABILITIES for name in DIVERGENCES]
    others = [
        (90, "forward", "bf16", 128256, GRADIENT),
        (90, "reverse", "bf16", 1, EVERYTHING),
        (90, "jsd", "fp16", 30522, LOSS),
        (100, "jsd", "bf16", 3, EVERYTHING),
        (100, "reverse", "bf16", 128257, LOSS),
    ]
    assert_nothing_spills({case: compile_job(*case) for case in widest + others})


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills_in_every_variant(capability):
    cases = [
        (capability, divergence, logits, n_cols, without)
        for divergence in DIVERGENCES
        for logits in ("fp32", "bf16")
        for n_cols in (3, 128, 2000, 32768, 128257)
        for without in (EVERYTHING, GRADIENT, LOSS)
    ]
    assert_nothing_spills({case: compile_job(*case) for case in cases})
