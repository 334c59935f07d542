"""Teacher logits online and from the cache: right rows, right columns, and never another teacher's."""

import copy

import pytest
import torch
from tiny import bert_config, tokenizer, write_glue

from fastkd.data.encode import MultiTaskCollator, load_encoded
from fastkd.training.signals import TeacherSignal, add_teacher_logits
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig

LABELS = {"sst2": ["negative", "positive"], "stsb": []}
COLLATE = MultiTaskCollator(tokenizer())


def make_teacher(seed=0, sst2=("negative", "positive"), **tasks):
    torch.manual_seed(seed)
    named = {"sst2": {"labels": list(sst2)}, "stsb": {"labels": []}, **tasks}
    return MultiTaskEncoder(MultiTaskEncoderConfig(bert_config(initializer_range=1.0), named))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"), rows=10)


@pytest.fixture
def data(folder):
    return load_encoded(list(LABELS), tokenizer(), 16, folder)[0]


def column(dataset, task):
    return torch.tensor(dataset.datasets[task]["teacher_logits"][:])


def test_column_holds_each_rows_own_logits(data):
    teacher = make_teacher()
    filled = add_teacher_logits(data, TeacherSignal(teacher, LABELS), COLLATE, batch_size=4)
    for index in range(len(filled)):
        row = filled[index]
        batch = COLLATE([row])
        logits = teacher(batch["input_ids"], None, batch["token_type_ids"], task=row["task"]).logits[0]
        torch.testing.assert_close(batch["teacher_logits"][0], logits, rtol=1e-5, atol=1e-6)
    assert column(filled, "sst2").std(0).min() > 1e-3


def test_columns_are_matched_by_label_name(data):
    teacher = make_teacher()
    swapped = copy.deepcopy(teacher)
    swapped.config.tasks["sst2"]["labels"] = ["positive", "negative"]
    logits, reordered = (
        column(add_teacher_logits(data, TeacherSignal(model, LABELS), COLLATE), "sst2") for model in (teacher, swapped)
    )
    assert torch.equal(reordered, logits.flip(1))


def test_a_teacher_for_every_task(data):
    teachers = {"sst2": make_teacher(1), "stsb": make_teacher(2)}
    filled = add_teacher_logits(data, TeacherSignal(teachers, LABELS), COLLATE)
    for task, teacher in teachers.items():
        alone = add_teacher_logits(data, TeacherSignal(teacher, LABELS), COLLATE)
        assert torch.equal(column(filled, task), column(alone, task))
    assert not torch.equal(column(filled, "stsb"), column(alone, "sst2")[:, :1])


def test_teacher_is_frozen_and_in_evaluation_mode():
    teacher = make_teacher().train()
    signal = TeacherSignal(teacher, LABELS)
    batch = {"input_ids": torch.tensor([[2, 4, 5, 3]]), "task": "sst2"}
    assert not teacher.training
    assert not signal(batch).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (make_teacher(sst2=("bad", "good")), r"sst2 are \['negative', 'positive'\], .* \['bad', 'good'\]"),
        ({"sst2": make_teacher()}, "no model for stsb; it has sst2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, message):
    with pytest.raises(ValueError, match=message):
        TeacherSignal(teacher, LABELS)
    with pytest.raises(ValueError, match="no head for rte; its tasks are sst2, stsb"):
        TeacherSignal(make_teacher(), {"rte": ["entailment", "not_entailment"]})


class Counting(TeacherSignal):
    """A signal that knows how often it was asked."""

    calls = 0

    def __call__(self, batch):
        self.calls += 1
        return super().__call__(batch)


def cached(data, cache_dir, teacher=None, **options):
    signal = Counting(teacher or make_teacher(), LABELS, **options)
    return add_teacher_logits(data, signal, COLLATE, cache_dir=cache_dir), signal.calls


def test_cache_is_used_when_everything_is_the_same(data, tmp_path):
    first, calls = cached(data, tmp_path)
    again, calls_again = cached(data, tmp_path)
    assert calls > 0
    assert calls_again == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sst2.safetensors", "stsb.safetensors"]
    for task in LABELS:
        assert torch.equal(column(first, task), column(again, task))


def test_cache_of_something_else_is_not_used(data, folder, tmp_path):
    other_teacher = make_teacher(seed=1)
    shorter = load_encoded(list(LABELS), tokenizer(), 5, folder)[0]
    subset = load_encoded(list(LABELS), tokenizer(), 16, folder, max_train_rows=5)[0]
    others = [(data, other_teacher, {}), (shorter, None, {}), (subset, None, {})]
    others.append((data, None, {"autocast": torch.bfloat16}))
    for rows, teacher, options in others:
        cached(data, tmp_path)
        fresh, _ = cached(rows, None, teacher, **options)
        filled, calls = cached(rows, tmp_path, teacher, **options)
        assert calls > 0
        for task in LABELS:
            assert torch.equal(column(filled, task), column(fresh, task))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) - 7], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_a_damaged_cache_is_computed_anew(data, tmp_path, damage, caplog):
    first, _ = cached(data, tmp_path)
    path = tmp_path / "sst2.safetensors"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again, calls = cached(data, tmp_path)
    assert calls > 0
    assert "is damaged" in caplog.text
    assert torch.equal(column(first, "sst2"), column(again, "sst2"))
    assert path.read_bytes() == whole


def test_an_interrupted_write_leaves_no_cache(data, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        cached(data, tmp_path)
    assert list(tmp_path.iterdir()) == []
