"""Unlabelled variants of texts: what changes, how often, and how they train beside labelled rows."""

import math
import random
from collections import Counter

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny import tokenizer, write_glue
from torch.nn import functional as F

from fastkd.data.augment import augment
from fastkd.data.encode import MultiTaskCollator, MultiTaskDataset, load_encoded
from fastkd.data.task import custom_task
from fastkd.data.word_classes import induce_word_classes
from fastkd.methods.mixkd import MixKDObjective
from fastkd.mixup import Mix
from fastkd.training.classifiers import task_loss

SINGLE = custom_task("single", ("text",), ("no", "yes"))
PAIR = custom_task("pair", ("a", "b"), ())


def single(*texts):
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]), row=Value("int64"))
    rows = range(10, 10 + len(texts))
    return Dataset.from_dict({"text": texts, "label": [1] * len(texts), "row": rows}, features=features)


def pair(*texts):
    features = Features(a=Value("string"), b=Value("string"), label=Value("float32"), row=Value("int64"))
    a, b = zip(*texts, strict=True)
    return Dataset.from_dict({"a": a, "b": b, "label": [2.5] * len(a), "row": range(len(a))}, features=features)


def kinds(words):
    """Parts of speech in a language where they are written: N1, N2, … are nouns, V1, … verbs."""
    return [word[0] for word in words]


NUMBERED = " ".join(f"{kind}{i}" for i in range(100) for kind in "NV")


def variants(rows=None, task=SINGLE, **options):
    chances = {"p_mask": 0.0, "p_pos": 0.0, "p_ngram": 0.0, "tagger": kinds}
    return augment(single(NUMBERED) if rows is None else rows, task, **(chances | options))


def test_masks_and_replacements_come_as_often_as_asked():
    made = variants(copies=30, p_mask=0.2, p_pos=0.3)
    changes = Counter()
    for text in made["text"]:
        for old, new in zip(NUMBERED.split(), text.split(), strict=True):
            assert new == "[MASK]" or new[0] == old[0]
            changes["mask" if new == "[MASK]" else "same" if new == old else "other"] += 1
    shares = {name: count / changes.total() for name, count in changes.items()}
    assert shares == pytest.approx({"mask": 0.2, "other": 0.3, "same": 0.5}, abs=0.02)


def test_a_replacement_is_drawn_as_often_as_it_occurs():
    rows = single(" ".join(["Na"] * 80 + ["Nb"] * 20))
    drawn = Counter(word for text in variants(rows, copies=30, p_pos=1.0)["text"] for word in text.split())
    assert drawn["Na"] / drawn.total() == pytest.approx(0.8, abs=0.03)


def test_ngrams_are_one_to_five_neighbouring_words():
    made = variants(copies=300, p_ngram=1.0)["text"][:]
    assert {len(text.split()) for text in made} == {1, 2, 3, 4, 5}
    assert all(f" {text} " in f" {NUMBERED} " for text in made)
    assert len(set(made)) == len(made) < 300
    some = variants(copies=300, p_ngram=0.25, p_pos=0.5)["text"][:]
    assert sum(len(text.split()) <= 5 for text in some) / 300 == pytest.approx(0.25, abs=0.06)


def test_of_a_pair_one_side_changes_or_both_in_a_third_of_cases():
    made = variants(pair((NUMBERED, NUMBERED)), PAIR, copies=300, p_pos=0.5)
    changed = Counter((a != NUMBERED, b != NUMBERED) for a, b in zip(made["a"], made["b"], strict=True))
    assert changed[False, False] == 0
    for sides in ((True, True), (True, False), (False, True)):
        assert changed[sides] / 300 == pytest.approx(1 / 3, abs=0.08)


def test_nothing_left_nothing_new_and_nothing_twice_is_kept():
    assert len(variants(p_mask=1.0)) == 0
    assert len(variants(pair((NUMBERED, "V1")), PAIR, p_mask=1.0)) == 0
    assert variants(single("N1", "N2"), p_pos=1.0).num_rows == 0
    assert variants(single("N1  V1"), copies=50, p_mask=0.5)["text"][:] in (
        ["[MASK] V1", "N1 [MASK]"],
        ["N1 [MASK]", "[MASK] V1"],
    )
    assert len(variants(single(""), p_ngram=1.0)) == 0


