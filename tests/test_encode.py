"""Tokenised rows and padded batches."""

import pytest
import torch
from tiny import tokenizer
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, encode, load_encoded
from fastkd.data.glue import GLUE

CLS, SEP = 2, 3
GOOD, BAD, FILM, THE = 4, 7, 10, 14


def rows(name, texts, labels, first_row=0):
    from datasets import Dataset

    columns = {column: [text[i] for text in texts] for i, column in enumerate(GLUE[name].columns)}
    numbers = list(range(first_row, first_row + len(labels)))
    return Dataset.from_dict({**columns, "label": labels, "row": numbers})


SENTENCES = rows("sst2", [("the good film",), ("bad",), ("unknownword good",)], [1, 0, 1], first_row=40)
PAIRS = rows("stsb", [("good", "the film"), ("the bad film", "bad")], [4.5, 1.0])


def test_single_sentences():
    encoded = encode(SENTENCES, GLUE["sst2"], tokenizer(), 16)
    assert encoded[:] == {
        "input_ids": [[CLS, THE, GOOD, FILM, SEP], [CLS, BAD, SEP], [CLS, 1, GOOD, SEP]],
        "attention_mask": [[1] * 5, [1] * 3, [1] * 4],
        "token_type_ids": [[0] * 5, [0] * 3, [0] * 4],
        "labels": [1, 0, 1],
        "row": [40, 41, 42],
        "length": [5, 3, 4],
    }


@pytest.mark.parametrize("token_types", [True, False])
def test_pairs_have_token_types_whatever_the_tokenizer(token_types):
    encoded = encode(PAIRS, GLUE["stsb"], tokenizer(token_types), 16)
    assert encoded["input_ids"][:] == [[CLS, GOOD, SEP, THE, FILM, SEP], [CLS, THE, BAD, FILM, SEP, BAD, SEP]]
    assert encoded["token_type_ids"][:] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]]
    assert encoded["labels"][:] == [4.5, 1.0]


def test_pairs_have_token_types_where_the_tokenizer_gives_all_of_them_0():
    flat = tokenizer()
    flat.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    assert flat("good", "film")["token_type_ids"] == [0] * 5
    assert encode(PAIRS, GLUE["stsb"], flat, 16)["token_type_ids"][0] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("token_types", [True, False])
def test_long_pairs_lose_the_longer_text_first(token_types):
    encoded = encode(PAIRS, GLUE["stsb"], tokenizer(token_types), 6)
    assert encoded["input_ids"][1] == [CLS, THE, BAD, SEP, BAD, SEP]
    assert encoded["token_type_ids"][1] == [0, 0, 0, 0, 1, 1]


def test_max_length_must_hold_a_token_of_each_text():
    encode(PAIRS, GLUE["stsb"], tokenizer(), 5)
    with pytest.raises(ValueError, match="max_length is 4; stsb needs at least 5 tokens"):
        encode(PAIRS, GLUE["stsb"], tokenizer(), 4)


def test_max_length_is_the_models_at_most():
    with pytest.raises(ValueError, match="max_length is 16; the model takes 8 tokens at most"):
        encode(PAIRS, GLUE["stsb"], tokenizer(model_max_length=8), 16)


def dataset():
    return MultiTaskDataset(
        {
            "sst2": encode(SENTENCES, GLUE["sst2"], tokenizer(), 16),
            "stsb": encode(PAIRS, GLUE["stsb"], tokenizer(), 16),
        }
    )


def test_tasks_lie_end_to_end():
    data = dataset()
    assert len(data) == 5
    assert data.sizes == {"sst2": 3, "stsb": 2}
    assert data.lengths == [5, 3, 4, 6, 7]
    assert (data[2]["task"], data[2]["row"], data[3]["task"], data[3]["row"]) == ("sst2", 42, "stsb", 0)
    assert [row["row"] for row in data.__getitems__([4, 0, 3])] == [1, 40, 0]
    with pytest.raises(IndexError, match="row 5 of a dataset of 5 rows"):
        data[5]
    with pytest.raises(IndexError):
        data[-1]
    with pytest.raises(ValueError, match="no rows for sst2"):
        MultiTaskDataset({"sst2": SENTENCES.select([])})


def test_batches_pad_to_their_longest():
    loader = DataLoader(dataset(), batch_sampler=[[1, 0], [3, 4]], collate_fn=MultiTaskCollator(tokenizer()))
    sentences, pairs = loader
    assert sentences["task"] == "sst2"
    assert sentences["input_ids"].tolist() == [[CLS, BAD, SEP, 0, 0], [CLS, THE, GOOD, FILM, SEP]]
    assert sentences["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert sentences["labels"].tolist() == [0, 1]
    assert sentences["labels"].dtype == torch.int64
    assert pairs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert pairs["labels"].dtype == torch.float32


def test_left_padding_and_multiples():
    collate = MultiTaskCollator(tokenizer(padding_side="left"), pad_to_multiple_of=4)
    batch = collate(dataset().__getitems__([0, 1]))
    assert batch["input_ids"].tolist() == [[0, 0, 0, CLS, THE, GOOD, FILM, SEP], [0] * 5 + [CLS, BAD, SEP]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 3]


def test_teacher_logits_ride_along():
    encoded = encode(SENTENCES, GLUE["sst2"], tokenizer(), 16)
    encoded = encoded.add_column("teacher_logits", [[0.5, 1.0], [2.0, -1.0], [0.0, 0.25]])
    batch = MultiTaskCollator(tokenizer())(MultiTaskDataset({"sst2": encoded}).__getitems__([2, 0]))
    assert batch["teacher_logits"].dtype == torch.float32
    assert batch["teacher_logits"].tolist() == [[0.0, 0.25], [0.5, 1.0]]


def test_a_batch_of_two_tasks_is_refused():
    with pytest.raises(ValueError, match="one task, not of sst2, stsb"):
        MultiTaskCollator(tokenizer())(dataset().__getitems__([0, 3]))


def test_a_tokenizer_without_padding_is_refused():
    unpadded = tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        MultiTaskCollator(unpadded)


def test_load_encoded_names_validation_sets(tmp_path):
    header = "premise\thypothesis\tlabel\n"
    (tmp_path / "MNLI").mkdir()
    for stem, texts in {
        "train": ["a"],
        "dev_matched": ["the good film", "bad"],
        "dev_mismatched": ["a"],
    }.items():
        lines = "".join(f"{text}\tgood\tneutral\n" for text in texts)
        (tmp_path / "MNLI" / f"{stem}.tsv").write_text(header + lines)
    train, validation = load_encoded(["mnli"], tokenizer(), 16, tmp_path)
    assert train.sizes == {"mnli": 1}
    assert {name: data.sizes for name, data in validation.items()} == {
        "mnli": {"mnli": 2},
        "mnli_mismatched": {"mnli": 1},
    }
    assert [row["row"] for row in validation["mnli"]] == [1, 0]
    (tmp_path / "MNLI" / "dev_matched.tsv").unlink()
    assert list(load_encoded(["mnli"], tokenizer(), 16, tmp_path)[1]) == ["mnli"]
