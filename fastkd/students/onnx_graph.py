"""The BiLSTM student as an ONNX model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastkd.students.bilstm import BiAttentiveLSTM
from fastkd.students.export import arrays_of

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET, IR_VERSION = 17, 8
SINGLE, FIRST, SECOND = ("ids", "lengths"), ("first_ids", "first_lengths"), ("second_ids", "second_lengths")
LOWEST = float(np.finfo(np.float32).min)
"""What a masked score becomes: infinities are for some runtimes a reason to complain."""


def build_model(student: BiAttentiveLSTM, *, pairs: bool = False) -> ModelProto:
    """The student without dropout, in float32, as a model of opset 17.

    Inputs are int64: ``ids`` (texts, longest), of which those beyond a text's length may be any word, and ``lengths``
    (texts), at least 1; with ``pairs`` both sentences have theirs, ``first_ids``, ``first_lengths``, ``second_ids`` and
    ``second_lengths``. For each task there is an output ``logits.<task>`` (texts, labels), a regression having one
    column. Embedding, projection and ReLU are one table, as in :func:`fastkd.students.export.arrays_of`.

    Raises:
        ImportError: onnx is not installed.
    """
    from onnx import TensorProto, checker, helper

    graph = StudentGraph(student)
    features = graph.features(pairs)
    value, outputs, inputs = helper.make_tensor_value_info, [], []
    for task, about in student.config.tasks.items():
        hidden = graph.add("Relu", graph.linear(f"heads.{task}.hidden", features))
        graph.add("Identity", graph.linear(f"heads.{task}.output", hidden), output=f"logits.{task}")
        outputs.append(value(f"logits.{task}", TensorProto.FLOAT, ["texts", max(1, len(about["labels"]))]))
    for ids, lengths in (FIRST, SECOND) if pairs else (SINGLE,):
        inputs.append(value(ids, TensorProto.INT64, ["texts", f"longest of {ids}"]))
        inputs.append(value(lengths, TensorProto.INT64, ["texts"]))
    whole = helper.make_graph(graph.nodes, "student", inputs, outputs, list(graph.weights.values()))
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(whole, opset_imports=[opset], ir_version=IR_VERSION, producer_name="fastkd")
    checker.check_model(model)
    return model


class Sentence(NamedTuple):
    """Names of tensors."""

    states: str
    """(texts, longest, 2 hidden) after the first BiLSTM"""
    mask: str
    """(texts, longest, 1)"""
    lengths: str
    """(texts) int32"""


class StudentGraph:
    """The nodes of a student; methods are its layers, from names of tensors to the name of a new one."""

    def __init__(self, student: BiAttentiveLSTM) -> None:
        self.arrays = arrays_of(student, "float32")
        self.hidden = student.config.hidden_size_per_direction
        self.pooling = tuple(student.config.pooling)
        self.last_side = len(student.integrators) - 1
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = output or f"{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def weight(self, name: str, array: Any) -> str:
        """A tensor of the file; what has the same name is the same."""
        from onnx import numpy_helper

        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, *values: int) -> str:
        return self.weight(f"integers.{values}", np.array(values, np.int64))

    def features(self, pairs: bool) -> str:
        """(texts, 2 sides of pooled states); a single text is read once by an integrator that both sides share."""
        if pairs:
            x, y = self.encode(*FIRST), self.encode(*SECOND)
            sides = [self.integrate(0, self.attend(x, y), x), self.integrate(self.last_side, self.attend(y, x), y)]
        else:
            x = self.encode(*SINGLE)
            mixed = self.attend(x, x)
            sides = [self.integrate(side, mixed, x) for side in range(self.last_side + 1)]
        return self.add("Concat", sides[0], sides[-1], axis=1)

    def encode(self, ids: str, lengths: str) -> Sentence:
        zero, one = (self.weight(f"scalar.{value}", np.array(value, np.int64)) for value in (0, 1))
        positions = self.add("Range", zero, self.add("Gather", self.add("Shape", ids), one), one)
        mask = self.add("Less", positions, self.add("Unsqueeze", lengths, self.integers(1)))
        counts = self.add("Cast", lengths, to=_data_type(np.int32))
        words = self.add("Gather", self.weight("words", self.arrays["words"]), ids)
        states = self.bilstm("encoder", words, counts)
        return Sentence(states, self.add("Unsqueeze", mask, self.integers(2)), counts)

    def bilstm(self, name: str, x: str, counts: str) -> str:
        """(texts, longest, inputs) -> (texts, longest, 2 hidden); ONNX wants time first and its gates i, o, f, c."""

        def stacked(part: str) -> Any:
            ways = [self.arrays[f"{name}.{way}.{part}"] for way in ("forward", "backward")]
            gates = np.stack(ways).reshape(2, 4, self.hidden, *ways[0].shape[1:])
            return gates[:, [0, 3, 1, 2]].reshape(2, 4 * self.hidden, *ways[0].shape[1:])

        bias = stacked("bias")
        parts = {"input": stacked("input"), "recurrent": stacked("recurrent"), "bias": np.hstack([bias, 0 * bias])}
        weights = [self.weight(f"{name}.{part}", array) for part, array in parts.items()]
        steps = self.add("Transpose", x, perm=[1, 0, 2])
        states = self.add("LSTM", steps, *weights, counts, direction="bidirectional", hidden_size=self.hidden)
        return self.add("Reshape", self.add("Transpose", states, perm=[2, 0, 1, 3]), self.integers(0, 0, -1))

    def attend(self, sentence: Sentence, other: Sentence) -> str:
        """[S, S - C, S ⊙ C] with C the other sentence as every token of this one attends to it."""
        states, swap = sentence.states, [0, 2, 1]
        affinity = self.add("MatMul", states, self.add("Transpose", other.states, perm=swap))
        weights = self.softmax(affinity, self.add("Transpose", other.mask, perm=swap), axis=2)
        context = self.add("MatMul", weights, other.states)
        return self.add("Concat", states, self.add("Sub", states, context), self.add("Mul", states, context), axis=2)

    def softmax(self, scores: str, mask: str, axis: int) -> str:
        return self.add("Softmax", self.where(mask, scores, LOWEST), axis=axis)

    def where(self, mask: str, values: str, otherwise: float) -> str:
        return self.add("Where", mask, values, self.weight(f"scalar.{otherwise}", np.array(otherwise, np.float32)))

    def integrate(self, side: int, mixed: str, sentence: Sentence) -> str:
        """(texts, pooled states) of one side."""
        states = self.bilstm(f"integrators.{side}", mixed, sentence.lengths)
        pooled = [getattr(self, f"_{kind}")(side, states, sentence) for kind in self.pooling]
        return self.add("Concat", *pooled, axis=1)

    def _max(self, side: int, states: str, sentence: Sentence) -> str:
        return self.add("ReduceMax", self.where(sentence.mask, states, LOWEST), axes=[1], keepdims=0)

    def _min(self, side: int, states: str, sentence: Sentence) -> str:
        return self.add("ReduceMin", self.where(sentence.mask, states, -LOWEST), axes=[1], keepdims=0)

    def _mean(self, side: int, states: str, sentence: Sentence) -> str:
        total = self.add("ReduceSum", self.where(sentence.mask, states, 0.0), self.integers(1), keepdims=0)
        count = self.add("Cast", sentence.lengths, to=_data_type(np.float32))
        return self.add("Div", total, self.add("Unsqueeze", count, self.integers(1)))

    def _attention(self, side: int, states: str, sentence: Sentence) -> str:
        name = f"scorers.{side}"
        scores = self.add("MatMul", states, self.weight(name, self.arrays[name][:, None]))
        weights = self.add("Transpose", self.softmax(scores, sentence.mask, axis=1), perm=[0, 2, 1])
        return self.add("Squeeze", self.add("MatMul", weights, states), self.integers(1))

    def linear(self, name: str, x: str) -> str:
        product = self.add("MatMul", x, self.weight(name, self.arrays[name].T))
        return self.add("Add", product, self.weight(f"{name}.bias", self.arrays[f"{name}.bias"]))


def _data_type(dtype: type[np.generic]) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
