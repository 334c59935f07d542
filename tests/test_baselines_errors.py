"""The baselines: maps of layers, and what is refused with the argument's name."""

from types import SimpleNamespace

import pytest
import torch
from baselines_samples import LABELS, MASK, SMALL, features

from fastkd.methods.baselines import BASELINES, KD, InTurn, TinyBERT
from fastkd.methods.baselines.layers import layer_pairs
from fastkd.methods.feature_distillation import FeatureDistillation
from fastkd.training.taps import Features


def test_maps_of_layers():
    assert layer_pairs("uniform", 3, 6) == [(1, 2), (2, 4), (3, 6)]
    assert layer_pairs("skip", 6, 12) == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    assert layer_pairs("last", 6, 12) == [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]
    assert layer_pairs([(1, 5)], 2, 5) == [(1, 5)]


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "message"),
    [
        ("uniform", 5, 12, "a multiple of the student's layers, not a student of 5 layers and a teacher of 12"),
        ("skip", 1, 12, "2 or more"),
        ("last", 1, 12, "2 or more"),
        ("last", 6, 3, "no deeper student"),
        ([(1, 2), (3, 4)], 2, 4, r"pair \(3, 4\)"),
        ([(0, 2)], 2, 4, r"pair \(0, 2\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(layers, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(layers, student, teacher)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kd", {"alpha": 1.5}, "alpha must be a number from 0 to 1, got 1.5"),
        ("kd", {"temperature": 0.0}, "temperature must be a positive number"),
        ("pkd", {"beta": -1.0}, "beta must be a number of at least 0"),
        ("pkd", {"layers": "first"}, "layers must be one of uniform, skip, last"),
        ("pkd", {"layers": []}, "layers must be one of"),
        ("distilbert", {"alpha_cos": float("nan")}, "alpha_cos must be a number of at least 0"),
        ("distilbert", {"alpha_ce": 0, "alpha_task": 0, "alpha_cos": 0}, "all 0"),
        ("tinybert", {"stage": "both"}, "stage must be one of intermediate, prediction"),
        ("minilm", {"label_weight": -1.0}, "label_weight"),
        ("minilmv2", {"relation_heads": 0}, "relation_heads must be a whole number of at least 1"),
        ("minilmv2", {"teacher_layer": 0}, "teacher_layer must be a whole number of at least 1"),
        ("reverse-kl", {"alpha": -0.1}, "alpha must be"),
        ("jsd", {"beta": 1.0}, r"beta must be a number inside \(0, 1\)"),
        ("minillm", {"kd_ratio": 2.0}, "kd_ratio must be"),
        ("minillm", {"lm_coef": -1.0}, "lm_coef must be"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        BASELINES[name](**options)


WIDE = {"width": 16, "heads": 4}


@pytest.mark.parametrize(
    ("name", "options", "student", "teacher", "message"),
    [
        ("kd", {}, {}, {"logits": (3, 2)}, r"teacher's logits have shape \(3, 2\), but the student's \(3, 3\)"),
        ("pkd", {}, {}, WIDE | {"layers": 4}, "width 8 and the teacher's 16"),
        ("pkd", {}, {"layers": 3}, {"layers": 4}, "a multiple"),
        ("distilbert", {}, {}, WIDE, "width 8 and the teacher's 16"),
        ("tinybert", {}, {}, {"heads": 4}, "2 attention heads and the teacher 4"),
        ("tinybert", {}, {}, {"width": 16}, "equal, or projected"),
        ("minilm", {}, {}, {"heads": 4}, "MiniLM takes equally many"),
        ("minilm", {}, {}, {"causal": True}, "but the student's"),
        ("minilmv2", {"relation_heads": 3}, {}, {}, "relation_heads is 3"),
        ("minilmv2", {"teacher_layer": 3}, {}, {}, "teacher_layer is 3; it must be 1 to 2"),
    ],
)
def test_models_that_do_not_fit_are_refused(name, options, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        BASELINES[name](**options)(features(0, **student), features(1, **teacher), LABELS, MASK)


@pytest.mark.parametrize("name", BASELINES)
def test_what_was_not_recorded_is_named(name):
    missing = "attention" if name in ("tinybert", "minilm", "minilmv2") else "logits"
    with pytest.raises(ValueError, match=f"features have no {missing}"):
        BASELINES[name]()(Features(), Features(), LABELS, MASK)
    if name in ("pkd", "distilbert"):
        bare = Features(logits=torch.randn(3, 3))
        with pytest.raises(ValueError, match="no hidden states"):
            BASELINES[name]()(bare, bare, LABELS, MASK)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "theseus"])
def test_a_teacher_that_requires_grad_is_refused(name):
    student, teacher = features(0), features(1, layers=4, grad=True)
    with pytest.raises(ValueError, match="requires grad"):
        BASELINES[name](**SMALL.get(name, {}))(student, teacher, LABELS, MASK)


@pytest.mark.parametrize("stages", [lambda own: own, lambda own: InTurn(own, KD()), lambda own: InTurn(KD(), own)])
def test_trainers_refuse_an_objective_that_would_have_to_be_trained(stages):
    trainer = SimpleNamespace(objective=stages(TinyBERT(projection=torch.nn.Linear(2, 4))))
    with pytest.raises(ValueError, match="has projection, a module that a trainer does not train"):
        FeatureDistillation.tap(trainer, torch.nn.Linear(2, 2))


def test_a_teacher_that_requires_grad_is_refused_in_a_regression():
    with pytest.raises(ValueError, match="requires grad"):
        KD()(features(0, logits=(3, 1)), features(1, logits=(3, 1), grad=True), LABELS.float(), MASK)
