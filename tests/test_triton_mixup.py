"""The Triton kernels of mixup and embedding_mixup: interpreted without a GPU, and compiled for three."""

import os
import subprocess
import sys
from pathlib import Path

import mixup_samples as samples
import pytest
import test_embedding_mixup
import test_mixup
import torch

from fastkd.ops import _extension

pytest.importorskip("triton")

from triton_compile import Job, compile_jobs

from fastkd.kernels import embedding_mixup as lookup_kernel
from fastkd.kernels import mixup as kernel

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((7,), (6, 1), (7, 17), (3, 2, 33), (6, 500))
TABLES = ((9, 3), (11, 33), (50, 130))


class _Ops:
    """torch.ops.fastkd with the Triton launchers in place of the registered ops, differentiable as those are."""

    def __init__(self):
        modules = sys.modules["fastkd.ops.mixup"], sys.modules["fastkd.ops.embedding_mixup"]
        self.mixup = differentiable(modules[0]._triton, modules[0]._save, modules[0]._backward)
        self.embedding_mixup = differentiable(modules[1]._triton, modules[1]._save, modules[1]._backward)
        self.embedding_mixup_backward = modules[1]._triton_backward


def differentiable(forward, save, backward):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, grad):
            return backward(ctx, grad)

    return Function.apply


@pytest.fixture
def triton_answers(monkeypatch):
    """Let the CPU take the Triton kernels, interpreted; plain torch in float64 stays what it is."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    choose = lambda op, device, dtype: "reference" if dtype == torch.float64 else "triton"  # noqa: E731
    monkeypatch.setattr(_extension, "backend", choose)
    ops = _Ops()
    for name in ("mixup", "embedding_mixup", "embedding_mixup_backward"):
        monkeypatch.setattr(torch.ops.fastkd, name, getattr(ops, name))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles to a row already at a few dozen columns, which the interpreter can afford."""
    monkeypatch.setattr(kernel, "_tile", lambda n_cols: kernel._Tile(4, 16))
    monkeypatch.setattr(lookup_kernel, "_lookup_tile", lambda n_cols: (4, 16))
    monkeypatch.setattr(lookup_kernel, "_gather_tile", lambda n_cols: (2, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixup_matches_the_float64_reference(shape, dtype, triton_answers):
    for pairing in samples.PAIRINGS:
        test_mixup.check(samples.examples(shape, dtype), samples.permutation(shape[0], pairing), samples.lam(shape[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TABLES, ids=str)
def test_embedding_mixup_matches_the_float64_reference(shape, dtype, triton_answers):
    table = samples.examples(shape, dtype)
    test_embedding_mixup.check(samples.ids((7, 5), shape[0]), table)
    test_embedding_mixup.check(samples.ids((3, 2, 5), shape[0]), table, padding_idx=0, pairing="one cycle")


def test_many_tiles_to_a_row(triton_answers, small_tiles):
    test_mixup.check(samples.examples((9, 53)), samples.permutation(9), samples.lam(9))
    test_embedding_mixup.check(samples.ids((6, 7), 11), samples.examples((11, 53)), padding_idx=2)


def test_strides_and_empty_inputs(triton_answers):
    test_mixup.test_any_stride_of_inputs_and_gradients(torch.float32)
    test_mixup.test_empty_batches_and_examples()
    test_embedding_mixup.test_any_stride_of_inputs_and_gradients(torch.float32)
    test_embedding_mixup.test_empty_batches_leave_a_gradient_of_zeros()


def test_nan_stays_where_it_is(triton_answers):
    test_mixup.test_a_nan_stays_in_its_example_and_where_that_is_the_partner(torch.float32)
    test_embedding_mixup.test_a_nan_stays_in_its_row()


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
    assert grad[:, 0].tolist() == [1.0, 1.0, 1.0, 1.0, 2.0]


FAR_ROWS = """
import torch
from fastkd.kernels.embedding_mixup import launch_embedding_mixup
from fastkd.kernels.mixup import launch_mixup

x = torch.empty_strided((33, 40), (2**26, 1), dtype=torch.float16)
x.copy_(torch.randn(33, 40))
permutation, lam = torch.arange(33).flip(0), torch.rand(33)
far, near = (launch_mixup(t, permutation, lam, True) for t in (x, x.contiguous()))
assert torch.equal(far, near)
ids = torch.arange(33)[:, None]
far, near = (launch_embedding_mixup(ids, t, permutation, lam) for t in (x, x.contiguous()))
assert torch.equal(far, near)
"""


def test_offsets_beyond_two_to_the_31():
    """Rows 2²⁶ elements apart, in memory that is promised and hardly touched: an int32 offset would leave it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", FAR_ROWS], env=environment, check=True)


def compile_job(capability, name, floats, n_cols):
    """The launch of a kernel for rows of ``n_cols`` of a floating type."""
    pairs = {"partner_ptr": "*i64", "weight_ptr": "*fp32", "partner_weight_ptr": "*fp32"}
    sizes = dict.fromkeys(("x_stride", "table_stride", "vocabulary", "n_rows", "n_tokens", "n_cols"), "i32")
    known = pairs | sizes | {"ids_ptr": "*i64", "order_ptr": "*i64", "first_ptr": "*i64", "padding_idx": "i32"}
    known |= dict.fromkeys(("x_ptr", "out_ptr", "table_ptr", "grad_ptr"), f"*{floats}")
    module, function, tile = {
        "mixup": (kernel, "_mixup_kernel", dict(zip(("ROWS", "BLOCK"), kernel._tile(n_cols), strict=True))),
        "lookup": (lookup_kernel, "_lookup_kernel", _tokens(lookup_kernel._lookup_tile(n_cols))),
        "gather": (lookup_kernel, "_gather_kernel", _tokens(lookup_kernel._gather_tile(n_cols))),
    }[name]
    arguments = [a for a in getattr(module, function).arg_names if a not in tile]
    constexprs = tile | ({"n_cols": 1} if n_cols == 1 else {})
    signature = {a: known[a] for a in arguments} | dict.fromkeys(tile, "constexpr")
    aligned = [a for a in arguments if a.endswith("_ptr") or (a in ("n_cols", "x_stride") and n_cols % 16 == 0)]
    aligned = [a for a in aligned if a not in constexprs]
    return Job(f"{module.__name__}:{function}", signature, constexprs, aligned, {"num_warps": 4}, capability)


def _tokens(tile):
    return dict(zip(("TOKENS", "BLOCK"), tile, strict=True))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability):
    cases = [
        (capability, name, floats, n_cols)
        for name in ("mixup", "lookup", "gather")
        for floats, n_cols in (("fp32", 768), ("bf16", 98304), ("fp16", 3), ("fp32", 1))
    ]
    resources = compile_jobs([compile_job(*case) for case in cases])
    report = "\n".join(f"{case}: {found}" for case, found in zip(cases, resources, strict=True))
    print(report)
    assert all(found.stack == 0 for found in resources), report
