"""The Triton kernels of low_rank_mse and mse, compiled for GPUs that need not be there, and the choice of a path."""

import pytest
import torch
from triton_compile import Job, compile_jobs

from fastkd.kernels import low_rank_mse as kernels
from fastkd.kernels.mse import MAX_BLOCK

OPTIONAL = ("bias_ptr", "scale_ptr", "factor_ptr", "dz_ptr", "bias_sums_ptr")
EXTRAS = ("bias_ptr", "scale_ptr", "factor_ptr", "addend_ptr", "output_ptr")


def job(capability, kernel, tensors, numbers, constexprs, without=(), aligned=True):
    """A launch without some of the kernel's optional tensors, its widths multiples of 16 or not."""
    module, _ = kernel.split(":")
    constexprs = dict(constexprs)
    options = {"num_warps": constexprs.pop("num_warps", 4)}
    constexprs |= {name: None for name in without if name in tensors}
    signature = {**tensors, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constexprs, "constexpr")}
    names = [name for name in tensors if name not in constexprs]
    strides = [name for name in numbers if name != "n_rows"] if aligned else []
    return Job(
        f"fastkd.kernels.{module}:{kernel.split(':')[1]}", signature, constexprs, names + strides, options, capability
    )


def rows_kernel(capability, dtype, rank, without=(), aligned=True):
    wide, single = f"*{dtype}", "*fp32"
    tensors = {
        "z_ptr": wide, "up_ptr": wide, "bias_ptr": single, "target_ptr": wide, "scale_ptr": single,
        "factor_ptr": single, "loss_ptr": single, "dz_ptr": wide,
    }  # fmt: skip
    numbers = ("target_stride", "n_rows", "n_cols", "rank")
    return job(
        capability,
        "low_rank_mse:_rows_kernel",
        tensors,
        numbers,
        kernels._tile(rank, 16 if aligned else 15),
        without,
        aligned,
    )


def factor_kernel(capability, dtype, rank, without=(), aligned=True):
    wide, single = f"*{dtype}", "*fp32"
    tensors = {
        "z_ptr": wide, "up_ptr": wide, "bias_ptr": single, "wide_ptr": wide, "scale_ptr": single,
        "factor_ptr": single, "sums_ptr": single, "bias_sums_ptr": single,
    }  # fmt: skip
    numbers = ("wide_stride", "n_rows", "n_cols", "rank", "rows_per_split")
    return job(
        capability,
        "low_rank_mse:_factor_kernel",
        tensors,
        numbers,
        kernels._tile(rank, 16 if aligned else 15),
        without,
        aligned,
    )


def error_kernel(capability, dtype, block, without=(), aligned=True):
    wide, single = f"*{dtype}", "*fp32"
    tensors = {
        "prediction_ptr": wide, "bias_ptr": single, "target_ptr": wide, "scale_ptr": single, "factor_ptr": single,
        "addend_ptr": wide, "grad_ptr": wide, "output_ptr": wide, "loss_ptr": single,
    }  # fmt: skip
    numbers = ("prediction_stride", "target_stride", "n_rows", "n_cols")
    tile = {"ROWS": MAX_BLOCK // block, "BLOCK": block}
    return job(capability, "mse:_squared_error_kernel", tensors, numbers, tile, without, aligned)


def assert_nothing_spills(jobs):
    found = compile_jobs(jobs)
    report = "\n".join(f"{j.kernel} sm_{j.capability} {j.constexprs}: {r}" for j, r in zip(jobs, found, strict=True))
    print(report)
    assert all(resources.stack == 0 for resources in found), report


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability):
    """The largest tiles with everything in them."""
    assert_nothing_spills(
        [
            rows_kernel(capability, "bf16", kernels.MAX_RANK),
            factor_kernel(capability, "bf16", kernels.MAX_RANK),
            error_kernel(capability, "bf16", MAX_BLOCK),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills_in_every_variant(capability):
    jobs = []
    for dtype in ("bf16", "fp16"):
        for rank in (5, 64, kernels.MAX_RANK):
            jobs += [
                kernel(capability, dtype, rank, without, aligned)
                for kernel in (rows_kernel, factor_kernel)
                for without, aligned in (((), rank % 16 == 0), (OPTIONAL, True))
            ]
        jobs.append(factor_kernel(capability, dtype, 64, ("up_ptr", *OPTIONAL)))
    jobs += [
        error_kernel(capability, dtype, block, without, aligned)
        for dtype in ("fp32", "bf16")
        for block in (1, 64, MAX_BLOCK)
        for without, aligned in (((), block > 1), (EXTRAS, True), (("grad_ptr", *EXTRAS), True))
    ]
    assert_nothing_spills(jobs)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"rank": kernels.MAX_RANK + 1}, False),
        ({"dtype": torch.float32}, False),
        ({"need_output": True}, False),
    ],
    ids=str,
)
def test_the_path_follows_rank_dtype_and_output(change, fused, monkeypatch):
    taken = []
    for name in ("_fused", "_blocks"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: taken.append(name) or (torch.empty(0),) * 5)
    rank, dtype = change.get("rank", 8), change.get("dtype", torch.bfloat16)
    x, down, up = torch.ones(3, 4, dtype=dtype), torch.ones(rank, 4, dtype=dtype), torch.ones(6, rank, dtype=dtype)
    kernels.launch_low_rank_mse(
        x, down, up, torch.ones(3, 6, dtype=dtype), bias=None, scale=None, divisor=None, output=None, grad_output=None,
        needs=(True,) * 4, need_output=change.get("need_output", False),
    )  # fmt: skip
    assert taken == ["_fused" if fused else "_blocks"]
