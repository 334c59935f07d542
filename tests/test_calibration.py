"""Factors that keep most of what matrices give on a sample of inputs."""

import copy

import pytest
import torch
from families import BATCH, FAMILIES, SIZES, make
from transformers import BertConfig, BertModel, RobertaConfig, RobertaForSequenceClassification

from fastkd.data.batches import PaddingCollator, sample_batches
from fastkd.methods.students import LowRankStudent, TransformerStudent
from fastkd.students import calibration, factorize, plan_factorization
from fastkd.students.calibration import fitted_factors, token_moments
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
        up, down = fitted_factors(weight, y.T @ y, rank)
        assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
        torch.testing.assert_close((y - x @ (up @ down).T).norm(), best, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-9, atol=1e-9)


def test_where_the_sample_says_nothing_the_weights_decide():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    up, down = fitted_factors(weight, torch.zeros(6, 6), 2)
    torch.testing.assert_close(up @ down, u[:, :2] * s[:2] @ vh[:2])
    token = torch.ones(9, dtype=torch.float64)
    up, down = fitted_factors(weight, torch.outer(weight @ token, weight @ token), 3)
    torch.testing.assert_close(up @ down @ token, weight @ token, rtol=1e-3, atol=1e-3)
    assert (up @ down - weight).norm() < 1.2 * s[2:].norm()
    assert not any(factor.any() for factor in fitted_factors(torch.zeros(4, 3), torch.zeros(4, 4), 2))


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2"])
def test_moments_are_of_the_tokens_that_count(name):
    model = make(name)
    plan = plan_factorization(model, rank=3, embedding=True)
    mask = torch.ones_like(BATCH["input_ids"])
    mask[0, 3:] = 0
    batch = {"input_ids": BATCH["input_ids"], "attention_mask": mask}
    found = token_moments(model, plan.ranks, [batch, batch])
    for matrix, moment in found.items():
        x = inputs_of(model, matrix, batch)
        if x.dtype == torch.long:
            x = model.get_submodule(matrix).weight[x]
        x = x.flatten(0, -2).double()
        x = x if len(x) < mask.numel() else x[mask.flatten().bool()]  # a pooler takes a token a row
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment.double(), 2 * x.T @ x, rtol=1e-4, atol=1e-4)
    assert len(found) == len(plan.ranks)


def test_a_model_is_left_as_it_was_even_by_a_batch_that_fails():
    model, names = make("bert"), ["bert.pooler.dense"]
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = (token_moments(model, names, [BATCH])[names[0]] for _ in range(2))
    assert torch.equal(first, second)  # without dropout
    with pytest.raises(IndexError):
        token_moments(model, names, [{"input_ids": torch.tensor([[10**6]])}])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_a_batch_may_have_more_than_the_model_takes():
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1))
    more = {**BATCH, "token_type_ids": torch.ones_like(BATCH["input_ids"]), "teacher_logits": torch.zeros(2, 2)}
    names = ["roberta.encoder.layer.2.output.dense"]
    plain, with_more = (token_moments(model, names, [batch])[names[0]] for batch in (BATCH, more))
    assert torch.equal(plain, with_more)


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


def test_half_precision_keeps_its_dtype_and_what_a_large_bias_hides():
    model = make("bert")
    query = model.bert.encoder.layer[0].attention.self.query
    query.bias.data[:4] = 200.0
    model.bfloat16()
    plan = plan_factorization(model, rank=3)
    student, exact = (factorize(some, plan, [BATCH]) for some in (model, copy.deepcopy(model).float()))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    mine, want = (some.bert.encoder.layer[0].attention.self.query.weight.float() for some in (student, exact))
    assert (mine - want).norm() < 0.05 * want.norm()


def test_autocast_rounds_what_is_seen_but_no_sums_and_no_factors():
    model = make("bert")
    plan = plan_factorization(model, rank=3, embedding=True)
    want = token_moments(model, plan.ranks, [BATCH])
    with torch.autocast("cpu", torch.bfloat16):
        found = token_moments(model, plan.ranks, [BATCH])
        student = factorize(model, plan, [BATCH])
    for name, moment in found.items():
        assert moment.dtype == torch.float32
        assert (moment - want[name]).norm() < 0.05 * want[name].norm()
        layer = student.get_submodule(name)
        up, down = layer.up.double(), layer.down.double()
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-3, atol=1e-3)  # as of products in float32


def test_a_bad_sample_is_refused():
    model = make("bert")
    plan = plan_factorization(model, rank=3)
    with pytest.raises(ValueError, match="batches is empty; it must have at least one batch"):
        factorize(model, plan, [])
    with pytest.raises(ValueError, match="batches is a single batch; it must be several"):
        factorize(model, plan, BATCH)
    model.bert.encoder.layer[1].output.dense.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"bert.encoder.layer.2.attention.self.query meets NaN or infinity"):
        factorize(model, plan, [BATCH])


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


def test_a_sample_has_every_row_once_at_most_and_any_row():
    torch.manual_seed(0)
    rows = [{"input_ids": [index + 1] * (index % 3 + 1)} for index in range(10)]
    found = [list(sample_batches(rows, PaddingCollator({"input_ids": 0}), count, batch_size=4)) for count in (7, 100)]
    for batches, sizes in zip(found, ([4, 3], [4, 4, 2]), strict=True):
        first = torch.cat([batch["input_ids"][:, 0] for batch in batches]).tolist()
        assert [len(batch["input_ids"]) for batch in batches] == sizes
        assert len(set(first)) == sum(sizes)
        assert first != sorted(first)
        assert max(first) > 7
