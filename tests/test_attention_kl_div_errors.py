"""Bad input of attention_kl_div: a clear error that names the argument, what it is and what it must be."""

import pytest
import torch

from fastkd.losses import attention_kl_div

HEADS = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))

BAD_CALLS = {
    "student_key must be a tensor, got list": {"student_key": [1.0]},
    "teacher_query must be float32, .* got torch.int64": {"teacher_query": HEADS.long()},
    "teacher_key is on meta, but student_query is on cpu": {"teacher_key": HEADS.to("meta")},
    "teacher_query requires grad": {"teacher_query": HEADS.clone().requires_grad_()},
    r"student_lse has shape \(2, 6, 4\); it must be \(B, H, T_q\) = \(2, 4, 6\)": {"student_lse": torch.zeros(2, 6, 4)},
    "student_lse must be a tensor, got float": {"student_lse": 0.0},
    "teacher_lse must be float32, .* got torch.int64": {"teacher_lse": torch.zeros(2, 4, 6, dtype=torch.int64)},
    "teacher_lse is on meta, but student_query is on cpu": {"teacher_lse": torch.zeros(2, 4, 6, device="meta")},
    "student_bias must be a tensor, got list": {"student_bias": [0.0]},
    "teacher_bias must be float32, .* got torch.bool": {"teacher_bias": torch.ones(1, 4, 6, 6).bool()},
    "student_bias requires grad": {"student_bias": torch.zeros(1, 4, 6, 6, requires_grad=True)},
    r"student_query must be \(B, H, T, d\) with d >= 1, got shape \(4, 6, 8\)": {"student_query": HEADS[0]},
    r"student_key \(2, 4, 6, 7\): B and d must be equal": {"student_key": HEADS[..., :7]},
    r"teacher_key \(2, 3, 6, 8\): the heads of the query must be a multiple": {"teacher_key": HEADS[:, :3]},
    r"teacher_key is .* \(2, 4, 5, 8\), but student_key is \(2, 4, 6, 8\): B and T": {"teacher_key": HEADS[:, :, :5]},
    "teacher_query has 2 heads, but student_query has 4": {
        "teacher_query": HEADS[:, :2],
        "teacher_key": HEADS[:, :2],
        "average_teacher_heads": True,
    },
    "teacher_query has 8 heads, .* give relation_heads, or average_teacher_heads=True": {
        "teacher_query": HEADS.repeat(1, 2, 1, 1),
        "teacher_key": HEADS.repeat(1, 2, 1, 1),
    },
    "relation_heads is 5, which does not divide the width 32 of student_query": {"relation_heads": 5},
    "relation_heads is '4', which does not divide": {"relation_heads": "4"},
    "layout must be bhtd or bthd, got 'bth'": {"layout": "bth"},
    "^mask must be a tensor, got list": {"mask": [True, False]},
    "query_mask must be a tensor, got list": {"query_mask": [[True] * 6] * 2},
    r"mask has shape \(2, 5\), but \(B, T_k\) is \(2, 6\)": {"mask": torch.ones(2, 5)},
    r"mask of one dimension must be \(B,\) = \(2,\) integer lengths": {"mask": torch.ones(2)},
    r"query_mask has shape \(2, 1\), but \(B, T_q\) is \(2, 6\)": {"query_mask": torch.ones(2, 1)},
    "mask is on meta": {"mask": torch.ones(2, 6, device="meta")},
    r"teacher_bias has shape \(4, 6, 6\); it must be": {"teacher_bias": torch.zeros(4, 6, 6)},
    r"student_bias has shape \(2, 1, 6, 1\); it must be": {"student_bias": torch.zeros(2, 1, 6, 1)},
    "student_scale must be a number, got str": {"student_scale": "1"},
    "student_scale must be positive and finite, got 0": {"student_scale": 0.0},
    "teacher_scale must be positive and finite, got nan": {"teacher_scale": float("nan")},
    "window must be an int of at least 1, .* got 0": {"window": 0},
    "window must be an int of at least 1, .* got 2.0": {"window": 2.0},
    "reduction must be one of none, sum, mean, got 'batchmean'": {"reduction": "batchmean"},
    'normalizer replaces the count in reduction="mean"': {"reduction": "sum", "normalizer": 3},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    arguments = dict.fromkeys(("student_query", "student_key", "teacher_query", "teacher_key"), HEADS)
    with pytest.raises((TypeError, ValueError), match=message):
        attention_kl_div(**arguments | BAD_CALLS[message])


@pytest.mark.parametrize(
    ("message", "position", "value"),
    [
        ("query and key must be", 1, HEADS[:, :3]),
        ("the last dimension must be dense", 2, HEADS.transpose(2, 3).contiguous().transpose(2, 3)),
        ("must agree in batch, tokens and dtype", 3, HEADS[:, :, :5]),
        ("a mask must be bool", 8, torch.ones(2, 5).bool()),
        ("a mask must be bool", 9, torch.ones(2, 6)),
        ("student bias must be float32", 4, torch.zeros(2, 4, 6, 5)),
        ("row_weight must be float32", 14, torch.ones(2, 4, 5)),
    ],
)
def test_the_op_itself_guards_its_memory(message, position, value):
    arguments = [HEADS] * 4 + [None] * 6 + [0.3, 0.3, False, 0, None]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastkd.attention_kl_div(*arguments)
