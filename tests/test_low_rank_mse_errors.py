"""Bad input of low_rank_mse and mse: the argument is named, with what it is and what it must be."""

import pytest
import torch
from backends import fused

from fastkd.losses import low_rank_mse, mse


def arguments(**changes):
    found = {
        "x": torch.randn(2, 3, 6),
        "down": torch.randn(4, 6),
        "up": torch.randn(5, 4),
        "target": torch.randn(2, 3, 5),
    }
    return found | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, 6).long()}, TypeError, "x must be float32, .* got torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(..., d_in\)"),
        ({"down": torch.randn(6, 4)}, ValueError, r"down has shape \(6, 4\); it must be \(r, d_in\) .* d_in = 6"),
        ({"down": torch.randn(0, 6)}, ValueError, r"down has shape \(0, 6\)"),
        ({"up": torch.randn(4, 5)}, ValueError, r"up has shape \(4, 5\); it must be \(d_out, r\) .* r = 4"),
        ({"up": torch.randn(5, 4).half()}, TypeError, "up is torch.float16, but x is torch.float32"),
        ({"down": torch.randn(4, 6).double()}, TypeError, "down is torch.float64, but x is torch.float32"),
        ({"target": torch.randn(2, 3, 6)}, ValueError, r"target has shape \(2, 3, 6\); .* \(2, 3, 5\)"),
        ({"target": torch.randn(2, 3, 5, requires_grad=True)}, ValueError, r"target requires grad.*target.detach\(\)"),
        ({"target": torch.randn(2, 3, 5, device="meta")}, ValueError, "target is on meta, but x is on cpu"),
        ({"bias": torch.randn(4)}, ValueError, r"bias has shape \(4,\); it must be \(d_out,\) = \(5,\)"),
        ({"mask": torch.ones(2)}, ValueError, r"mask has shape \(2,\); it holds one value per row of x, \(2, 3\)"),
        ({"mask": [True]}, TypeError, "mask must be a tensor, got list"),
        ({"weights": torch.ones(6)}, ValueError, r"weights has shape \(6,\)"),
        ({"weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "weights requires grad"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of none, sum, mean, got 'batchmean'"),
        ({"normalizer": 0}, ValueError, "normalizer must be positive and finite, got 0"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer replaces the count"),
    ],
)
def test_low_rank_mse_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        low_rank_mse(**arguments(**changes))


A, B = torch.randn(2, 3, 6), torch.randn(7, 4)


@pytest.mark.parametrize(
    ("students", "teachers", "options", "error", "message"),
    [
        (A, A, {}, TypeError, "students must be a list or tuple of tensors, got Tensor"),
        ([], [], {}, ValueError, "students holds 0 tensors and teachers 0"),
        ([A, B], [A], {}, ValueError, "students holds 2 tensors and teachers 1"),
        ([A, 3], [A, B], {}, TypeError, r"students\[1\] must be a tensor, got int"),
        ([A, B], [A, B.T], {}, ValueError, r"teachers\[1\] has shape \(4, 7\), but students\[1\] has \(7, 4\)"),
        ([A], [A.clone().requires_grad_()], {}, ValueError, r"teachers\[0\] requires grad"),
        ([A], [A.to("meta")], {}, ValueError, r"teachers\[0\] is on meta, but students\[0\] is on cpu"),
        ([A, B], [A, B], {"mask": torch.ones(2, 3)}, ValueError, r"students\[1\] has rows \(7,\).*without it"),
        ([A], [A], {"mask": torch.ones(6)}, ValueError, r"mask has shape \(6,\)"),
        ([A], [A], {"weights": [1.0, 2.0]}, ValueError, r"weights has shape \(2,\); .* \(1,\)"),
        ([A], [A], {"weights": ["a"]}, TypeError, r"weights must be one number per pair.*got \['a'\]"),
        ([A], [A], {"reduction": "none"}, ValueError, "reduction must be mean or sum, got 'none'"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], {}, ValueError, r"students\[0\] must be \(..., d\)"),
    ],
)
def test_mse_names_the_argument(students, teachers, options, error, message):
    with pytest.raises(error, match=message):
        mse(students, teachers, **options)


ONES = torch.ones(1)
MSE = {"students": [B], "teachers": [B], "valid": None, "weights": ONES, "denominators": ONES, "need_grad": [True]}


@fused
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": ONES.double()}, "weights must hold 1 values of Float in one dimension, got 1 of Double"),
        ({"denominators": torch.ones(2)}, "denominators must hold 1 values of Float in one dimension, got 2 of Float"),
        ({"valid": torch.ones(7)}, "valid must hold 7 values of Bool in one dimension, got 7 of Float"),
        ({"teachers": []}, "one teacher and one flag per student"),
        ({"students": [B[:, :0]], "teachers": [B[:, :0]]}, "d at least 1"),
        (
            {"students": [B, B[:3]], "teachers": [B, B[:3]], "valid": torch.ones(7).bool(), "need_grad": [False] * 2}
            | dict.fromkeys(("weights", "denominators"), torch.ones(2)),
            "with valid all pairs must have the same rows",
        ),
    ],
)
def test_the_op_mse_itself_reads_nothing_else(changes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastkd.mse(**MSE | changes)


def call_low_rank_mse(**changes):
    """The op itself; of x (7, 4), rank 2 and a target (7, 4), for a mean without gradient."""
    given = {"x": B, "down": torch.ones(2, 4), "up": torch.ones(4, 2), "target": B}
    given |= dict.fromkeys(("bias", "valid", "weights", "output", "grad_output", "denominator")) | {"reduction": 2}
    needs = dict.fromkeys(("need_x", "need_down", "need_up", "need_bias", "need_output"), False)
    return torch.ops.fastkd.low_rank_mse(**given | needs | changes)[0]


@fused
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.ones(4).double()}, "bias must hold 4 values of Float .* got 4 of Double"),
        ({"valid": torch.ones(7)}, "valid must hold 7 values of Bool"),
        ({"weights": torch.ones(6)}, "weights must hold 7 values of Float .* got 6"),
        ({"output": B[:3]}, "output must have the target's shape and dtype"),
        ({"grad_output": B.half()}, "grad_output must have the target's shape and dtype"),
        ({"denominator": torch.ones(()).double()}, "denominator must be one float32"),
        ({"denominator": torch.ones(0)}, "denominator must be one float32"),
        ({"down": torch.ones(2, 5)}, "takes .N, d_in., .r, d_in., .d_out, r. and .N, d_out."),
    ],
)
def test_the_op_low_rank_mse_itself_reads_nothing_else(changes, message):
    assert call_low_rank_mse() > 0
    with pytest.raises(RuntimeError, match=message):
        call_low_rank_mse(**changes)
