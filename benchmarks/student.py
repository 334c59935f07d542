"""Benchmark of whole students, from token ids to logits, beside a transformer of BERT-base's size; random weights."""

from __future__ import annotations

import io
import warnings
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.bilstm import ragged
from benchmarks.latency import Call
from benchmarks.onnx_peers import Feeds, onnx_missing, onnx_runtime, to_int8
from benchmarks.roofline import RECURRENT_BYTES, Peaks
from benchmarks.serving import Case, Problem, Serving
from benchmarks.torch_peers import torch_int8
from fastkd.runtime.extension import compiled

TASK, LABELS = "default", 2
CONFIGS: dict[str, dict[str, Any]] = {
    "shared": {
        "embedding_size": 300,
        "projection_size": 300,
        "share_integrator": True,
        "pooling": ["max", "mean", "min", "attention"],
    },
    "mkd": {},
}
"""What differs from the preset ``mkd``, which has an integrator for each side."""
QUESTIONS = {
    "1x24": ((24,), "one request"),
    "32x24": ((24,) * 32, "requests of one length"),
    "ragged-32": (ragged(32), "texts are of many lengths"),
}
CASES = [
    Case("student", f"{config} {name}", lengths, (), reason)
    for config in CONFIGS
    for name, (lengths, reason) in QUESTIONS.items()
]


def config_of(case: Case) -> str:
    return case.size.split()[0]


@cache
def make_student(config: str) -> Any:
    from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig

    torch.manual_seed(0)
    return BiAttentiveLSTM(BiAttentiveLSTMConfig.preset("mkd", **CONFIGS[config])).eval()


class Student(Problem):
    """Padded texts for those that want them; fastkd wants one after the other."""

    def __init__(self, case: Case) -> None:
        self.model = make_student(config_of(case))
        self.lengths = np.array(case.lengths)
        self.mask = torch.arange(int(self.lengths.max())) < torch.from_numpy(self.lengths)[:, None]
        pick = torch.Generator().manual_seed(0)
        self.padded = torch.randint(1, self.model.config.vocab_size, self.mask.shape, generator=pick)
        self.ids = self.padded[self.mask].numpy().astype(np.int32)
        with torch.inference_mode():
            self.truth = self.model.double()(self.padded, self.mask).logits.numpy()
            self.model.float()

    def answer(self, raw: Any) -> NDArray[Any]:
        return np.asarray(raw)

    def limit(self, precision: str, peaks: Peaks) -> float:
        """Of both BiLSTMs and the head."""
        config, size = self.model.config, RECURRENT_BYTES["int8" if precision == "int8" else "float32"]
        hidden, lengths = config.hidden_size_per_direction, tuple(self.lengths)
        features = 2 * len(config.pooling) * 2 * hidden
        return (
            peaks.bilstm(lengths, config.projection_size, hidden, precision)
            + peaks.bilstm(lengths, 6 * hidden, hidden, precision) * len(self.model.integrators)
            + peaks.product(len(lengths), config.head_size * features, size, precision)
        )

    @property
    def feeds(self) -> Feeds:
        return {"ids": self.padded.numpy(), "lengths": self.lengths}

    @cached_property
    def onnx(self) -> bytes:
        from fastkd.students.onnx_graph import build_model

        return build_model(self.model).SerializeToString()

    @cached_property
    def onnx_int8(self) -> bytes:
        return to_int8(self.onnx)


SERVING = Serving("student", CASES, Student, {"float32": 1e-6, "bfloat16": 5e-4, "int8": 1e-2})


def torch_call(model: Any, student: Student) -> Call:
    @torch.inference_mode()
    def call() -> Any:
        return model(student.padded, student.mask)[0]

    return call


@SERVING.system("torch", "float32")
def eager(student: Student, threads: int) -> Call:
    return torch_call(student.model, student)


@SERVING.system("torch int8", "int8")
def dynamic_int8(student: Student, threads: int) -> Call:
    return torch_call(torch_int8(student.model), student)


@SERVING.system("ORT", "float32", objection=onnx_missing)
def ort(student: Student, threads: int) -> Call:
    return onnx_runtime(student.onnx, student.feeds, threads)


@SERVING.system("ORT int8", "int8", objection=onnx_missing)
def ort_int8(student: Student, threads: int) -> Call:
    return onnx_runtime(student.onnx_int8, student.feeds, threads)


def _fastkd(precision: str) -> None:
    @SERVING.system(f"fastkd {precision}", precision)
    def start(student: Student, threads: int) -> Call:
        from fastkd.students.export import arrays_of, sizes_of

        model = student.model
        arrays, sizes, pooling = arrays_of(model, precision), sizes_of(model), list(model.config.pooling)
        runtime = compiled().Model(arrays, precision, sizes, pooling, {TASK: LABELS}, threads)
        return lambda: runtime.logits(TASK, student.ids, student.lengths, False)


for precision in ("float32", "bfloat16", "int8"):
    _fastkd(precision)


@cache
def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig()).eval()


@cache
def bert_onnx_int8() -> bytes:
    model, file = bert(), io.BytesIO()
    ids = torch.ones(2, 8, dtype=torch.long)
    names, axes = ["ids", "mask"], {name: {0: "texts", 1: "longest"} for name in ("ids", "mask")}
    model.config._attn_implementation = "eager"
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # of the deprecation of this exporter, the one that onnx alone suffices for
            torch.onnx.export(
                model, (ids, ids), file, input_names=names, dynamic_axes=axes, opset_version=17, dynamo=False
            )
    finally:
        model.config._attn_implementation = "sdpa"
    return to_int8(file.getvalue())


@SERVING.system("BERT-base torch", "float32", reference=True)
def bert_torch(student: Student, threads: int) -> Call:
    return torch_call(bert(), student)


@SERVING.system("BERT-base ORT int8", "int8", objection=onnx_missing, reference=True)
def bert_ort(student: Student, threads: int) -> Call:
    mask = student.mask.long().numpy()
    return onnx_runtime(bert_onnx_int8(), {"ids": student.padded.numpy(), "mask": mask}, threads)
