"""The compiled student against the torch model, and what it promises its users."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from subprocesses import ROOT, python

from fastkd import _runtime
from fastkd.runtime import load
from fastkd.runtime.quantize import quantize
from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.students.export import arrays_of, export_student, sizes_of

WORDS = 60
# Above what was measured on random students by a factor of three. Logits have a deviation of 0.02 to 0.05 here.
ERROR = {"float32": 1e-6, "bfloat16": 5e-4, "int8": 1e-2}
SIZES = {
    "odd": {"projection_size": 22, "hidden_size_per_direction": 19, "head_size": 33},
    "one lane": {"projection_size": 1, "hidden_size_per_direction": 1, "head_size": 1},
    "whole vectors": {"projection_size": 64, "hidden_size_per_direction": 32, "head_size": 64},
    "shared": {
        "projection_size": 20,
        "hidden_size_per_direction": 24,
        "head_size": 40,
        "share_integrator": True,
        "pooling": ["max", "min", "mean", "attention"],
    },
}


def make_student(**sizes):
    torch.manual_seed(0)
    tasks = {"a": {"labels": ["x", "y", "z"]}, "score": {"labels": []}}
    config = BiAttentiveLSTMConfig(vocab_size=WORDS, embedding_size=30, tasks=tasks, **sizes)
    return BiAttentiveLSTM(config).eval()


def make_model(student, precision, threads=1):
    pooling = list(student.config.pooling)
    tasks = {"a": 3, "score": 1}
    return _runtime.Model(arrays_of(student, precision), precision, sizes_of(student), pooling, tasks, threads)


def make_sentences(count, pairs, longest=40):
    pick = np.random.default_rng(count)
    lengths = pick.integers(1, longest, size=count * (2 if pairs else 1))
    lengths[: 2 if pairs else 1] = 1
    return [pick.integers(1, WORDS, size=n).astype(np.int32) for n in lengths]


def ask(model, sentences, pairs, task="a"):
    lengths = np.array([len(s) for s in sentences], np.int64)
    return model.logits(task, np.concatenate(sentences), lengths, pairs)


@torch.inference_mode()
def ask_torch(student, sentences, pairs, task="a"):
    step = 2 if pairs else 1
    rows = [sentences[i : i + step] for i in range(0, len(sentences), step)]
    width = max(sum(map(len, row)) for row in rows)
    ids, types, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        n = sum(map(len, row))
        ids[i, :n] = torch.from_numpy(np.concatenate(row)).long()
        types[i, len(row[0]) : n] = 1
        mask[i, :n] = 1
    return student(ids, mask, types, task=task).logits.numpy()


@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("sizes", SIZES)
def test_it_answers_as_the_torch_model_does(sizes, precision, pairs):
    student = make_student(**SIZES[sizes])
    model = make_model(student, precision)
    for count in (1, 2, 7, 70):
        sentences = make_sentences(count, pairs)
        for task in ("a", "score"):
            expected = ask_torch(student, sentences, pairs, task)
            np.testing.assert_allclose(ask(model, sentences, pairs, task), expected, rtol=0, atol=ERROR[precision])


@pytest.mark.parametrize("precision", ERROR)
def test_it_is_as_close_on_every_size(precision):
    for hidden in range(2, 66, 7):
        student = make_student(projection_size=hidden + 3, hidden_size_per_direction=hidden, head_size=66 - hidden)
        sentences = make_sentences(5, pairs=True, longest=9)
        expected = ask_torch(student, sentences, pairs=True)
        got = ask(make_model(student, precision), sentences, pairs=True)
        np.testing.assert_allclose(got, expected, rtol=0, atol=ERROR[precision], err_msg=f"hidden {hidden}")


@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("precision", ERROR)
def test_an_answer_does_not_depend_on_its_company_nor_on_threads(precision, pairs):
    student = make_student(**SIZES["odd"])
    model, step = make_model(student, precision), 2 if pairs else 1
    sentences = make_sentences(70, pairs)
    rows = [sentences[i : i + step] for i in range(0, len(sentences), step)]
    alone = np.concatenate([ask(model, row, pairs) for row in rows])
    np.testing.assert_array_equal(ask(model, sentences, pairs), alone)
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(ask(model, [s for i in order for s in rows[i]], pairs), alone[order])
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(ask(make_model(student, precision, threads), sentences, pairs), alone)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_it_answers_with_fewer_threads_where_the_system_gives_no_more():
    """Stacks so large that of seven threads only the first has room."""
    code = """
