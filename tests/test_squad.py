"""SQuAD: files in the official shape, their errors, articles held out, and windows whose answers are where they say."""

import gzip
import json

import datasets
import pytest
from squad_samples import article, paragraph, write
from tiny import tokenizer
from tokenizers.processors import TemplateProcessing

from fastkd.data.squad import load_squad, split_by_title
from fastkd.data.squad_windows import encode_squad

CONTEXT = "the very good film not the bad plot a great film"
SIZES = {"max_length": 12, "doc_stride": 2, "max_question_length": 4}


def load(folder, *articles, name="squad"):
    write(folder / "dev.json", *articles)
    return load_squad(name, folder)["validation"]


def test_rows_are_those_of_the_file(tmp_path):
    film = paragraph("  the good film", ("1", "good", ["film", "good film"]), ("1", "the", []))
    rows = list(load(tmp_path, article("", film), article("", film), name="squad_v2"))
    assert len(rows) == 4
    assert rows[0] == rows[2] == {
        "id": "1", "title": "", "context": "  the good film", "question": "good",
        "answers": {"text": ["film", "good film"], "answer_start": [11, 6]},
    }  # fmt: skip
    assert rows[1]["answers"] == {"text": [], "answer_start": []}


def test_files_are_found_by_version_and_stem(tmp_path):
    for name, word in (("dev-v1.1.json", "good"), ("dev-v2.0.json", "bad"), ("train_sample.json", "fine")):
        write(tmp_path / name, article("", paragraph(word, ("1", word, [word]))))
    packed = tmp_path / "train_sample.json"
    (tmp_path / "train_sample.json.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    for name, word in (("squad", "good"), ("squad_v2", "bad")):
        splits = load_squad(name, tmp_path)
        assert {split: rows["question"][:] for split, rows in splits.items()} == {
            "train": ["fine"],
            "validation": [word],
        }
    write(tmp_path / "train_more.json", article("", paragraph("fine", ("1", "fine", ["fine"]))))
    with pytest.raises(ValueError, match=r"several files for train: train_more\.json, train_sample\.json\.gz"):
        load_squad("squad", tmp_path)


def test_the_hub_is_asked_without_a_folder(monkeypatch):
    row = {
        "id": "1",
        "title": "t",
        "context": "good",
        "question": "q",
        "answers": {"text": ["good"], "answer_start": [0]},
    }
    asked = []

    def hub(name):
        asked.append(name)
        split = datasets.Dataset.from_list([row])
        return datasets.DatasetDict({"train": split, "validation": split})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    splits = load_squad("squad_v2")
    assert asked == ["rajpurkar/squad_v2"]
    assert splits["validation"][0] == row


def damaged(change):
    shape = {"data": [article("t", paragraph("the good film", ("q7", "good", ["film"])))]}
    change(shape["data"][0]["paragraphs"][0])
    return json.dumps(shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (damaged(lambda p: None)[:-9], r"dev.json is not JSON .* truncated"),
        ("[1]", r"dev.json: 'data' is missing; it must be list"),
        (damaged(lambda p: p.pop("context")), r"a paragraph of article 0: 'context' is missing; it must be str"),
        (damaged(lambda p: p["qas"][0].pop("answers")), r"question q7: 'answers' is missing; it must be list"),
        (damaged(lambda p: p["qas"][0].update(question=3)), r"question q7: 'question' is int; it must be str"),
        (
            damaged(lambda p: p["qas"][0]["answers"][0].update(answer_start=8)),
            r"question q7: the context has ' fil' at 8, not 'film'",
        ),
        (damaged(lambda p: p["qas"][0]["answers"][0].update(text="")), r"question q7: .* not ''"),
        (damaged(lambda p: p["qas"][0].update(answers=[])), r"question q7 has no answer, which only squad_v2 allows"),
        (damaged(lambda p: p["qas"][0].update(is_impossible=True)), r"question q7: is_impossible is True, yet"),
        ('{"data": []}', r"dev.json has no questions"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    (tmp_path / "dev.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_squad("squad", tmp_path)


def test_a_truncated_archive_is_named(tmp_path):
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(damaged(lambda p: None).encode())[:-12])
    with pytest.raises(ValueError, match=r"dev.json.gz is not JSON"):
        load_squad("squad", tmp_path)


def test_missing_files_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file train\* or dev\*"):
        load_squad("squad", tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_squad("squad", tmp_path / "none")
    with pytest.raises(ValueError, match="'squad1'; it must be one of squad, squad_v2"):
        load_squad("squad1", tmp_path)


def test_the_last_titles_are_held_out(tmp_path):
    titles = ("a", "b", "a", "c")
    questions = [(str(i), "good", ["good"]) for i in range(4)]
    dataset = load(tmp_path, *(article(t, paragraph("good", q)) for t, q in zip(titles, questions, strict=True)))
    train, held_out = split_by_title(dataset, 2)
    assert train["id"][:] == ["0", "2"]
    assert held_out["id"][:] == ["1", "3"]
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"held_out is {count}; it must be from 1 to 2"):
            split_by_title(dataset, count)


def encoded(folder, *questions, context=CONTEXT, token_types=True):
    dataset = load(folder, article("t", paragraph(context, *questions)), name="squad_v2")
    return dataset, encode_squad(dataset, tokenizer(token_types), **SIZES)


@pytest.mark.parametrize("token_types", [True, False])
def test_windows_cover_the_context_and_mark_the_answer(tmp_path, token_types):
    questions = [("1", "good", ["bad plot"]), ("2", "the film", ["the"]), ("3", "very", [])]
    dataset, windows = encoded(tmp_path, *questions, token_types=token_types)
    assert windows["row"][:] == list(range(len(windows)))
    words = {question: [] for question in range(3)}
    holding = dict.fromkeys(range(3), 0)
    for window in windows:
        tokens = tokenizer().convert_ids_to_tokens(window["input_ids"])
        first_of_context = tokens.index("[SEP]") + 1
        assert window["length"] == len(tokens) <= 12
        assert window["token_type_ids"] == [0] * first_of_context + [1] * (len(tokens) - first_of_context)
        question, spans = window["question"], list(zip(window["char_starts"], window["char_ends"], strict=True))
        assert tokens[1 : first_of_context - 1] == dataset[question]["question"].split()
        assert [CONTEXT[a:b] for a, b in spans[first_of_context:-1]] == tokens[first_of_context:-1]
        assert set(spans[:first_of_context] + spans[-1:]) == {(-1, -1)}
        part = tokens[first_of_context:-1]
        assert not words[question] or words[question][-2:] == part[:2]  # doc_stride words are shared
        words[question] += part[2:] if words[question] else part
        if window["start_positions"]:
            holding[question] += 1
            a, b = spans[window["start_positions"]][0], spans[window["end_positions"]][1]
            assert CONTEXT[a:b] == dataset[question]["answers"]["text"][0]
        else:
            assert window["end_positions"] == 0
    assert all(" ".join(found) == CONTEXT for found in words.values())
    assert holding == {0: 2, 1: 1, 2: 0}  # the answer to the first lies in what two windows share


def test_token_types_are_made_where_a_tokenizer_tells_nothing_apart(tmp_path):
    dataset, windows = encoded(tmp_path, ("1", "good", ["bad"]))
    flat = tokenizer()
    special = [("[CLS]", flat.cls_token_id), ("[SEP]", flat.sep_token_id)]
    flat.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:0 [SEP]:0", special_tokens=special
    )
    assert not any(flat("good", "bad")["token_type_ids"])
    assert encode_squad(dataset, flat, **SIZES)["token_type_ids"][:] == windows["token_type_ids"][:]


def test_an_answer_cut_by_a_window_is_not_marked(tmp_path):
    _, windows = encoded(tmp_path, ("1", "good", ["good film not the bad plot a great"]))
    assert len(windows) == 2
    assert windows["start_positions"][:] == windows["end_positions"][:] == [0, 0]


def test_white_space_around_an_answer_and_part_of_a_word(tmp_path):
    _, windows = encoded(tmp_path, ("1", "bad", [" good "]), ("2", "bad", ["oo"]), context="very good film")
    assert windows["start_positions"][:] == windows["end_positions"][:] == [4, 4]


def test_a_long_question_keeps_its_beginning(tmp_path):
    _, windows = encoded(tmp_path, ("1", "  good bad fine poor film plot", ["the"]))
    for ids in windows["input_ids"][:]:
        assert tokenizer().convert_ids_to_tokens(ids)[:6] == ["[CLS]", "good", "bad", "fine", "poor", "[SEP]"]


def test_sizes_and_tokenizers_that_cannot_work(tmp_path):
    dataset, _ = encoded(tmp_path, ("1", "good", ["the"]))
    with pytest.raises(ValueError, match=r"max_length is 9; it must be more than 9"):
        encode_squad(dataset, tokenizer(), **(SIZES | {"max_length": 9}))
    with pytest.raises(ValueError, match=r"max_length is 12; .* at most 11"):
        encode_squad(dataset, tokenizer(model_max_length=11), **SIZES)
    with pytest.raises(ValueError, match="CLS"):
        encode_squad(dataset, tokenizer(padding_side="left"), **SIZES)
