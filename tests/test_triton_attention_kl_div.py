"""What only the Triton kernels of attention_kl_div have: grids, offsets, registers."""

from inspect import signature

import pytest
import torch
from subprocesses import python

pytest.importorskip("triton")

from triton_compile import CAPABILITIES, Job, assert_nothing_spills

from fastkd.kernels import attention_kl_div as kernel
from fastkd.kernels._attention import Model, Tokens

KERNELS = ("sums_kernel", "loss_kernel", "key_gradient_kernel")
FLOAT32 = ("loss_ptr", "row_scale_ptr", "weight_ptr", "sums", "bias")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TUPLES = {"model": Model, "student": Model, "teacher": Model, "tokens": Tokens}
POINTERS = ("sums", "query", "key", "bias")


class Recorder:
    """In place of a kernel, takes note of its grid."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


def test_batch_times_heads_may_be_large(monkeypatch):
    """Of a GPU's grid every dimension but the first ends at 65,535."""
    grids = []
    for name in KERNELS:
        monkeypatch.setattr(kernel, name, Recorder(grids))
    tensor = torch.empty(7_000, 12, 1, 4)
    masks, weight = {"query_mask": None, "key_mask": None}, torch.empty(7_000, 12, 1)
    options = masks | {"scales": (1.0, 1.0), "causal": False, "window": 0, "row_weight": weight}
    kernel.launch_attention_kl_div((tensor, tensor, None, None), (tensor, tensor, None, None), **options)
    assert len(grids) == 4
    assert all(max(grid[1:], default=1) <= 65_535 for grid in grids)


def test_offsets_beyond_two_to_the_31():
    """Tokens 2²⁶ elements apart, in memory that is promised and hardly touched: an int32 offset would leave it."""
    code = """
import torch
from fastkd.kernels.attention_kl_div import launch_attention_kl_div
def far(x):
    return torch.empty_strided(x.shape, (x.stride(0), x.stride(1), 2**26, 1), dtype=x.dtype).copy_(x)
options = {"query_mask": None, "key_mask": None, "scales": (0.3, 0.4), "causal": False, "window": 0}
options["row_weight"] = torch.rand(1, 1, 33)
query, key, teacher = torch.randn(3, 1, 1, 33, 16).half()
bias = torch.randn(1, 1, 33, 33)
near, apart = ((query, key, bias, None), (far(query), far(key), far(bias), None))
expected, found = (launch_attention_kl_div(x, (teacher, teacher, None, None), **options) for x in (near, apart))
assert all(map(torch.equal, expected, found))
"""
    python("-c", code, TRITON_INTERPRET="1")


def type_of(argument, dtype):
    if argument in TUPLES:
        return {field: type_of(field, dtype) for field in TUPLES[argument]._fields}
    if argument.isupper():
        return "constexpr"
    if argument.endswith("_mask"):
        return "*i1"
    if argument.endswith("_ptr") or argument in POINTERS:
        return "*fp32" if argument in FLOAT32 else f"*{NAMES[dtype]}"
    return "fp32" if argument == "scale" else "i32"


def compile_job(name, capability, dtype, dim, bare):
    """The launch of a causal model, with all masks and biases or with none."""
    sizes = kernel.tile(getattr(kernel, name), dtype, dim)
    options = {option: sizes.pop(option) for option in ("num_warps", "num_stages") if option in sizes}
    types = {argument: type_of(argument, dtype) for argument in signature(getattr(kernel, name).fn).parameters}
    fields = {"HEADS": 32, "GROUP": 1, "DIM": dim, "BLOCK_DIM": kernel.block_dim(dim)}
    fields |= {"CAUSAL": True, "WINDOW": not bare}
    fields |= {"bias": None, "query_mask": None, "key_mask": None} if bare else {}
    constexprs, aligned = dict(sizes), []
    for argument, kind in types.items():
        for field, of in kind.items() if isinstance(kind, dict) else ():
            if field in fields:
                constexprs[f"{argument}.{field}"] = fields[field]
            elif of != "fp32" and "mask" not in field and field != "window":
                aligned.append(f"{argument}.{field}")
        if isinstance(kind, str) and kind != "constexpr":
            aligned.append(argument)
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
    ]
    assert_nothing_spills({each: compile_job(*each) for each in names})
