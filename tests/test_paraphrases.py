"""Paraphrases join the training rows, with the labels of those they paraphrase."""

import pytest
from tiny import tokenizer, write_glue

from fastkd.data.encode import load_encoded
from fastkd.data.glue import load_task


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "own"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("a,b,label\n" + "".join(f"a{i},b{i},{'xy'[i % 2]}\n" for i in range(20)))
    return folder.parent


def paraphrases(tmp_path, text, name="own.csv"):
    (tmp_path / "more").mkdir(exist_ok=True)
    (tmp_path / "more" / name).write_text(text)
    return tmp_path / "more"


def test_paraphrases_take_the_label_of_their_row(tmp_path, data):
    (data / "own" / "dev.csv").write_text("a,b,label\np,q,x\n")
    folder = paraphrases(tmp_path, 'b,row,a\nq3,3,p3\n"q,2",2,p2\nr3,3,s3\n')
    splits = load_task("own", data, paraphrases=folder)
    plain = load_task("own", data)
    assert splits["train"].select(range(20))[:] == plain["train"][:]
    assert splits["train"].select(range(20, 23))[:] == {
        "a": ["p3", "p2", "s3"],
        "b": ["q3", "q,2", "r3"],
        "label": [1, 0, 1],
        "row": [20, 21, 22],
    }
    assert splits["train"].features == plain["train"].features
    assert splits["validation"][:] == plain["validation"][:]


def test_paraphrases_of_rows_left_out_stay_out(tmp_path, data):
    folder = paraphrases(tmp_path, "row,a,b\n" + "".join(f"{i},p{i},q{i}\n" for i in range(20)))
    for options in ({}, {"train_fraction": 0.5}, {"max_train_rows": 5}):
        rows = load_task("own", data, paraphrases=folder, **options)["train"]["row"][:]
        originals = [row for row in rows if row < 20]
        assert len(originals) < 20
        assert rows[len(originals) :] == [row + 20 for row in sorted(originals)]
        assert {row - 20 for row in rows if row >= 20} == set(originals)


def test_a_folder_serves_the_tasks_that_it_has_a_table_for(tmp_path):
    glue = write_glue(tmp_path / "glue")
    folder = paraphrases(tmp_path, "row\tsentence\n0\tthe very good film\n", "sst2.tsv")
    train, _ = load_encoded(["sst2", "stsb"], tokenizer(), 16, glue, paraphrases=folder)
    assert train.sizes == {"sst2": 25, "stsb": 24}
    with pytest.raises(FileNotFoundError, match=r"more has no table of paraphrases, stsb.csv"):
        load_encoded(["stsb"], tokenizer(), 16, glue, paraphrases=folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,a,b\n0,p,q\n20,p,q\n", r"own.csv, line 3: there is no row '20'; training has 0 to 19"),
        ("row,a,b\n-1,p,q\n", r"own.csv, line 2: there is no row '-1'"),
        ("row,a,b\n1.0,p,q\n", r"own.csv, line 2: there is no row '1.0'"),
        ("row,a,b\n0,p, \n", r"own.csv, line 2: b is empty"),
        ("row,a\n0,p\n", r"own.csv, line 1: the columns are row, a; they must be a, b, row"),
        ("row,a,b\n", r"own.csv has no rows"),
        ("row,a,b\n0,p\n", r"own.csv, line 2: 2 fields"),
    ],
)
def test_a_bad_table_names_file_and_line(tmp_path, data, text, message):
    with pytest.raises(ValueError, match=message):
        load_task("own", data, paraphrases=paraphrases(tmp_path, text))
