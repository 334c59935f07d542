"""A BiLSTM student of few words, in torch, compiled and saved, and what it is asked."""

import numpy as np
import tiny
import torch

from fastkd import _runtime
from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.students.export import arrays_of, sizes_of

WORDS = 60
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
TEXTS = ["the good film", "", "a very bad plot", "great " * 300]
PAIRS = [("good", "the bad film"), ("", ""), ("awful", "very"), ("great " * 200, "bad " * 90)]


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


def save_student(folder):
    torch.manual_seed(0)
    tasks = {"a": {"labels": ["bad", "good"]}, "score": {"labels": []}}
    config = BiAttentiveLSTMConfig(vocab_size=16, embedding_size=8, **SIZES["odd"], tasks=tasks)
    BiAttentiveLSTM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
