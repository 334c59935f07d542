"""What only the Triton kernels of attention_kl_div have: registers. The rest is in test_attention_kl_div."""

from inspect import signature

import pytest
import torch

pytest.importorskip("triton")

from triton_compile import CAPABILITIES, Job, assert_nothing_spills

from fastkd.kernels import attention_kl_div as kernel

KERNELS = ("sums_kernel", "loss_kernel", "key_gradient_kernel")
FLOAT32 = ("loss_ptr", "row_scale_ptr", "weight_ptr", "sums_ptr", "t_sums_ptr", "bias_ptr", "t_bias_ptr")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def compile_job(name, capability, dtype, dim, bare):
    """The launch of a causal model, with all masks and biases or with none."""
    sizes = kernel.tile(dtype, dim)
    options = {"num_warps": sizes.pop("num_warps")}
    values = {"HEADS": 32, "GROUP": 1, "DIM": dim, "BLOCK_DIM": kernel.block_dim(dim), "AVERAGED": 1, "T_GROUP": 1}
    values |= {"T_DIM": dim, "T_BLOCK_DIM": kernel.block_dim(dim), "CAUSAL": True, "WINDOW": not bare, **sizes}
    types = {}
    for argument in signature(getattr(kernel, name).fn).parameters:
        if argument.isupper():
            types[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            mask = "mask" in argument
            types[argument] = "*i1" if mask else "*fp32" if argument in FLOAT32 else f"*{NAMES[dtype]}"
            if bare and (mask or "bias" in argument):
                values[argument] = None
        else:
            types[argument] = "fp32" if argument.endswith("scale") else "i32"
    constexprs = {argument: value for argument, value in values.items() if argument in types}
    aligned = [a for a, t in types.items() if a not in constexprs and t != "fp32" and "mask" not in a and a != "window"]
    return Job(f"fastkd.kernels.attention_kl_div:{name}", types, constexprs, aligned, options, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_register_is_spilled(capability):
    names = [
        (name, capability, dtype, dim, bare)
        for name in KERNELS
        for dtype in NAMES
        for dim in (64, 128)
        for bare in (True, False)
        if (name, dtype) != ("key_gradient_kernel", torch.float32)  # known to spill some tens of bytes
    ]
    assert_nothing_spills({each: compile_job(*each) for each in names})
