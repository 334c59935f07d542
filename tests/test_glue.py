"""Loading GLUE: official layouts, names of files and labels, and every kind of damaged input."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fastkd.data.glue import GLUE, load_task

OFFICIAL = {
    "cola": ("CoLA", 'gj04\t0\t*\tThey drank the pub.\ngj04\t1\t\tThe "more" we study.\n'),
    "sst2": ("SST-2", "sentence\tlabel\nno wit , only labored gags \t0\nvery good\t1\n"),
    "mrpc": (
        "MRPC",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t10\t11\tHe said "yes.\tYes, he said.\n0\t1\t2\ta\tb\n',
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tM\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000\n1\tm\tM\t2012\t2\tn\tn\tc\td\t3.8\n",
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\tWhy?\tHow?\t0\n8\t3\t4\te\tf\t1\n",
    ),
    "mnli": (
        "MNLI",
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\tfic\tp\th\tneutral\tcontradiction\n1\tfic\tq\ti\tneutral\tentailment\n",
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tThey.\tnot_entailment\n1\tg\th\tentailment\n",
    ),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n"),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n"),
}
FIRST_ROW = {
    "cola": ("They drank the pub.", "unacceptable"),
    "sst2": ("no wit , only labored gags ", "negative"),
    "mrpc": ('He said "yes.', "Yes, he said.", "equivalent"),
    "stsb": ("A plane.", "An air plane.", 5.0),
    "qqp": ("Why?", "How?", "not_duplicate"),
    "mnli": ("p", "h", "contradiction"),
    "qnli": ("Who?", "They.", "not_entailment"),
    "rte": ("a", "b", "not_entailment"),
    "wnli": ("a", "b", "entailment"),
}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_task(data_dir, name, suffix=".tsv"):
    folder, text = OFFICIAL[name]
    dev = "dev_matched" if name == "mnli" else "dev"
    for stem in ("train", dev):
        write(data_dir / folder / f"{stem}{suffix}", text)
    return data_dir / folder


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
@pytest.mark.parametrize("name", GLUE)
def test_official_layouts(tmp_path, name, suffix):
    write_task(tmp_path, name, suffix)
    splits = load_task(name, tmp_path)
    assert set(splits) == {"train", "validation_matched" if name == "mnli" else "validation"}
    for rows in splits.values():
        assert rows["row"][:] == [0, 1]
        label = rows[0]["label"] if GLUE[name].is_regression else rows.features["label"].int2str(rows[0]["label"])
        assert (*(rows[0][column] for column in GLUE[name].columns), label) == FIRST_ROW[name]


def test_jsonl_and_both_mnli_sets(tmp_path):
    folder = write_task(tmp_path, "mnli")
    rows = [{"premise": "tab\there", "hypothesis": "line\u2028separator", "label": "neutral"}]
    write(folder / "dev_mismatched.jsonl.gz", "".join(json.dumps(row) + "\n" for row in rows))
    mismatched = load_task("mnli", tmp_path)["validation_mismatched"]
    assert mismatched[0] == {
        "premise": "tab\there",
        "hypothesis": "line\u2028separator",
        "label": 1,
        "row": 0,
    }


def test_snli_leaves_out_rows_without_gold_label(tmp_path):
    text = "gold_label\tsentence1\tsentence2\n-\ta\tb\nneutral\tc\td\n"
    for split in ("train", "dev"):
        write(tmp_path / "SNLI" / f"{split}.tsv", text)
    assert load_task("snli", tmp_path)["train"][:] == {
        "premise": ["c"],
        "hypothesis": ["d"],
        "label": [1],
        "row": [0],
    }


def test_only_newlines_end_a_line(tmp_path):
    folder = write_task(tmp_path, "sst2")
    write(folder / "dev.tsv", "sentence\tlabel\r\n one\u2028still \rone\x0b\x85\t1\r\n\r\n")
    assert load_task("sst2", tmp_path)["validation"][:] == {
        "sentence": [" one\u2028still \rone\x0b\x85"],
        "label": [1],
        "row": [0],
    }


def test_similar_name_is_taken_only_when_it_is_the_only_one(tmp_path):
    folder = write_task(tmp_path, "sst2")
    (folder / "train.tsv").rename(folder / "train_sample.tsv")
    assert len(load_task("sst2", tmp_path)["train"]) == 2
    write(folder / "train_other.tsv", "sentence\tlabel\nx\t1\n")
    with pytest.raises(ValueError, match=r"several files for train: train_other.tsv, train_sample.tsv"):
        load_task("sst2", tmp_path)
    write(folder / "train.tsv", "sentence\tlabel\nexact\t1\n")
    assert load_task("sst2", tmp_path)["train"]["sentence"][:] == ["exact"]


def test_subset_is_seeded_and_keeps_row_numbers(tmp_path):
    folder = write_task(tmp_path, "sst2")
    write(folder / "train.tsv", "sentence\tlabel\n" + "".join(f"s{i}\t{i % 2}\n" for i in range(50)))
    draw = [load_task("sst2", tmp_path, max_train_rows=10, seed=seed)["train"] for seed in (1, 1, 2)]
    assert draw[0]["row"][:] == draw[1]["row"][:]
    assert set(draw[0]["row"][:]) != set(draw[2]["row"][:])
    assert draw[0]["sentence"][:] == [f"s{row}" for row in draw[0]["row"][:]]
    assert len(set(draw[0]["row"][:])) == 10
    with pytest.raises(ValueError, match="max_train_rows is 0"):
        load_task("sst2", tmp_path, max_train_rows=0)


def test_unknown_task_lists_all():
    with pytest.raises(ValueError, match=r"sst-2.*cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, snli"):
        load_task("sst-2")


def test_missing_folder_and_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="SST-2"):
        load_task("sst2", tmp_path)
    folder = write_task(tmp_path, "sst2")
    (folder / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file dev\*"):
        load_task("sst2", tmp_path)


def test_the_broken_lines_of_qqp_are_left_out(tmp_path, caplog):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    folder = write_task(tmp_path, "qqp")
    (folder / "train.tsv").write_text(head + "0\t1\t2\ta\tb\t0\n1\t3\t4\tc\n5\t6\n2\t7\t8\td\te\t1\n")
    train = load_task("qqp", tmp_path)["train"]
    assert train["question1"][:] == ["a", "d"]
    assert "train.tsv: 2 lines that have not 6 fields are left out" in caplog.text
    (folder / "train.tsv").write_text(head + "0\t1\t2\ta\tb\t0\n1\t3\t4\tc\n")
    with pytest.raises(ValueError, match=r"train.tsv, line 3: 4 tab-separated fields .* may be truncated"):
        load_task("qqp", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "sst2",
            "sentence\tlabel\ngood\t1\nbad\n",
            r"train.tsv, line 3: 1 tab-separated fields instead of 2",
        ),
        (
            "sst2",
            "sentence\tlabel\ngood\t1\nbad\t2\n",
            r"train.tsv, line 3: unknown label '2'.* negative, positive",
        ),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", r"line 2: unknown label '1'"),
        (
            "rte",
            "index\tsentence1\tlabel\n0\ta\tentailment\n",
            r"no column 'sentence2'; the columns are index",
        ),
        ("stsb", OFFICIAL["stsb"][1].replace("3.8", "nan"), r"line 3: score 'nan' is not a finite number"),
        ("sst2", "sentence\tlabel\n", "has no rows"),
        ("sst2", "", "the columns are none"),
    ],
)
def test_bad_tables_name_file_and_line(tmp_path, name, text, message):
    folder = write_task(tmp_path, name)
    write(folder / "train.tsv", text)
    with pytest.raises(ValueError, match=message):
        load_task(name, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sentence": "a", "label": 1}\n{"sentence": "b", "la', r"line 2: not JSON"),
        ('{"sentence": "a"}\n', r"line 1: no column 'label'"),
        ('{"sentence": null, "label": 1}\n', r"line 1: every field must be text or a number"),
        ("[1]\n", r"line 1: a JSON object is needed, not list"),
    ],
)
def test_bad_json_lines(tmp_path, text, message):
    folder = write_task(tmp_path, "sst2")
    (folder / "train.tsv").unlink()
    write(folder / "train.jsonl", text)
    with pytest.raises(ValueError, match=message):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"not gzip", lambda data: data[:20] + b"\0" + data[21:]]
)
def test_damaged_gzip(tmp_path, damage):
    folder = write_task(tmp_path, "cola", ".tsv.gz")
    path = folder / "train.tsv.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train.tsv.gz is damaged or truncated"):
        load_task("cola", tmp_path)


def hub_split(names):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=names), "idx": Value("int32")})
    return Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1], "idx": [5, 6]}, features=features)


def test_hub_labels_are_mapped_by_name(monkeypatch):
    split = hub_split(["positive", "negative"])
    hub = DatasetDict({"train": split, "validation": split, "test": split})
    monkeypatch.setattr("datasets.load_dataset", lambda *args: hub)
    splits = load_task("sst2")
    assert set(splits) == {"train", "validation"}
    assert splits["train"][:] == {"sentence": ["a", "b"], "label": [1, 0], "row": [0, 1]}


def test_hub_rows_without_label_are_left_out(monkeypatch):
    features = Features(
        premise=Value("string"),
        hypothesis=Value("string"),
        label=ClassLabel(names=["entailment", "neutral", "contradiction"]),
    )
    rows = {"premise": ["a", "c"], "hypothesis": ["b", "d"], "label": [-1, 2]}
    split = Dataset.from_dict(rows, features=features)
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args: asked.append(args) or DatasetDict({"train": split}))
    assert load_task("snli")["train"][:] == {"premise": ["c"], "hypothesis": ["d"], "label": [2], "row": [0]}
    assert asked == [("stanfordnlp/snli",)]


def test_hub_out_of_reach(monkeypatch):
    def unreachable(*args):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue'")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="nyu-mll/glue'; without the Hub, name a folder of files as data_dir"):
        load_task("sst2")


def test_hub_with_other_labels_is_refused(monkeypatch):
    split = hub_split(["0", "1"])
    monkeypatch.setattr("datasets.load_dataset", lambda *args: DatasetDict({"train": split}))
    with pytest.raises(ValueError, match=r"labels of sst2 are \['0', '1'\]; expected \['negative', 'positive'\]"):
        load_task("sst2")
