"""A teacher's top k as columns of a dataset: what is kept, what comes back, and never another teacher's."""

import logging

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from fastkd.data import topk
from fastkd.data.topk import add_teacher_topk, collate_topk, topk_of
from fastkd.losses import kl_div, topk_kl_div

TEXTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11], [3]]


def make_teacher(seed=0, vocabulary=50):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=1.0, **sizes))


@pytest.fixture
def data():
    return Dataset.from_dict({"input_ids": TEXTS, "labels": [0, 1, 2, 3]})


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rounding_is_within_its_bound_and_keeps_the_mass(temperature):
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, 3:] = -float("inf")
    logits[1, 0] = 1e6
    exact = (logits.double() / temperature).log_softmax(-1)
    kept = topk_of(logits, 20, temperature=temperature)
    known = exact.gather(-1, kept.ids.long())
    assert torch.equal(known[2:], exact.topk(20).values[2:])
    back = kept.values.double() - kept.logsumexp[:, None].double()
    weights = known.exp() / known.exp().sum(-1, keepdim=True)
    typical = (weights * known.nan_to_num(neginf=0.0)).sum(-1, keepdim=True)
    bound = 2**-11 * (known.abs() + typical.abs()) * 1.001 + 1e-6
    exists = known > -60000
    assert (back - known).abs()[exists].le(bound[exists]).all()
    assert (kept.values[0, 3:] == -float("inf")).all()
    assert kept.values[1].isfinite().all()
    torch.testing.assert_close(back.exp().sum(-1), known.exp().sum(-1), rtol=0, atol=1e-6)


def test_loss_from_the_columns_is_that_of_the_logits():
    student, teacher = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(1)) * 3
    kept = topk_of(teacher, 40, temperature=2.0)
    got = topk_kl_div(
        student, kept.ids, kept.values, teacher_logsumexp=kept.logsumexp, temperature=2.0, teacher_temperature=2.0
    )
    torch.testing.assert_close(got, kl_div(student, teacher, temperature=2.0), rtol=2e-3, atol=1e-3)


def test_columns_hold_what_the_teacher_says_of_each_position(data):
    teacher = make_teacher()
    filled = add_teacher_topk(data, teacher, 6, temperature=2.0, batch_size=3)
    assert filled["labels"][:] == [0, 1, 2, 3]
    assert str(filled.features["teacher_ids"].feature.feature.dtype) == "uint16"
    for row in filled:
        with torch.no_grad():
            wanted = topk_of(teacher(torch.tensor([row["input_ids"]])).logits[0], 6, temperature=2.0)
        assert torch.equal(torch.tensor(row["teacher_ids"]), wanted.ids.long())
        torch.testing.assert_close(torch.tensor(row["teacher_values"]), wanted.values.float(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(torch.tensor(row["teacher_logsumexp"]), wanted.logsumexp, rtol=0, atol=2e-3)


def test_a_large_vocabulary_takes_wider_ids(data):
    filled = add_teacher_topk(data, make_teacher(vocabulary=70_000), 200)
    assert str(filled.features["teacher_ids"].feature.feature.dtype) == "int32"
    assert max(max(map(max, row)) for row in filled["teacher_ids"]) > 2**16


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", [None, "numpy"])
def test_collated_rows_are_arguments_of_the_loss(data, left, kind):
    filled = add_teacher_topk(data, make_teacher(), 6).with_format(kind)
    batch = collate_topk([filled[index] for index in range(4)], 7, left=left)
    assert {name: (x.dtype, x.shape[:2]) for name, x in batch.items()} == {
        "teacher_ids": (torch.int32, (4, 7)),
        "teacher_values": (torch.float16, (4, 7)),
        "teacher_logsumexp": (torch.float32, (4, 7)),
    }
    mask = (batch["teacher_ids"] >= 0).all(-1)
    assert mask.sum(1).tolist() == [len(text) for text in TEXTS]
    assert mask[1].tolist() == ([False] * 5 + [True] * 2 if left else [True] * 2 + [False] * 5)
    whole = topk_kl_div(torch.zeros(4, 7, 50), **batch, mask=mask, reduction="sum")
    rows = [collate_topk([filled[index]], len(TEXTS[index])) for index in range(4)]
    parts = [
        topk_kl_div(torch.zeros(1, len(text), 50), **row, reduction="sum")
        for text, row in zip(TEXTS, rows, strict=True)
    ]
    torch.testing.assert_close(whole, sum(parts))
    with pytest.raises(ValueError, match="width must be at least 5, the length of a row, got 4"):
        collate_topk([filled[2]], 4)


def cached(data, folder, monkeypatch, teacher=None, **options):
    """The filled dataset, and how many batches the teacher saw."""
    calls = []
    monkeypatch.setattr(topk, "topk_of", lambda *a, **o: calls.append(1) or topk_of(*a, **o))
    options = {"k": 4, **options}
    return add_teacher_topk(data, teacher or make_teacher(), cache_dir=folder, **options), len(calls)


def test_cache_is_used_when_everything_is_the_same(data, tmp_path, monkeypatch):
    first, calls = cached(data, tmp_path, monkeypatch)
    again, calls_again = cached(data.remove_columns("labels").add_column("labels", [9] * 4), tmp_path, monkeypatch)
    assert (calls, calls_again) == (4, 0)
    assert again["labels"][:] == [9] * 4
    for name in topk.COLUMNS:
        assert first[name][:] == again[name][:]


def test_cache_of_something_else_is_not_used(data, tmp_path, monkeypatch):
    cached(data, tmp_path, monkeypatch)
    others = [{"teacher": make_teacher(1)}, {"k": 5}, {"temperature": 2.0}, {"autocast": torch.bfloat16}]
    for change in others:
        assert cached(data, tmp_path, monkeypatch, **change)[1] == 4, change
    assert cached(data.select([0, 1, 3]), tmp_path, monkeypatch)[1] == 3
    assert cached(data.select([1, 0, 2, 3]), tmp_path, monkeypatch)[0]["teacher_ids"][:] != data["input_ids"]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) - 7], lambda b: b"", lambda b: b[:-400] + b"\xff" + b[-399:]])