import os, resource
from test_runtime import *
student, sentences = make_student(**SIZES["odd"]), make_sentences(70, False)
expected = ask(make_model(student, "float32"), sentences, False)
before, pages = len(os.listdir("/proc/self/task")), int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 3 * 2**27, -1))
np.testing.assert_array_equal(ask(model := make_model(student, "float32", threads=8), sentences, False), expected)
assert len(os.listdir("/proc/self/task")) == before + 1
"""
    command = ["sh", "-c", f'ulimit -s {2**18} && exec "$@"', "sh", sys.executable, "-c", code]
    subprocess.run(command, check=True, timeout=300, cwd=ROOT / "tests", env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_a_large_call_leaves_little_memory_behind():
    """Run in a process of its own, whose memory is the call's."""
    script = (
        "import numpy as np\nfrom test_runtime import SIZES, make_model, make_student\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "model = make_model(make_student(**SIZES['odd']), 'float32')\n"
        "ask = lambda texts: model.logits('a', np.ones(20 * texts, np.int32), np.full(texts, 20), False)\n"
        "ask(1)\nbefore = resident()\nask(20_000)\n"
        "assert resident() - before < 200, resident() - before\n"
    )
    python("-c", script)


def test_int8_keeps_the_words_that_any_activation_would_keep():
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    values[2] = 0
    rows, scale = quantize(values)
    assert np.abs(rows * scale[:, None] - values).max() <= scale.max() / 2
    assert (np.abs(rows).max(1) == [127, 127, 0, 127, 127]).all()


@pytest.mark.parametrize("target", ["baseline", "avx2-no-vnni", "avx2", "avx512-no-vnni"])
def test_every_instruction_set_agrees(tmp_path, target):
    model = save_student(tmp_path / "model")
    for precision in ERROR:
        export_student(model, tmp_path / precision, precision=precision)
    script = (
        "import fastkd.runtime, fastkd._runtime, json\n"
        f"ask = lambda precision: fastkd.runtime.load(f'{tmp_path}/{{precision}}').logits({PAIRS}, task='a').tolist()\n"
        f"print(json.dumps([fastkd._runtime.cpu(), *map(ask, {list(ERROR)})]))"
    )
    cpu, *logits = json.loads(python("-c", script, FASTKD_CPU_TARGET=target))
    if cpu == _runtime.cpu():
        pytest.skip(f"this CPU has nothing above {target}")
    for precision, there in zip(ERROR, logits, strict=True):
        here = load(tmp_path / precision).logits(PAIRS, task="a")
        # int8 differs where the last bit of a hidden state decides how it rounds.
        np.testing.assert_allclose(there, here, rtol=0, atol=1e-3 if precision == "int8" else 1e-6)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="nothing here tells what the CPU can do")
def test_vnni_is_taken_where_the_cpu_has_it():
    script = "import fastkd._runtime; print(fastkd._runtime.cpu())"
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx2" not in flags:
        pytest.skip("this CPU has no AVX2")
    assert python("-c", script, FASTKD_CPU_TARGET="avx2") == ("AVX2 VNNI\n" if "avx_vnni" in flags else "AVX2\n")
    assert python("-c", script, FASTKD_CPU_TARGET="avx2-no-vnni") == "AVX2\n"


def test_sixteen_threads_may_ask_one_model():
    model = make_model(make_student(**SIZES["odd"]), "int8", threads=2)
    questions = [make_sentences(n, False) for n in range(1, 17)]
    expected = [ask(model, q, False) for q in questions]
    wrong = []

    def work(i):
        for _ in range(20):
            if not np.array_equal(ask(model, questions[i], False), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2])
def test_a_loaded_model_answers_in_forked_children(threads):
    model = make_model(make_student(**SIZES["odd"]), "int8", threads)
    question = make_sentences(9, False)
    expected = ask(model, question, False)
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if np.array_equal(ask(model, question, False), expected) else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8


def save_student(folder):
    torch.manual_seed(0)
    tasks = {"a": {"labels": ["bad", "good"]}, "score": {"labels": []}}
    config = BiAttentiveLSTMConfig(vocab_size=16, embedding_size=8, **SIZES["odd"], tasks=tasks)
    BiAttentiveLSTM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def exported(tmp_path):
    export_student(save_student(tmp_path / "model"), tmp_path / "student", precision="int8")
    return tmp_path / "student"


TEXTS = ["the good film", "", "a very bad plot", "great " * 300]
PAIRS = [("good", "the bad film"), ("", ""), ("awful", "very"), ("great " * 200, "bad " * 90)]


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
