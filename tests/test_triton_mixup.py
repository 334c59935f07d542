"""What only the Triton kernels of mixup and embedding_mixup have: tiles, indices they do not trust, registers."""

import mixup_samples as samples
import pytest
import test_embedding_mixup
import test_mixup
import torch
from backends import answering, device_of
from subprocesses import python

pytest.importorskip("triton")

from triton_compile import CAPABILITIES, Job, assert_nothing_spills

from fastkd.kernels import embedding_mixup as lookup_kernel
from fastkd.kernels import mixup as kernel

DEVICE = device_of("triton")

pytestmark = pytest.mark.usefixtures("poisoned")


def test_many_tiles_to_a_row(monkeypatch):
    monkeypatch.setattr(kernel, "_tile", lambda n_cols: kernel._Tile(4, 16))
    monkeypatch.setattr(lookup_kernel, "_lookup_tile", lambda n_cols: (4, 16))
    monkeypatch.setattr(lookup_kernel, "_gather_tile", lambda n_cols: (2, 16))
    with answering("mixup", "triton"), answering("embedding_mixup", "triton"):
        test_mixup.check("triton", samples.examples((9, 53)))
        test_embedding_mixup.check("triton", samples.examples((11, 53)), samples.ids((6, 7), 11), padding_idx=2)


def test_what_is_out_of_range_is_nan_and_never_read():
    x, lam, table = torch.randn(4, 33).to(DEVICE), torch.rand(4).to(DEVICE), torch.randn(5, 33).to(DEVICE)
    permutation = torch.tensor([1, 4, -1, 0]).to(DEVICE)
    mixed = kernel.launch_mixup(x, permutation, lam, False)
    assert mixed.isnan().all(1).tolist() == [False, True, True, False]
    ids = torch.tensor([[0, 5], [1, 2], [-1, 3], [4, 4]]).to(DEVICE)
    in_order = torch.arange(4).to(DEVICE)
    mixed = lookup_kernel.launch_embedding_mixup(ids, table, in_order, lam)
    assert mixed.isnan().all(-1).tolist() == [[False, True], [False, False], [True, False], [False, False]]
    mixed = lookup_kernel.launch_embedding_mixup(ids, table, permutation, lam)
    assert mixed.isnan().all(-1).tolist() == [[False, True], [True, True], [True, True], [False, True]]
    grad = lookup_kernel.launch_embedding_mixup_backward(torch.ones(4, 2, 33).to(DEVICE), ids, in_order, lam, 5, -1)
    assert torch.allclose(grad[:, 0].cpu(), torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0]))


def test_offsets_beyond_two_to_the_31():
    """Rows 2²⁶ elements apart, in memory that is promised and hardly touched: an int32 offset would leave it."""
    code = """
import torch
from fastkd.kernels.embedding_mixup import launch_embedding_mixup
from fastkd.kernels.mixup import launch_mixup
x = torch.empty_strided((33, 40), (2**26, 1), dtype=torch.float16)
x.copy_(torch.randn(33, 40))
permutation, lam = torch.arange(33).flip(0), torch.rand(33)
far, near = (launch_mixup(t, permutation, lam, True) for t in (x, x.contiguous()))
assert torch.equal(far, near)
far, near = (launch_embedding_mixup(permutation[:, None], t, permutation, lam) for t in (x, x.contiguous()))
assert torch.equal(far, near)
"""
    python("-c", code, TRITON_INTERPRET="1")


def compile_job(capability, name, floats, n_cols):
    """The launch of a kernel for rows of ``n_cols`` of a floating type."""
    known = dict.fromkeys(("x_stride", "table_stride", "vocabulary", "n_rows", "n_tokens", "n_cols"), "i32")
    known |= dict.fromkeys(("partner_ptr", "ids_ptr", "order_ptr", "first_ptr"), "*i64")
    known |= dict.fromkeys(("weight_ptr", "partner_weight_ptr"), "*fp32") | {"padding_idx": "i32"}
    known |= dict.fromkeys(("x_ptr", "out_ptr", "table_ptr", "grad_ptr"), f"*{floats}")
    module, function, constants, tile = {
        "mixup": (kernel, "_mixup_kernel", ("ROWS", "BLOCK"), kernel._tile),
        "lookup": (lookup_kernel, "_lookup_kernel", ("TOKENS", "BLOCK"), lookup_kernel._lookup_tile),
        "gather": (lookup_kernel, "_gather_kernel", ("TOKENS", "BLOCK"), lookup_kernel._gather_tile),
    }[name]
    constexprs = dict(zip(constants, tile(n_cols), strict=True)) | ({"n_cols": 1} if n_cols == 1 else {})
    arguments = [argument for argument in getattr(module, function).arg_names if argument not in constants]
    signature = {argument: known[argument] for argument in arguments} | dict.fromkeys(constants, "constexpr")
    sizes = ("n_cols", "x_stride", "table_stride") if n_cols % 16 == 0 else ()
    aligned = [argument for argument in arguments if argument.endswith("_ptr") or argument in sizes]
    return Job(f"{module.__name__}:{function}", signature, constexprs, aligned, {"num_warps": 4}, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability):
    cases = [
        (capability, name, floats, n_cols)
        for name in ("mixup", "lookup", "gather")
        for floats, n_cols in (("fp32", 768), ("bf16", 98304), ("fp16", 3), ("fp32", 1))
    ]
    assert_nothing_spills({case: compile_job(*case) for case in cases})