def test_a_damaged_cache_is_computed_anew(data, tmp_path, monkeypatch, caplog, damage):
    first, _ = cached(data, tmp_path, monkeypatch)
    wanted = first["teacher_values"][:]
    (path,) = tmp_path.glob("*.arrow")
    del first
    whole = path.read_bytes()
    path.unlink()  # datasets still maps the old file into memory
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        again, calls = cached(data, tmp_path, monkeypatch)
    assert calls == 4
    assert "is damaged" in caplog.text
    assert again["teacher_values"][:] == wanted


def test_a_cache_that_is_used_is_read_once_and_written_no_more(data, tmp_path, monkeypatch):
    cached(data, tmp_path, monkeypatch)
    (digest,) = tmp_path.glob("*.sha256")
    digest.chmod(0o444)
    before, read = digest.stat().st_mtime_ns, topk._digest
    hashed = []
    monkeypatch.setattr(topk, "_digest", lambda path: hashed.append(path) or read(path))
    assert cached(data, tmp_path, monkeypatch)[1] == 0
    assert len(hashed) == 1
    assert digest.stat().st_mtime_ns == before
    digest.unlink()  # as where a process was killed before it wrote it
    assert cached(data, tmp_path, monkeypatch)[1] == 0
    assert digest.exists()


def test_bad_input_is_named(data):
    with pytest.raises(ValueError, match="k must be from 1 to 50, the size of the vocabulary, got 51"):
        add_teacher_topk(data, make_teacher(), 51)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
            add_teacher_topk(data, make_teacher(), 4, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be positive"):
        topk_of(torch.zeros(3, 9), 2, temperature=0.0)
    with pytest.raises(ValueError, match="k must be from 1 to 9"):
        topk_of(torch.zeros(3, 9), 0)
    with pytest.raises(ValueError, match="dataset has a column of teacher_ids"):
        add_teacher_topk(data.add_column("teacher_ids", [0] * 4), make_teacher(), 4)
    with pytest.raises(ValueError, match=r"teacher has no config.vocab_size"):
        add_teacher_topk(data, torch.nn.Linear(2, 2), 4)
