"""Bad input of low_rank_mse and mse: the argument is named, with what it is and what it must be."""

import pytest
import torch

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
        ([A], [A], {"reduction": "none"}, ValueError, "reduction must be mean or sum, got 'none'"),
        ([torch.tensor(1.0)], [torch.tensor(1.0)], {}, ValueError, r"students\[0\] must be \(..., d\)"),
    ],
)
def test_mse_names_the_argument(students, teachers, options, error, message):
    with pytest.raises(error, match=message):
        mse(students, teachers, **options)
