"""BERT-of-Theseus: which layers answer, what is drawn and trained, the rate over a training, the student left over."""

import pytest
import torch
from tiny import bert_config, same_answers
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fastkd.methods.baselines import Theseus
from fastkd.methods.baselines.theseus import ReplacementRate, set_rate, successor, theseus
from fastkd.students import first_layers
from fastkd.training.classifiers import MultiTaskEncoder, MultiTaskEncoderConfig
from fastkd.training.taps import Features

IDS = torch.tensor([[2, 4, 10, 3, 14, 3], [2, 7, 3, 10, 3, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
LABELS = torch.tensor([0, 1])
SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 1.0,
}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = SIZES | DROPOUT | {"initializer_range": 1.0}
CONFIGS = {
    "roberta": RobertaConfig(**BERT, num_hidden_layers=4, type_vocab_size=1, pad_token_id=0),
    "electra": ElectraConfig(**BERT, num_hidden_layers=4, embedding_size=8),
    "distilbert": DistilBertConfig(vocab_size=16, dim=16, n_layers=4, n_heads=2, hidden_dim=32, initializer_range=1.0),
}


def encoder_config():
    config = bert_config(initializer_range=1.0)
    config.num_hidden_layers = 4
    return config


def classifier():
    torch.manual_seed(0)
    return BertForSequenceClassification(encoder_config()).eval()


def multi_task(**options):
    torch.manual_seed(0)
    tasks = {"sst2": {"labels": ["negative", "positive"]}, "stsb": {"labels": []}}
    return MultiTaskEncoder(MultiTaskEncoderConfig(encoder_config(), tasks, **options)).eval()


def perturbed(model):
    """The model with layers of the student that differ from the teacher's."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def composed(teacher, layers):
    """The logits of a BERT classifier with these layers."""
    states = teacher.bert.embeddings(IDS)
    mask = torch.zeros(2, 1, 1, 6).masked_fill(IDS[:, None, None] == 0, -torch.inf)
    for layer in layers:
        states = layer(states, mask)
    return teacher.classifier(teacher.bert.pooler(states))


def draw(seed, rate):
    torch.manual_seed(seed)
    return tuple((torch.rand(()) < rate).item() for _ in range(2))


def test_every_draw_chooses_between_two_layers_and_their_successor():
    teacher = classifier()
    model = perturbed(theseus(teacher, 2, rate=0.3)).train()
    modules = model.bert.encoder.layer
    counts = {}
    for seed in range(200):
        draws = draw(seed, 0.3)
        torch.manual_seed(seed)
        logits = model(**INPUTS).logits
        counts[draws] = counts.get(draws, 0) + 1
        layers = []
        for index, (module, replaced) in enumerate(zip(modules, draws, strict=True)):
            layers += [module.successor] if replaced else teacher.bert.encoder.layer[2 * index : 2 * index + 2]
        same_answers(logits, composed(teacher, layers))
    assert len(counts) == 4
    assert counts[False, False] > 70  # 98 expected
    assert counts[True, True] < 40  # 18 expected


def test_the_teacher_stays_and_student_layers_start_as_its_first_ones():
    teacher = classifier()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = theseus(teacher, 2)
    for index, module in enumerate(model.bert.encoder.layer):
        first = teacher.bert.encoder.layer[index].state_dict()
        assert all(torch.equal(value, first[name]) for name, value in module.successor.state_dict().items())
    perturbed(model)
    assert teacher.config.num_hidden_layers == 4
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("replaced", [(False, False), (False, True), (True, False), (True, True)])
def test_only_the_students_layers_are_trained(replaced):
    model = theseus(classifier(), 2, rate=0.5).train()
    torch.manual_seed(next(seed for seed in range(100) if draw(seed, 0.5) == replaced))
    model(**INPUTS, labels=LABELS).loss.backward()  # also where nothing was replaced
    for name, parameter in model.named_parameters():
        module = next((i for i in range(2) if f"layer.{i}.successor" in name), None)
        assert parameter.requires_grad == (module is not None), name
        assert (parameter.grad is not None) == (module is not None and replaced[module]), name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_successor_is_the_model_with_all_replaced(name, tmp_path):
    torch.manual_seed(0)
    model = perturbed(theseus(AutoModelForSequenceClassification.from_config(CONFIGS[name]).eval(), 2))
    student = successor(model).eval()
    want = model.eval()(**INPUTS).logits  # outside training all modules are replaced
    same_answers(student(**INPUTS).logits, want)
    assert all(parameter.requires_grad for parameter in student.parameters())
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    same_answers(loaded(**INPUTS).logits, want)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_successor_of_a_multi_task_encoder(pooling, tmp_path):
    teacher = multi_task(pooling=pooling)
    model = theseus(teacher, 2)
    unchanged = first_layers(teacher, 2).state_dict()
    student = successor(model)
    assert all(torch.equal(value, unchanged[name]) for name, value in student.encoder.state_dict().items())
    student = successor(perturbed(model)).eval()
    student.save_pretrained(tmp_path)
    loaded = MultiTaskEncoder.from_pretrained(tmp_path)
    for task in ("sst2", "stsb"):
        want = model.eval()(**INPUTS, task=task).logits
        for found in (student, loaded):
            same_answers(found(**INPUTS, task=task).logits, want)


def test_the_successor_is_a_copy():
    model = theseus(classifier(), 2)
    before = model.eval()(**INPUTS).logits
    perturbed(successor(model))
    assert torch.equal(model(**INPUTS).logits, before)


def test_the_rate_follows_its_schedule_through_a_training(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, model, **kwargs):
            seen.append((state.global_step, [module.rate for module in model.bert.encoder.layer]))

        on_step_end = on_substep_end

    rows = [{"input_ids": IDS[0], "labels": 0}, {"input_ids": IDS[1], "labels": 1}] * 4
    schedule = Theseus(rate=0.25, growth=0.25, final_step=3)
    options = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "gradient_accumulation_steps": 2}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=1, num_train_epochs=1, **options)
    model = theseus(classifier(), 2)
    frozen = model.classifier.weight.clone()
    Trainer(model, args, train_dataset=rows, callbacks=[ReplacementRate(schedule), Watch()]).train()
    expected = [(0, 0.25), (1, 0.25), (1, 0.5), (2, 0.5), (2, 0.75), (3, 0.75), (3, 1.0), (4, 1.0)]
    assert seen == [(step, [rate] * 2) for step, rate in expected]
    assert torch.equal(model.classifier.weight, frozen)


def test_schedules():
    linear = Theseus()
    assert [linear.rate_at(step) for step in (0, 500, 1166, 1167, 9999)] == pytest.approx([0.3, 0.6, 0.9996, 1.0, 1.0])
    constant = Theseus(0.5, 0.0, 2500)
    assert [constant.rate_at(step) for step in (0, 2499, 2500)] == [0.5, 0.5, 1.0]


def test_the_loss_is_the_labels():
    logits = torch.randn(2, 3, requires_grad=True)
    total, parts = Theseus()(Features(logits=logits), Features(), LABELS, None)
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(logits, LABELS))
    assert list(parts) == ["label"]


MODERNBERT = ModernBertConfig(**SIZES, num_hidden_layers=4, pad_token_id=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theseus(classifier(), 3), "layers is 3; it must divide 4"),
        (lambda: theseus(classifier(), 0), "layers is 0"),
        (lambda: theseus(classifier(), 2, rate=0.0), "rate must be above 0 and at most 1, got 0.0"),
        (lambda: theseus(multi_task(pooling="cls_of_layers"), 2), "cls_of_layers"),
        (lambda: theseus(AutoModelForSequenceClassification.from_config(MODERNBERT), 2), "layers of several kinds"),
        (lambda: theseus(torch.nn.Linear(2, 2), 1), "no stack"),
        (lambda: successor(classifier()), "must be made by theseus"),
        (lambda: set_rate(classifier(), 0.5), "must be made by theseus"),
        (lambda: set_rate(theseus(classifier(), 2), 1.5), "rate must be above 0 and at most 1"),
        (lambda: Theseus(rate=0.0), "rate must be above 0"),
        (lambda: Theseus(growth=-1.0), "growth must be a number of at least 0"),
        (lambda: Theseus(final_step=-1), "final_step must be a number of at least 0"),
    ],
)
def test_what_cannot_be_replaced_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
