"""The compiled student from its files: what it answers to texts, and what is refused."""

import json

import numpy as np
import pytest
import tiny
from runtime_samples import PAIRS, SIZES, TEXTS, WORDS, make_model, make_student, save_student
from subprocesses import python

from fastkd.runtime import load
from fastkd.students.export import export_student


@pytest.fixture
def exported(tmp_path):
    export_student(save_student(tmp_path / "model"), tmp_path / "student", precision="int8")
    return tmp_path / "student"


@pytest.mark.parametrize("token_types", [True, False])
@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["single", "pairs"])
def test_export_and_load_answer_as_the_model_does(tmp_path, texts, token_types):
    folder = save_student(tmp_path / "model")
    tiny.tokenizer(token_types).save_pretrained(folder)
    for agreement in export_student(folder, tmp_path / "out", precision="float32", texts=texts, max_length=40):
        assert agreement.texts == agreement.same_label == 4
        assert agreement.largest_difference < 1e-6
    student = load(tmp_path / "out")
    answers = student.predict(texts, task="a")
    assert [a.truncated for a in answers] == [False, False, False, True]
    assert all(a.score == max(a.probabilities.values()) and a.label in ("bad", "good") for a in answers)
    value = student.predict(texts[:1], task="score")[0]
    assert value.label is None
    assert value.score == student.logits(texts[:1], task="score")[0, 0]


def test_what_cannot_be_asked_is_refused(exported):
    with pytest.raises(TypeError, match="threads must be an int, got str"):
        load(exported, threads="2")
    student = load(exported)
    with pytest.raises(TypeError, match="list of texts"):
        student.predict("the good film", task="a")
    with pytest.raises(TypeError, match="text 0 and text 1 differ"):
        student.predict(["good", ("good", "bad")], task="a")
    with pytest.raises(TypeError, match="text 1 must be a str or a pair"):
        student.predict([("good", "bad"), ("good",)], task="a")
    with pytest.raises(ValueError, match="task must be one of a, score, got None"):
        student.predict(["good"])
    assert student.predict([], task="a") == []
    model = make_model(make_student(**SIZES["odd"]), "int8")
    for ids, lengths, pairs, message in (
        ([WORDS], [1], False, "ids must be from 0 to 59, got 60"),
        ([-1], [1], False, "ids must be"),
        ([1, 2], [1], False, "lengths add up to 1"),
        ([1], [0, 1], False, "lengths must be from 1"),
        ([1], [1], True, "even number"),
    ):
        with pytest.raises(ValueError, match=message):
            model.logits("a", np.array(ids, np.int32), np.array(lengths, np.int64), pairs)
    with pytest.raises(ValueError, match="no task b"):
        model.logits("b", np.array([1], np.int32), np.array([1], np.int64), False)


def rewrite(folder, **changes):
    path = folder / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2, and this fastkd reads 1"),
        ({"format": "else"}, "does not describe a student"),
        ({"precision": "int4"}, "precision must be"),
        ({"precision": "float32"}, "must be float32"),
        ({"sizes": {}}, "does not describe a student"),
        ({"sizes": {"words": 16, "projection": 22, "hidden": 18, "sides": 2, "head": 33}}, "must be int8 of shape"),
        ({"pooling": ["median"]}, "pooling must name"),
        ({"tasks": {"b": []}}, "no tensor heads.b"),
        ({"tasks": {"a": "bad"}}, "must list the names"),
        ({"max_length": "long"}, "max_length must be int"),
    ],
)
def test_a_wrong_description_is_refused(exported, changes, message):
    rewrite(exported, **changes)
    with pytest.raises(ValueError, match=message):
        load(exported)


def test_sizes_are_refused_before_memory_of_them_is_taken(tmp_path):
    export_student(save_student(tmp_path / "model"), tmp_path / "student", precision="float32")
    sizes = json.loads((tmp_path / "student" / "student.json").read_text())["sizes"]
    rewrite(tmp_path / "student", sizes=sizes | {"words": 2**24, "projection": 2**24})
    with pytest.raises(ValueError, match="words must be float32 of shape"):
        load(tmp_path / "student")


def test_damaged_files_are_refused(exported):
    weights = exported / "student.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole + b"x", b"", whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load(exported)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no student\.safetensors"):
        load(exported)
    with pytest.raises(FileNotFoundError, match=r"no student\.json"):
        load(exported / "nowhere")


def test_the_runtime_leaves_torch_alone(exported):
    script = (
        "import sys\nimport fastkd.runtime as r\n"
        f"answer = r.load({str(exported)!r}).predict(['the good film'], task='a')\n"
        "assert answer[0].label in ('bad', 'good')\n"
        "loaded = [m for m in ('torch', 'transformers', 'datasets', 'scipy') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    python("-c", script)
