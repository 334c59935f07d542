"""Tasks of one's own: what tables may look like, what they mean, and what is refused with file and line."""

import csv
import gzip
import logging
from collections import Counter

import pytest
from tiny import tokenizer

from fastkd.data.encode import load_encoded
from fastkd.data.glue import load_task, task_of
from fastkd.data.metrics import main_score, task_metrics

REVIEWS = 'text,label\n"a good, long ""film""",good\nbad,bad\nfine,good\n'


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        stem, _, suffix = name.partition("_")
        data = text.encode()
        path = folder / f"{stem}.{suffix.replace('_', '.')}"
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return folder.parent


def test_single_texts_and_their_classes(tmp_path):
    data = write(tmp_path / "reviews", train_csv=REVIEWS, dev_csv='label,text\nbad,"two\nlines"\n')
    splits = load_task("reviews", data)
    assert splits["train"]["text"][:] == ['a good, long "film"', "bad", "fine"]
    assert splits["train"]["label"][:] == [1, 0, 1]
    assert splits["train"]["row"][:] == [0, 1, 2]
    assert splits["validation"][:] == {"text": ["two\nlines"], "label": [0], "row": [0]}
    task = task_of("reviews", splits["validation"].features)
    assert (task.columns, task.label_names, task.metrics) == (("text",), ("bad", "good"), ("accuracy",))


def test_pairs_in_a_packed_tsv_where_quotes_mean_nothing(tmp_path):
    text = '\ufeffquery\tlabel\tanswer\r\nsay "hi\t2\thi"\r\n\r\nwhy\t10\tso\r\n'
    splits = load_task("faq", write(tmp_path / "faq", train_tsv_gz=text, dev_tsv=text))
    assert splits["train"]["query"][:] == ['say "hi', "why"]
    task = task_of("faq", splits["train"].features)
    assert (task.columns, task.label_names) == (("query", "answer"), ("10", "2"))
    assert splits["validation"]["label"][:] == [1, 0]


def test_a_text_of_any_length_is_read(tmp_path):
    long = "word " * 40_000
    limit = csv.field_size_limit()
    for name in ("train_csv", "train_tsv"):
        separator = "," if name.endswith("csv") else "\t"
        rows = "".join(f"{long}{i}{separator}{'xy'[i % 2]}\n" for i in range(4))
        data = write(tmp_path / name / "own", **{name: f"text{separator}label\n{rows}"})
        assert max(map(len, load_task("own", data)["train"]["text"][:])) > len(long)
    assert csv.field_size_limit() == limit


def test_a_label_with_a_fraction_makes_a_regression(tmp_path):
    text = "a,b,label\nx,y,1\nu,v,2.5\ns,t,-3e0\n"
    splits = load_task("alike", write(tmp_path / "alike", train_csv=text, dev_csv=text))
    assert splits["train"]["label"][:] == [1.0, 2.5, -3.0]
    task = task_of("alike", splits["train"].features)
    assert task.is_regression
    assert main_score(task, task_metrics(task, [1, 3, 2], [1.0, 3.0, 2.0])) == pytest.approx(100)


@pytest.mark.parametrize("labels", [["a"] * 30 + ["b"] * 9 + ["c"], [f"{i}.5" for i in range(40)]])
def test_without_dev_a_tenth_of_each_class_is_validation(tmp_path, caplog, labels):
    lines = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    data = write(tmp_path / "own", train_csv=f"text,label\n{lines}")
    with caplog.at_level(logging.WARNING):
        splits = load_task("own", data)
    assert "own has no file for validation: 4 rows drawn from training" in caplog.text
    train, validation = splits["train"]["row"][:], splits["validation"]["row"][:]
    assert sorted([*train, *validation]) == list(range(40))
    assert train == sorted(train)
    assert all(splits["validation"][i]["text"] == f"text {row}" for i, row in enumerate(validation))
    assert load_task("own", data, seed=5)["validation"]["row"][:] == validation
    if labels[0] == "a":
        assert Counter(splits["validation"]["label"][:]) == {0: 3, 1: 1}