def test_variants_are_numbered_unlabelled_rows_and_always_the_same():
    rows = single(NUMBERED, "N1 V1 N2 V2")
    made = variants(rows, copies=3, p_pos=0.5)
    assert made.features == rows.features
    assert made["row"][:] == list(range(12, 12 + len(made)))
    assert set(made["label"]) == {-1}
    assert variants(rows, copies=3, p_pos=0.5)[:] == made[:]
    assert variants(rows, copies=3, p_pos=0.5, seed=1)[:] != made[:]
    assert all(math.isnan(label) for label in variants(pair((NUMBERED, "N1")), PAIR, p_pos=0.5)["label"])
    assert len(variants(p_pos=0.5)) == 20
    assert len(variants(pair((NUMBERED, NUMBERED)), PAIR, p_pos=0.5)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_mask": -0.1}, "p_mask is -0.1; it must be from 0 to 1"),
        ({"p_ngram": float("nan")}, "p_ngram is nan"),
        ({"p_mask": 0.6, "p_pos": 0.5}, r"p_mask \+ p_pos is 1.1"),
        ({"copies": 0}, "copies is 0; it must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        variants(**options)


def test_words_with_like_neighbours_get_one_class():
    pick = random.Random(0)
    nouns, verbs, adverbs = ["cat", "dog", "Bird"], ["sees", "likes", "hears"], ["often", "rarely", "never"]
    texts = [
        ["the", pick.choice(nouns), pick.choice(adverbs), pick.choice(verbs), "a", pick.choice(nouns), "."]
        for _ in range(200)
    ]
    tag = induce_word_classes([*texts, ["zebra"]], classes=7)
    tags = [set(tag(words)) for words in (nouns, verbs, adverbs, ["the", "THE"])]
    assert all(len(found) == 1 for found in tags)
    assert len(set.union(*tags)) == 4
    assert tag(["zebra", "extra"]) == ["-ra", "-ra"]
    everything = [*nouns, *verbs, *adverbs]
    assert induce_word_classes([*texts, ["zebra"]], classes=7)(everything) == tag(everything)
    assert induce_word_classes([["too", "few"]])(["too", "few"]) == ["-oo", "-ew"]


def test_variants_join_the_training_rows_of_every_task(tmp_path):
    data = write_glue(tmp_path)
    train, validation = load_encoded(["sst2", "stsb"], tokenizer(), 16, data, augment=4)
    plain, _ = load_encoded(["sst2", "stsb"], tokenizer(), 16, data)
    assert train.sizes["sst2"] > plain.sizes["sst2"]
    assert train.sizes["stsb"] > plain.sizes["stsb"]
    assert [list(rows) for rows in train.labelled().datasets.values()] == [list(d) for d in plain.datasets.values()]
    assert validation["sst2"].sizes == {"sst2": 24}
    for rows in train.datasets.values():
        assert len(set(rows["row"])) == len(rows)
    collate = MultiTaskCollator(tokenizer())
    batch = collate(MultiTaskDataset({"sst2": train.datasets["sst2"]}).__getitems__([0, train.sizes["sst2"] - 1]))
    assert batch["labels"].tolist() == [plain.datasets["sst2"][0]["labels"], -1]
    scores = collate(MultiTaskDataset({"stsb": train.datasets["stsb"]}).__getitems__([0, train.sizes["stsb"] - 1]))
    assert scores["labels"].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("logits", "labels", "unlabelled", "loss"),
    [
        (torch.randn(4, 3), torch.tensor([2, -1, 0, -1]), torch.full((4,), -1), F.cross_entropy),
        (
            torch.randn(4, 1),
            torch.tensor([2.0, math.nan, -1.0, math.nan]),
            torch.full((4,), math.nan),
            lambda logits, labels: F.mse_loss(logits[:, 0], labels),
        ),
    ],
)
def test_a_row_without_a_label_adds_nothing_to_the_mean_over_rows(logits, labels, unlabelled, loss):
    logits = logits.requires_grad_()
    known = task_loss(logits, labels)
    torch.testing.assert_close(known, loss(logits[[0, 2]], labels[[0, 2]]) / 2)
    parts = [task_loss(logits[rows], labels[rows]) for rows in ([0, 1], [2, 3])]  # as in micro-batches
    torch.testing.assert_close(sum(parts) / 2, known)
    (gradient,) = torch.autograd.grad(known, logits)
    assert gradient[[1, 3]].tolist() == torch.zeros_like(gradient[[1, 3]]).tolist()
    assert gradient[[0, 2]].abs().min() > 0
    nothing = task_loss(logits, unlabelled)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().max() == 0


@pytest.mark.parametrize("wrong", [-100, 3])
def test_a_label_that_is_no_class_is_refused(wrong):
    labels, message = torch.tensor([2, -1, wrong]), f"labels has {wrong}; they must be classes from 0 to 2, or -1"
    with pytest.raises(ValueError, match=message):
        task_loss(torch.randn(3, 3), labels)
    mix = Mix(torch.tensor([1, 0, 2]), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=message):
        MixKDObjective(alpha_mle=0.0, alpha_tmkd=0.0)(
            torch.randn(3, 3), labels, mixed_student_logits=torch.randn(3, 3), mix=mix
        )
