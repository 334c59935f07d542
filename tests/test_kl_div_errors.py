"""Bad input of kl_div: a clear error that names the argument, what it is and what it must be."""

import pytest
import torch

from fastkd.losses import kl_div

STUDENT, TEACHER = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).unbind()

BAD_CALLS = {
    "student_logits must be a tensor, got list": {"student_logits": [1.0]},
    "teacher_logits must be a tensor, got NoneType": {"teacher_logits": None},
    r"teacher_logits has shape \(4, 5\), but student_logits has \(4, 6\)": {"teacher_logits": TEACHER[:, :5]},
    r"\(\.\.\., V\) with V >= 1, got shape \(4, 0\)": {
        "student_logits": STUDENT[:, :0],
        "teacher_logits": TEACHER[:, :0],
    },
    "must be float32, .* got torch.int64": {"student_logits": STUDENT.long()},
    "teacher_logits is on meta, but student_logits is on cpu": {"teacher_logits": TEACHER.to("meta")},
    "teacher_logits requires grad": {"teacher_logits": TEACHER.clone().requires_grad_()},
    "divergence must be one of forward, reverse, jsd, got 'kl'": {"divergence": "kl"},
    r"beta must be inside \(0, 1\) .* got 0": {"divergence": "jsd", "beta": 0},
    r"beta must be inside \(0, 1\) .* got 1.5": {"divergence": "jsd", "beta": 1.5},
    "beta must be a number, got str": {"divergence": "jsd", "beta": "half"},
    "temperature must be a number or a tensor, got str": {"temperature": "2"},
    "temperature must be positive and finite, got 0": {"temperature": 0},
    "temperature must be positive and finite, got nan": {"temperature": float("nan")},
    r"temperature has shape \(3,\); it holds one value per row of .*, \(4,\)": {"temperature": torch.ones(3)},
    "temperature must be positive and finite in every row": {"temperature": torch.tensor([1.0, -1.0, 1.0, 1.0])},
    "temperature requires grad": {"temperature": torch.ones(4, requires_grad=True)},
    "reduction must be one of none, sum, mean, got 'batchmean'": {"reduction": "batchmean"},
    'normalizer replaces the count in reduction="mean"': {"reduction": "sum", "normalizer": 3},
    "normalizer must be a number or a 0-d tensor, got list": {"normalizer": [3]},
    "normalizer must be positive and finite, got 0": {"normalizer": 0},
    "normalizer must be positive, or 0 where nothing counts, got -3": {"normalizer": torch.tensor(-3)},
    "normalizer must be positive, or 0 where nothing counts, got nan": {"normalizer": torch.tensor(float("nan"))},
    r"normalizer must be a number or a 0-d tensor, got shape \(1,\)": {"normalizer": torch.ones(1)},
    "labels must be int64, got torch.float32": {"labels": torch.ones(4)},
    "labels must be a tensor, got list": {"labels": [0, 1, 1, 1]},
    r"labels has shape \(3,\); it holds one value per row of student_logits, \(4,\)": {
        "labels": torch.ones(3, dtype=torch.int64)
    },
    r"labels holds 6, outside \[0, 6\) and not ignore_index = -100": {"labels": torch.tensor([0, 6, 1, 1])},
    "labels holds -1, outside": {"labels": torch.tensor([0, -1, 1, 1])},
    "ignore_index must be a number, got str": {"labels": torch.zeros(4, dtype=torch.int64), "ignore_index": "-100"},
    "cross_entropy_weight must be a number, got str": {"cross_entropy_weight": "0.5"},
    "cross_entropy_weight is 0.5, but labels were not given": {"cross_entropy_weight": 0.5},
    "mask must be a tensor, got list": {"mask": [True, False, True, True]},
    r"mask has shape \(4, 6\); it holds one value per row of student_logits, \(4,\)": {"mask": torch.ones(4, 6)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_named(message):
    arguments = {"student_logits": STUDENT, "teacher_logits": TEACHER} | BAD_CALLS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        kl_div(**arguments)


def test_the_op_itself_guards_its_memory():
    with pytest.raises(RuntimeError, match="valid must hold 4 values of Bool in one dimension, got 3"):
        torch.ops.fastkd.kl_div(
            STUDENT, TEACHER, None, 1.0, 0, 0.5, torch.ones(3).bool(), None, 0.0, 2, None, True, True, False
        )
    with pytest.raises(RuntimeError, match="labels must lie in"):
        torch.ops.fastkd.kl_div(
            STUDENT, TEACHER, None, 1.0, 0, 0.5, None, torch.full((4,), 99), 1.0, 2, None, True, True, False
        )
