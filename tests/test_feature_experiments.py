"""MaKD's experiments on readers and decoders: tables, resumption, and refusal to mix what other data gave."""

import pytest
from decoder_samples import write_lines
from squad_samples import learnable
from squad_samples import write as write_squad
from test_experiments import folder  # noqa: F401

from experiments import decoder, makd, reader
from experiments.__main__ import main
from experiments.scores import read
from fastkd.data.batches import sample_batches
from fastkd.methods.baselines import KD, PKD, DistilBERT, MiniLM, MiniLMv2, TinyBERT
from fastkd.methods.makd import LEVELS, MaKDObjective

PARTS = {part for parts in LEVELS.values() for part in parts}
LEFT_OUT = {
    "MaKD": set(),
    "low-rank fine-tuned": PARTS - {"labels"},
    "MaKD without attention": {"attention"},
    "MaKD without hidden states": {"hidden"},
    "MaKD without matrices": {"mha", "ffn"},
    "MaKD without logits": {"logits"},
}
OTHERS = {"DistilBERT": DistilBERT, "PKD": PKD, "TinyBERT": TinyBERT, "MiniLM": MiniLM, "MiniLMv2": MiniLMv2}


@pytest.mark.parametrize("row", makd.ROWS)
def test_a_row_learns_what_its_name_says(row, tmp_path):
    objective = reader.objective_of(makd.ROWS[row], reader.arguments(tmp_path, use_cpu=True)).at(0.0)
    name = row.removesuffix(" calibrated")
    assert makd.student_of(makd.ROWS[row], 10**6, 2).calibration_rows == (0 if name == row else 512)
    if name in OTHERS:
        assert type(objective) is OTHERS[name]
    else:
        assert {part for part, weight in objective.weights.items() if weight == 0.0} == LEFT_OUT[name]


def spied(trainer, calls):
    """The trainer, each of whose objectives and training rows join ``calls``."""

    class Spy(trainer):
        def __init__(self, student, args, collate, train, *rest, **options):
            calls.append((options["objective"], [row["input_ids"] for row in train]))
            super().__init__(student, args, collate, train, *rest, **options)

    return Spy


def test_a_reader(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    calls = []
    monkeypatch.setattr(reader, "SpanDistillationTrainer", spied(reader.SpanDistillationTrainer, calls))
    monkeypatch.setattr(reader, "SIZES", {"max_length": 10, "doc_stride": 2, "max_question_length": 2})
    write_squad(tmp_path / "squad" / "train.json", *learnable())
    write_squad(tmp_path / "squad" / "dev.json", *learnable())
    places = [
        "--model",
        str(folder / "encoder"),
        "--data-dir",
        str(tmp_path / "squad"),
        "--output",
        str(tmp_path / "runs"),
    ]
    options = ["--epochs", "1", "--jobs", "1", "--seeds", "1", "--learning-rates", "1e-3", "--held-out", "1"]
    rows, drawn = ["low-rank fine-tuned", "TinyBERT", "MaKD", "MaKD calibrated"], []

    def sample(rows, collate, count):
        drawn.append(count)
        return sample_batches(rows, collate, count)

    monkeypatch.setattr(reader, "sample_batches", sample)
    command = ["makd-squad", *places, *options, "--ratio", "0.7", "--layers", "1", "--rows", ",".join(rows)]
    assert main(command) == 0
    scores = read(tmp_path / "runs" / "70" / "scores.csv")
    assert [(s.row, s.column) for s in scores] == [
        (row, c) for row in ("teacher", *rows) for c in ("exact match", "F1")
    ]
    sizes = {score.row: score.parameters for score in scores}
    assert all(0 < sizes[row] <= 0.7 * sizes["teacher"] for row in rows)
    assert drawn == [512]
    args = reader.arguments(tmp_path, use_cpu=True)
    assert [objective for objective, _ in calls] == [reader.objective_of(reader.ROWS[row], args) for row in rows]
    finished = sorted((tmp_path / "runs").rglob("result.json"))
    times = [path.stat().st_mtime for path in finished]
    assert len(finished) == 1 + len(rows)
    assert main(command) == 0
    assert [path.stat().st_mtime for path in finished] == times
    assert main([*command, "--max-train-rows", "5"]) == 1
    assert "other settings (max_train_rows 20000 there, 5 here)" in capsys.readouterr().err


def test_a_decoder(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        decoder, "LanguageModelDistillationTrainer", spied(decoder.LanguageModelDistillationTrainer, calls)
    )
    monkeypatch.setattr(
        decoder, "SIZES", {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": 300}
    )
    monkeypatch.setattr(decoder, "LENGTHS", {"max_length": 128, "max_prompt_length": 110})
    text = tmp_path / "text.txt"
    text.write_text("Below is an instruction that describes a task. Write a response. " * 200)
    rows = [{"instruction": "say it", "output": f"it is {word}"} for word in ("a", "b", "c", "d")]
    train, test = (write_lines(tmp_path / f"{name}.jsonl", *rows) for name in ("train", "test"))
    places = [
        "--texts",
        str(text),
        "--train",
        str(train),
        "--test",
        f"held-out={test}",
        "--output",
        str(tmp_path / "runs"),
    ]
    options = [
        "--epochs",
        "4",
        "--jobs",
        "1",
        "--seeds",
        "1,2",
        "--learning-rates",
        "1e-6,1e-3",
        "--ratio",
        "0.7",
    ]
    assert main(["makd-decoder", *places, *options, "--new-tokens", "8", "--samples", "1"]) == 0
    scores = read(tmp_path / "runs" / "70" / "scores.csv")
    names = ["teacher", "low-rank fine-tuned", "KD", "SeqKD", "MaKD"]
    assert list(dict.fromkeys(score.row for score in scores)) == names
    sizes = {score.row: score.parameters for score in scores}
    assert len({sizes[name] for name in names[1:]}) == 1
    assert sizes["MaKD"] <= 0.7 * sizes["teacher"]
    assert {score.learning_rate for score in scores if score.row != "teacher"} == {1e-3}  # by ROUGE-L the other
    perplexities, verdicts, _ = (tmp_path / "runs" / "70" / "perplexity.md").read_text().split("\n\n")
    assert [line.split("|")[1].strip() for line in perplexities.splitlines()[2:]] == names
    assert [line.split("|")[1].strip().split(" at ")[0] for line in verdicts.splitlines()[2:]] == [
        f"MaKD beats {name}" for name in names[1:4]
    ]
    learned = dict(zip(names[1:], calls[::4], strict=True))  # two rates, then two seeds
    labels = KD(alpha=0.0)
    assert [objective for objective, _ in learned.values()] == [labels, KD(temperature=1.0), labels, MaKDObjective()]
    assert learned["KD"][1] == learned["MaKD"][1] == learned["low-rank fine-tuned"][1] != learned["SeqKD"][1]
    assert main(["makd-decoder", *places, *options, "--new-tokens", "4", "--samples", "1"]) == 1
    assert "other settings (new_tokens 8 there, 4 here)" in capsys.readouterr().err
    assert main(["makd-decoder", *places, "--test", str(test), *options]) == 1
    assert "it must be name=FILE, as held-out=heldout.jsonl" in capsys.readouterr().err
    silent = write_lines(tmp_path / "silent.jsonl", {"text": "what?"})
    assert main(["makd-decoder", *places, "--test", f"vicuna={silent}", *options]) == 1
    assert f"vicuna={silent}, none of whose instructions has a reference" in capsys.readouterr().err