def test_encoded_rows_know_their_task(tmp_path):
    text = "a,b,label\ngood film,the plot,1.5\nbad,very bad,2\n"
    data = write(tmp_path / "alike", train_csv=text, dev_csv=text)
    write(tmp_path / "reviews", train_csv=REVIEWS, dev_csv=REVIEWS)
    train, validation = load_encoded(["alike", "reviews"], tokenizer(), 16, data)
    assert {name: task.label_names for name, task in train.tasks.items()} == {"alike": (), "reviews": ("bad", "good")}
    assert validation["alike"].tasks["alike"].metrics == ("pearson", "spearman")
    assert train.datasets["alike"]["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1]


BAD_TRAINING_FILES = [
    ("", r"train.csv has no rows"),
    ("text,label\n", r"train.csv has no rows"),
    ("text,label\na,x\n", r"every label is 'x'; there must be two classes"),
    ("text,label\na,1.5\n", r"1 training rows are too few to draw validation rows from; add a file dev.csv"),
    ("text,label\na,x\nb,y\n", r"2 training rows are too few"),
    ("text,class\na,x\n", r"train.csv, line 1: the columns are text, class; they must be label and one or two"),
    ("label\nx\n", r"line 1: the columns are label; they must be"),
    ("id,a,b,label\n1,a,b,x\n", r"line 1: the columns are id, a, b, label; they must be"),
    ("row,text,label\n1,a,x\n", r"line 1: .* of any name but row"),
    (",text,label\n0,a,x\n", r"line 1: .* must be different names .*index=False"),
    ("text,text,label\n0,a,x\n", r"line 1: .* must be different names"),
    ('text,label\n"two\nlines",x\nb\n', r"line 4: 1 fields; the columns are text, label"),
    ("text,label\na,x\nb, \n", r"train.csv, line 3: the label is empty"),
    ("text,label\na,1.5\nb,n/a\n", r"train.csv, line 3: label 'n/a' is not a finite number"),
    ("text,label\na,1.5\nb,inf\n", r"train.csv, line 3: label 'inf' is not a finite number"),
    ('text,label\na,x\n"b,y\n', r"train.csv is damaged from line 3: unexpected end of data"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TRAINING_FILES)
def test_a_bad_training_file_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_task("own", write(tmp_path / "own", train_csv=text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nb,good\na,great\n", r"dev.csv, line 3: unknown label 'great'; training has bad, good"),
        ("words,label\na,good\n", r"dev.csv, line 1: the columns are words, label; those of the training file are"),
        ("text,label\n", r"dev.csv has no rows"),
    ],
)
def test_a_bad_validation_file_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_task("reviews", write(tmp_path / "reviews", train_csv=REVIEWS, dev_csv=text))


def test_a_damaged_archive_missing_and_several_files(tmp_path):
    data = write(tmp_path / "reviews", train_csv_gz=REVIEWS)
    path = tmp_path / "reviews" / "train.csv.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train.csv.gz is damaged"):
        load_task("reviews", data)
    write(tmp_path / "reviews", train_csv=REVIEWS)
    with pytest.raises(ValueError, match=r"several files for train: train.csv, train.csv.gz; leave one"):
        load_task("reviews", data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no file train that ends in .csv, .tsv"):
        load_task("empty", data)


def test_unknown_names_tell_how_to_bring_data(tmp_path):
    write(tmp_path / "data" / "reviews", train_csv=REVIEWS)
    message = r"unknown task 'revues'; the tasks are cola.*snli; one of your own is a folder of that name in data_dir"
    with pytest.raises(ValueError, match=message):
        load_task("revues", tmp_path / "data")
    with pytest.raises(ValueError, match="unknown task 'reviews'"):
        load_task("reviews")
    with pytest.raises(ValueError, match=r"task '\.\./data' must be the name of a folder"):
        load_task("../data", tmp_path / "data")
    write(tmp_path / "data" / "values", train_csv=REVIEWS)
    with pytest.raises(ValueError, match=r"task 'values' must not be the name of an attribute of torch's modules"):
        load_task("values", tmp_path / "data")


def test_fractions_take_a_share_of_each_class_and_nest(tmp_path):
    lines = "".join(f"text {i},{'rare' if i % 100 == 7 else 'often'}\n" for i in range(1000))
    data = write(tmp_path / "own", train_csv=f"text,label\n{lines}", dev_csv="text,label\na,rare\n")

    def drawn(fraction, seed=0, **options):
        rows = load_task("own", data, train_fraction=fraction, seed=seed, **options)["train"]
        assert rows["text"][:] == [f"text {row}" for row in rows["row"][:]]
        return rows["row"][:], Counter(rows["label"][:])

    (hundredth, few), (tenth, more), (others, _) = drawn(0.01), drawn(0.1), drawn(0.1, seed=1)
    assert (few, more) == ({0: 10, 1: 1}, {0: 99, 1: 1})
    assert set(hundredth) < set(tenth) != set(others)
    assert tenth == sorted(tenth)
    assert tenth[:10] != list(range(10))
    assert drawn(1.0)[0] == list(range(1000))
    capped, _ = drawn(0.1, max_train_rows=5)
    assert len(capped) == 5
    assert set(capped) < set(tenth)


def test_a_fraction_of_a_regression_is_of_all_rows(tmp_path):
    lines = "".join(f"text {i},{i / 4}\n" for i in range(40))
    data = write(tmp_path / "own", train_csv=f"text,label\n{lines}", dev_csv="text,label\na,1\n")
    assert len(load_task("own", data, train_fraction=0.25)["train"]) == 10
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"train_fraction is .*; it must be above 0 and at most 1"):
            load_task("own", data, train_fraction=fraction)
