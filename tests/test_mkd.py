"""The MKD objective and trainer."""

import pytest
import torch
from torch.nn import functional as F

from fastkd.methods.mkd import MKDObjective

STUDENT = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, -2.0, 2.5], [0.5, 1.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])


def test_mse_is_the_mean_over_rows_and_classes():
    total, parts = MKDObjective()(STUDENT, TEACHER, LABELS)
    by_hand = (0.25 + 1.0 + 0.25 + 0.25 + 4.0 + 1.0) / 6
    assert total.item() == pytest.approx(by_hand)
    assert {name: part.item() for name, part in parts.items()} == {"distillation": pytest.approx(by_hand)}
    summed, _ = MKDObjective(sum_over_classes=True)(STUDENT, TEACHER)
    assert summed.item() == pytest.approx(3 * by_hand)


def test_kl_is_teacher_to_student_with_squared_temperature():
    total, _ = MKDObjective(loss="kl", temperature=2.0)(STUDENT, TEACHER)
    teacher, student = (TEACHER / 2).softmax(-1), (STUDENT / 2).softmax(-1)
    by_hand = 4 * (teacher * (teacher / student).log()).sum(-1).mean()
    assert total.item() == pytest.approx(by_hand.item())


def test_weights_apply_to_the_total_and_not_to_the_parts():
    objective = MKDObjective(hard_label_weight=0.5, distillation_weight=2.0)
    total, parts = objective(STUDENT, TEACHER, LABELS)
    assert parts["hard_label"].item() == pytest.approx(F.cross_entropy(STUDENT, LABELS).item(), rel=1e-6)
    assert parts["distillation"].item() == pytest.approx(F.mse_loss(STUDENT, TEACHER).item(), rel=1e-6)
    assert total.item() == pytest.approx(2 * parts["distillation"].item() + 0.5 * parts["hard_label"].item())


def test_a_regression_takes_squared_errors_only():
    scores, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [4.5]])
    total, parts = MKDObjective(loss="kl", hard_label_weight=1.0)(scores, targets, torch.tensor([0.0, 5.0]))
    assert parts["distillation"].item() == pytest.approx((1 + 0.25) / 2)
    assert parts["hard_label"].item() == pytest.approx((1 + 1) / 2)
    assert total.item() == pytest.approx(1.625)


def test_training_without_a_teacher_needs_no_logits():
    total, parts = MKDObjective(distillation_weight=0.0, hard_label_weight=1.0)(STUDENT, labels=LABELS)
    assert list(parts) == ["hard_label"]
    assert total.item() == pytest.approx(F.cross_entropy(STUDENT, LABELS).item(), rel=1e-6)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"teacher_logits must have the student's shape \(2, 3\), got \(2, 2\)"):
        MKDObjective()(STUDENT, TEACHER[:, :2])
    with pytest.raises(ValueError, match="got None"):
        MKDObjective()(STUDENT)
    with pytest.raises(ValueError, match="labels must be given"):
        MKDObjective(hard_label_weight=1.0)(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="nothing would be learned"):
        MKDObjective(distillation_weight=0.0)
    for options in ({"temperature": 0.0}, {"loss": "cosine"}, {"hard_label_weight": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MKDObjective(**options)
