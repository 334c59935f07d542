"""``fastkd export --format onnx``: what ONNX Runtime makes of the model is what torch does."""

import json
import sys

import numpy as np
import pytest
import tiny
from runtime_samples import PAIRS, SIZES, TEXTS, WORDS, ask_torch, make_sentences, make_student, save_student

from fastkd.cli import main
from fastkd.runtime import load

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'fastkd[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'fastkd[onnx]'")

from fastkd.students.onnx_export import OnnxModel, export_onnx
from fastkd.students.onnx_graph import build_model

ERROR = 1e-6
"""As of the runtime in float32."""


@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_answers_as_the_torch_model_does(tmp_path, sizes, pairs):
    student = make_student(**SIZES[sizes])
    (tmp_path / "student.onnx").write_bytes(build_model(student, pairs=pairs).SerializeToString())
    model = OnnxModel(tmp_path / "student.onnx", threads=1)
    for count in (1, 7):
        sentences = make_sentences(count, pairs)
        lengths = np.array([len(s) for s in sentences])
        for task, outputs in (("a", 3), ("score", 1)):
            got = model.logits(task, np.concatenate(sentences), lengths, pairs)
            assert got.shape == (count, outputs)
            np.testing.assert_allclose(got, ask_torch(student, sentences, pairs, task), rtol=0, atol=ERROR)


def test_what_stands_beyond_a_text_is_not_read(tmp_path):
    (tmp_path / "student.onnx").write_bytes(build_model(make_student(**SIZES["shared"])).SerializeToString())
    session = OnnxModel(tmp_path / "student.onnx", threads=1).session
    ids, lengths = np.array([[5, 6, 7, 8], [9, 10, 0, 0]]), np.array([4, 2])
    expected = session.run(["logits.a"], {"ids": ids, "lengths": lengths})[0]
    ids[1, 2:] = WORDS - 1
    np.testing.assert_array_equal(session.run(["logits.a"], {"ids": ids, "lengths": lengths})[0], expected)


@pytest.mark.parametrize("token_types", [True, False])
@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["single", "pairs"])
def test_the_export_agrees_with_the_model(tmp_path, texts, token_types):
    folder = save_student(tmp_path / "model")
    tiny.tokenizer(token_types).save_pretrained(folder)
    pairs = texts is PAIRS
    for agreement in export_onnx(folder, tmp_path / "out", pairs=pairs, texts=texts, max_length=40):
        assert agreement.texts == agreement.same_label == 4
        assert agreement.largest_difference < ERROR


@pytest.mark.parametrize("options", [[], ["--pairs"]])
def test_the_command_writes_a_folder_of_three_files(tmp_path, capsys, options):
    save_student(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--format", "onnx", "--output", str(tmp_path / "out"), *options]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "onnx, float32" in printed
    assert f"a: same label on {6 if options else 12} of" in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "student.json",
        "student.onnx",
        "tokenizer.json",
    ]
    description = json.loads((tmp_path / "out" / "student.json").read_text())
    session = OnnxModel(tmp_path / "out" / "student.onnx", threads=1).session
    assert description["inputs"] == [given.name for given in session.get_inputs()]
    assert description["outputs"] == {"a": "logits.a", "score": "logits.score"}
    assert description["tasks"] == {"a": ["bad", "good"], "score": []}
    with pytest.raises(ValueError, match="its format is not 'fastkd-student'"):
        load(tmp_path / "out")


def test_options_that_do_not_fit_are_refused(tmp_path, capsys):
    model, out = str(save_student(tmp_path / "model")), str(tmp_path / "out")
    (tmp_path / "texts").write_text("good\tfilm\n")
    for options, message in (
        (["--format", "onnx", "--precision", "int8"], "--precision of --format onnx must be float32, got int8"),
        (["--format", "onnx", "--check", str(tmp_path / "texts")], "holds pairs; see --pairs"),
        (["--pairs"], "--pairs is for --format onnx"),
    ):
        assert main(["export", model, "--output", out, *options]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    command = ["export", str(save_student(tmp_path / "model")), "--format", "onnx", "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "pip install 'fastkd[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch):
    folder = save_student(tmp_path / "model")
    ask = OnnxModel.logits
    monkeypatch.setattr(OnnxModel, "logits", lambda *question: ask(*question) + np.float32(2e-3))
    with pytest.raises(RuntimeError, match=r"differ from the model's by 0\.002"):
        export_onnx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_integrator_reads_a_single_text_once():
    count = lambda sizes, pairs: sum(  # noqa: E731
        node.op_type == "LSTM" for node in build_model(make_student(**SIZES[sizes]), pairs=pairs).graph.node
    )
    assert [count("shared", False), count("shared", True), count("odd", False), count("odd", True)] == [2, 4, 3, 4]
