"""Bad input of linear_kl_div and linear_topk_kl_div: the argument is named, with what it is and what it must be."""

import pytest
import torch
from torch import nn

from fastkd.losses import linear_kl_div, linear_topk_kl_div

HIDDEN, WEIGHT = torch.randn(5, 4), torch.randn(8, 4)
IDS, VALUES = torch.tensor([[0, 1, 2]] * 5), torch.full((5, 3), -1.5)
LABELS = torch.zeros(5, dtype=torch.int64)

BAD_STUDENTS = {
    "student_hidden must be a tensor, got NoneType": {"student_hidden": None},
    "student_weight must be a tensor, got Linear": {"student_weight": nn.Linear(4, 8)},
    "student_weight must be float32, .* got torch.int64": {"student_weight": WEIGHT.long()},
    "student_weight is torch.float16, but student_hidden is torch.float32": {"student_weight": WEIGHT.half()},
    "student_weight is on meta, but student_hidden is on cpu": {"student_weight": WEIGHT.to("meta")},
    r"must be \(\.\.\., H\) and \(V, H\), got \(5, 4\) and \(4, 8\)": {"student_weight": WEIGHT.T},
    "student_bias must be a tensor, got list": {"student_bias": [0.0] * 8},
    r"student_bias must be \(8,\) of torch.float32, got \(4,\)": {"student_bias": torch.zeros(4)},
    "student_logit_scale must be a number, got str": {"student_logit_scale": "1"},
    "student_softcap must be a number, got str": {"student_softcap": "30"},
    "student_softcap must be positive and finite, got 0": {"student_softcap": 0.0},
    "temperature must be a number or a tensor, got str": {"temperature": "2"},
    r"temperature has shape \(\); it holds one value per row of student_hidden, \(5,\)": {
        "temperature": torch.ones(())
    },
    "labels must be a tensor, got list": {"labels": [0] * 5},
    r"labels has shape \(4,\); it holds one value per row of student_hidden, \(5,\)": {"labels": LABELS[1:]},
    r"labels holds 8, outside \[0, 8\)": {"labels": LABELS + 8},
    "mask must be a tensor, got list": {"mask": [True] * 5},
    "mask is on meta, but student_hidden is on cpu": {"mask": torch.ones(5, device="meta")},
    "memory_budget must be a positive number of bytes, an int, got 0": {"memory_budget": 0},
    "memory_budget must be a positive number of bytes, an int, got 4000000.0": {"memory_budget": 4e6},
    "normalizer must be positive, or 0 where nothing counts, got -1": {"normalizer": torch.tensor(-1.0)},
}

BAD_TEACHERS = {
    "teacher_hidden must be a tensor, got list": {"teacher_hidden": [1.0]},
    "teacher_weight must be a tensor, got Linear": {"teacher_weight": nn.Linear(4, 8)},
    "teacher_weight is torch.float16, but teacher_hidden is torch.float32": {"teacher_weight": WEIGHT.half()},
    "teacher_weight requires grad": {"teacher_weight": WEIGHT.clone().requires_grad_()},
    "teacher_bias is on meta, but student_hidden is on cpu": {"teacher_bias": torch.zeros(8, device="meta")},
    r"teacher_hidden has rows \(4,\), but student_hidden has \(5,\)": {"teacher_hidden": HIDDEN[1:]},
    "student_weight has 8 rows and teacher_weight 7": {"teacher_weight": WEIGHT[1:]},
    "common_vocab must be an int from 1 to 8, the smaller vocabulary, got 9": {"common_vocab": 9},
    "common_vocab must be an int from 1 to 8, the smaller vocabulary, got '8'": {"common_vocab": "8"},
    "cross_entropy_weight must be a number, got str": {"cross_entropy_weight": "1"},
    "cross_entropy_weight is 0.5, but labels were not given": {"cross_entropy_weight": 0.5},
}

STUDENT = {"student_hidden": HIDDEN, "student_weight": WEIGHT}
GOOD = {
    linear_kl_div: STUDENT | {"teacher_hidden": HIDDEN, "teacher_weight": WEIGHT},
    linear_topk_kl_div: STUDENT | {"teacher_ids": IDS, "teacher_values": VALUES},
}


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("message", BAD_STUDENTS)
def test_a_bad_student_is_named(function, message):
    with pytest.raises((TypeError, ValueError), match=message):
        function(**GOOD[function] | BAD_STUDENTS[message])


@pytest.mark.parametrize("message", BAD_TEACHERS)
def test_a_bad_teacher_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        linear_kl_div(**GOOD[linear_kl_div] | BAD_TEACHERS[message])
