"""Bad input of topk_kl_div: a clear error that names the argument, what it is and what it must be."""

import pytest
import torch

from fastkd.losses import topk_kl_div

STUDENT = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0, 1, 2], [5, 4, 3], [3, -1, 0], [-1, -1, -1]])
VALUES = torch.full((4, 3), -1.5)
T = torch.tensor([1.0, 2.0, 1.0, 2.0])

BAD_CALLS = {
    "student_logits must be a tensor, got list": {"student_logits": [1.0]},
    r"student_logits must be \(\.\.\., V\) with V >= 1, got shape \(4, 0\)": {"student_logits": STUDENT[:, :0]},
    "student_logits must be float32, .* got torch.int64": {"student_logits": STUDENT.long()},
    "teacher_values must be a tensor, got list": {"teacher_values": [1.0]},
    "teacher_values must be float32, .* got torch.int64": {"teacher_values": VALUES.long()},
    "teacher_values is on meta, but student_logits is on cpu": {"teacher_values": VALUES.to("meta")},
    "teacher_values requires grad": {"teacher_values": VALUES.clone().requires_grad_()},
    r"teacher_values has shape \(4, 2\), but teacher_ids has \(4, 3\)": {"teacher_values": VALUES[:, :2]},
    "teacher_values has probabilities that sum to 8.155 in one row": {"teacher_values": VALUES + 2.5},
    "teacher_ids must be an int32 or int64 tensor, got torch.float32": {"teacher_ids": VALUES},
    "teacher_ids must be an int32 or int64 tensor, got torch.int16": {"teacher_ids": IDS.short()},
    "teacher_ids must be an int32 or int64 tensor, got list": {"teacher_ids": IDS.tolist()},
    "teacher_ids is on meta, but student_logits is on cpu": {"teacher_ids": IDS.to("meta")},
    r"teacher_ids has shape \(3, 3\); .* the rows of student_logits, \(4,\)": {"teacher_ids": IDS[:3]},
    r"teacher_ids has shape \(4, 0\); it must be \(\.\.\., k\) with k >= 1": {"teacher_ids": IDS[:, :0]},
    r"teacher_ids holds 6, outside \[0, 6\) and not -1": {"teacher_ids": IDS.masked_fill(IDS == 5, 6)},
    "teacher_ids holds -2, outside": {"teacher_ids": IDS.masked_fill(IDS == 5, -2)},
    "teacher_ids holds 4 twice in one row": {"teacher_ids": IDS.masked_fill(IDS == 5, 4)},
    'one id per row, .* must be "bucket" or "zero", got "renormalize"': {
        "teacher_ids": IDS[:, :1],
        "teacher_values": VALUES[:, :1],
        "tail": "renormalize",
    },
    "tail must be one of renormalize, zero, bucket, got 'drop'": {"tail": "drop"},
    "divergence must be one of forward, reverse, jsd, got 'kl'": {"divergence": "kl"},
    'divergence must be "forward" for tail="zero", got \'reverse\'': {"tail": "zero", "divergence": "reverse"},
    'divergence must be "forward" for tail="zero", got \'jsd\'': {"tail": "zero", "divergence": "jsd"},
    r"beta must be inside \(0, 1\)": {"divergence": "jsd", "beta": 0},
    "teacher_temperature must equal temperature for tail='bucket', got 1.0 and 2.0": {"temperature": 2.0},
    "teacher_temperature must equal temperature for tail='zero', got 2.0 and 1.0": {
        "tail": "zero",
        "teacher_temperature": 2.0,
    },
    "teacher_temperature must equal temperature .* got 1.0 and tensor": {"temperature": T},
    "teacher_temperature must be positive and finite, got 0": {"tail": "renormalize", "teacher_temperature": 0},
    "teacher_temperature must be a number or a tensor, got str": {"tail": "renormalize", "teacher_temperature": "2"},
    r"teacher_temperature has shape \(3,\)": {"tail": "renormalize", "teacher_temperature": T[:3]},
    "temperature must be positive and finite, got nan": {"temperature": float("nan")},
    r"teacher_logsumexp has shape \(3,\); it holds one value per row": {"teacher_logsumexp": T[:3]},
    "teacher_logsumexp requires grad": {"teacher_logsumexp": T.clone().requires_grad_()},
    "reduction must be one of none, sum, mean": {"reduction": "batchmean"},
    "normalizer must be positive and finite, got 0": {"normalizer": 0},
    "labels must be int64": {"labels": torch.ones(4)},
    r"mask has shape \(4, 6\); it holds one value per row of student_logits, \(4,\)": {"mask": torch.ones(4, 6)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    arguments = {"student_logits": STUDENT, "teacher_ids": IDS, "teacher_values": VALUES} | BAD_CALLS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        topk_kl_div(**arguments)


def test_what_is_not_refused():
    """Padding is not looked at, and a temperature per row may be a tensor of equal values."""
    padded = VALUES.masked_fill(IDS < 0, 30.0)
    assert topk_kl_div(STUDENT, IDS, padded).isfinite()
    assert topk_kl_div(STUDENT, IDS, VALUES, temperature=T, teacher_temperature=T.clone()).isfinite()


def test_the_op_itself_guards_its_memory():
    options = (None, 1.0, 0, 0.5, None, None, 2, None, True, True)
    for ids in ([[0, 6]], [[-2, 0]], [[3, 1]]):
        with pytest.raises(RuntimeError, match="ids must ascend in each row and lie in"):
            torch.ops.fastkd.topk_kl_div(STUDENT, torch.tensor(ids * 4), VALUES, *options)
    with pytest.raises(RuntimeError, match="the teacher must have k or k"):
        torch.ops.fastkd.topk_kl_div(STUDENT, torch.tensor([[0]] * 4), VALUES, *options)
    bad = (None, 1.0, 0, 0.5, torch.ones(3).bool(), *options[5:])
    with pytest.raises(RuntimeError, match="valid must hold 4 values of Bool in one dimension, got 3"):
        torch.ops.fastkd.topk_kl_div(STUDENT, torch.tensor([[0, 1]] * 4), VALUES, *bad)
