"""What only the Triton kernels of topk_kl_div have: tiles, ids they do not trust, registers."""

import backends
import pytest
import topk_kl_div_samples as samples
import torch
from backends import device_of

from fastkd.losses import topk_kl_div

pytest.importorskip("triton")

from triton_compile import CAPABILITIES, Job, assert_nothing_spills

from fastkd.kernels import topk_kl_div as kernel

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize(("n_cols", "k"), [(3, 2), (1000, 64), (4097, 30)])
@pytest.mark.parametrize("tail", samples.TAILS)
def test_matches_the_reference_in_the_tiles_of_real_vocabularies(tail, n_cols, k):
    tensors = [x[[0, 1, 2, 3, 4, 5, 11]] for x in samples.rows(n_cols, k, torch.bfloat16)]
    with backends.answering("topk_kl_div", "triton"):
        backends.check("topk_kl_div", "triton", topk_kl_div, *tensors, tail=tail, reduction="none")


@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize("wrong", [-2, 20, 2**40])
def test_an_id_outside_the_vocabulary_makes_its_row_nan(wrong, rest):
    device = device_of("triton")
    student = torch.randn(3, 20, device=device)
    ids = torch.tensor([[0, 3], [4, wrong], [5, 19]], device=device)
    options = (None, 1.0, 0, 0.5, None, None, 0, None, True, True)
    with samples.answering("triton"):
        rows, grad = torch.ops.fastkd.topk_kl_div(student, ids, torch.zeros(3, 2 + rest, device=device), *options)
    assert rows.isnan().tolist() == [False, True, False]
    assert grad[[0, 2]].isfinite().all()


def test_values_that_are_no_log_probabilities_make_their_row_nan():
    """On a GPU nobody looks at them; in a graph neither."""
    student, ids = torch.randn(3, 20), torch.tensor([[0, 3], [4, 7], [5, 19]])
    values = torch.tensor([[-1.0, -2.0], [3.0, 1.0], [-3.0, -1.0]])
    compiled = torch.compile(lambda *tensors: topk_kl_div(*tensors, reduction="none"), backend="eager")
    assert compiled(student, ids, values).isnan().tolist() == [False, True, False]


POINTERS = {"ids_ptr": "*i64", "rest_ptr": "*fp32", "row_temperature_ptr": "*fp32", "valid_ptr": "*i1"}
NUMBERS = {"student_stride": "i32", "n_cols": "i32", "n_rows": "i32", "k": "i32", "temperature": "fp32"}
KERNELS = {
    "_outcomes_kernel": {"outcomes_ptr": "*fp32", **POINTERS},
    "_gradient_kernel": {"slopes_ptr": "*fp32", **{n: t for n, t in POINTERS.items() if n != "valid_ptr"}},
}


def compile_job(capability, name, logits, n_cols, k, rest):
    sizes = kernel._sizes(n_cols, k)
    pointers = {"student_ptr": f"*{logits}", **KERNELS[name]}
    if name == "_gradient_kernel":
        pointers["grad_ptr"] = f"*{logits}"
    constexprs = sizes if rest else {**sizes, "rest_ptr": None}
    signature = {**pointers, **NUMBERS, "BLOCK": "constexpr", "BLOCK_K": "constexpr"}
    aligned = [n for n in pointers if n not in constexprs] + (["n_cols", "student_stride"] if n_cols % 16 == 0 else [])
    arguments = getattr(kernel, name).arg_names
    signature = {argument: signature[argument] for argument in arguments}
    options = {"num_warps": 8} | ({"maxnreg": kernel.MAX_REGISTERS} if name == "_outcomes_kernel" else {})
    return Job(f"fastkd.kernels.topk_kl_div:{name}", signature, constexprs, aligned, options, capability)


def test_compiles_without_spills():
    """The widest tiles of both kernels on each generation, and what is left of them without a rest."""
    widest = [(capability, name, "bf16", 128257, 3000, True) for capability in CAPABILITIES for name in KERNELS]
    others = [(90, name, "fp32", 32768, 64, False) for name in KERNELS]
    assert_nothing_spills({case: compile_job(*case) for case in widest + others})
