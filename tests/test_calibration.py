"""Factors that keep most of what matrices give on a sample of inputs."""

import copy

import pytest
import torch
from families import BATCH, FAMILIES, SIZES, make
from transformers import BertConfig, BertModel

from fastkd.data.batches import PaddingCollator, sample_batches
from fastkd.methods.students import LowRankStudent, TransformerStudent
from fastkd.students import calibration, factorize, plan_factorization
from fastkd.students.calibration import keep_outputs, output_moments
from fastkd.training.classifiers import MultiTaskEncoder


def skewed(rows, width, seed=0):
    """Inputs that go mostly in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.5 ** torch.arange(width, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * scales @ mix


def inputs_of(model, name, batch):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_no_factors_of_that_rank_are_nearer_on_the_sample(shape, monkeypatch):
    monkeypatch.setattr(calibration, "PRIOR", 0.0)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = skewed(50, shape[1])
    y = x @ weight.T
    for rank in (1, 3, 6):
        best = torch.linalg.svdvals(y)[rank:].norm()  # by Eckart and Young, for any matrix of that rank
        near = keep_outputs(weight, y.T @ y, rank)
        assert torch.linalg.matrix_rank(near) == rank
        torch.testing.assert_close((y - x @ near.T).norm(), best, rtol=1e-6, atol=1e-9)


def test_where_the_sample_says_nothing_the_weights_decide():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :2] * s[:2] @ vh[:2]
    torch.testing.assert_close(keep_outputs(weight, torch.zeros(6, 6), 2), best)
    one = weight @ torch.ones(9, dtype=torch.float64)  # a sample of one token
    near = keep_outputs(weight, torch.outer(one, one), 3)
    torch.testing.assert_close(near @ torch.ones(9, dtype=torch.float64), one, rtol=1e-3, atol=1e-3)
    assert (near - weight).norm() < 1.2 * s[2:].norm()
    assert keep_outputs(torch.zeros(4, 3), torch.zeros(4, 4), 2).count_nonzero() == 0


def test_moments_are_of_the_tokens_that_count_without_the_bias():
    model = make("bert")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = torch.ones_like(BATCH["input_ids"])
    mask[0, 3:] = 0
    batch = {"input_ids": BATCH["input_ids"], "attention_mask": mask}
    names = ["bert.embeddings.word_embeddings", "bert.encoder.layer.1.output.dense", "bert.pooler.dense"]
    model.train()
    found = output_moments(model, names, [batch, batch])
    assert model.training
    model.eval()
    for name in names:
        x = inputs_of(model, name, batch)
        weight = model.get_submodule(name).weight.double()
        if "pooler" not in name:
            x = x[mask.bool()]
        y = weight[x] if x.dtype == torch.long else x.double() @ weight.T
        torch.testing.assert_close(found[name].double(), 2 * y.T @ y, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_calibrated_student_is_nearer_on_the_sample(name):
    model = make(name)
    plan = plan_factorization(model, rank=3, embedding=True)
    before = copy.deepcopy(model.state_dict())
    plain, fitted = factorize(model, plan), factorize(model, plan, [BATCH])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    better = 0
    for matrix in plan.matrices:
        if matrix.name not in plan.ranks:
            continue
        x = inputs_of(model, matrix.name, BATCH)
        with torch.no_grad():
            y, of_plain, of_fitted = (m.get_submodule(matrix.name)(x) for m in (model, plain, fitted))
        errors = [(y - answer).norm().item() for answer in (of_plain, of_fitted)]
        assert errors[1] < errors[0] * (1 + 1e-3) + 1e-6
        better += errors[1] < 0.9 * errors[0]
    assert better > len(plan.ranks) / 2


def test_half_precision_keeps_its_dtype():
    model = make("bert").bfloat16()
    plan = plan_factorization(model, rank=3, embedding=True)
    student = factorize(model, plan, [BATCH])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student(**BATCH).logits.isfinite().all()


def test_a_sample_without_batches_is_refused():
    model = make("bert")
    with pytest.raises(ValueError, match="batches is empty; it must have at least one batch"):
        factorize(model, plan_factorization(model, rank=3), [])


@pytest.mark.parametrize(
    "student",
    [
        lambda rows: LowRankStudent(rank=3, embedding=True, calibration_rows=rows),
        lambda rows: TransformerStudent(3, None, None, parameters=29_000, keeps_heads=True, calibration_rows=rows),
    ],
)
def test_a_student_of_an_experiment_reads_no_more_batches_than_it_is_calibrated_on(student):
    torch.manual_seed(0)
    teacher = MultiTaskEncoder.from_encoder(BertModel(BertConfig(**SIZES)), ["sst2"], pooling="mean")
    read = []

    def batches():
        for _ in range(10):
            read.append(1)
            yield {**BATCH, "task": "sst2"}

    rows, labels, answers = len(BATCH["input_ids"]), {"sst2": ("no", "yes")}, []
    for wanted, batches_read in ((0, 0), (1, 1), (rows, 1), (rows + 1, 2), (1000, 10)):
        read.clear()
        made = student(wanted).make(teacher, labels, batches()).eval()
        assert len(read) == batches_read
        answers.append(made(**BATCH).logits)
    assert torch.equal(student(5).make(teacher, labels).eval()(**BATCH).logits, answers[0])  # there is no sample
    assert not torch.allclose(answers[0], answers[1], atol=1e-4)
    torch.testing.assert_close(answers[1], answers[4], rtol=1e-3, atol=1e-3)  # the same batch again
    with pytest.raises(ValueError, match="calibration_rows is -1; it must be at least 0"):
        student(-1).make(teacher, labels)


def test_a_sample_has_every_row_once_at_most():
    rows = [{"input_ids": [index + 1] * (index % 3 + 1)} for index in range(10)]
    found = [list(sample_batches(rows, PaddingCollator({"input_ids": 0}), count, batch_size=4)) for count in (7, 100)]
    for batches, sizes in zip(found, ([4, 3], [4, 4, 2]), strict=True):
        first = torch.cat([batch["input_ids"][:, 0] for batch in batches]).tolist()
        assert [len(batch["input_ids"]) for batch in batches] == sizes
        assert len(set(first)) == sum(sizes)
        assert first != sorted(first)
