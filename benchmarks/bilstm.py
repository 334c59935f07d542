"""Benchmark of one bidirectional LSTM layer: inputs (tokens, I) to hidden states (tokens, 2H), weights random."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.latency import Call
from benchmarks.onnx_peers import Feeds, onnx_missing, onnx_runtime, openvino, openvino_missing, to_int8
from benchmarks.roofline import Peaks
from benchmarks.serving import Case, Problem, Serving
from benchmarks.torch_peers import torch_int8
from fastkd.runtime import BiLSTM


def ragged(sequences: int) -> tuple[int, ...]:
    """Log-normal lengths of mean 20, from 3 to 64, longest first: sorting is timed for nobody."""
    spread = 0.55
    drawn = np.random.default_rng(0).lognormal(np.log(20) - spread**2 / 2, spread, sequences)
    return tuple(sorted((int(n) for n in drawn.round().clip(3, 64)), reverse=True))


def dense(batch: int, length: int, inputs: int = 300, hidden: int = 256) -> Case:
    reason = "one request" if batch == 1 else "a full batch"
    return Case(
        "bilstm",
        f"{batch}x{length}x{inputs}x{hidden}",
        (length,) * batch,
        (inputs, hidden),
        f"{reason} of {length} tokens",
    )


def uneven(sequences: int) -> Case:
    return Case("bilstm", f"ragged-{sequences}x300x256", ragged(sequences), (300, 256), "texts are of many lengths")


CASES = [
    *(dense(1, length) for length in (32, 16, 128)),
    *(dense(batch, 32) for batch in (8, 32, 128)),
    *(uneven(sequences) for sequences in (8, 32, 128)),
    *(dense(batch, 32, inputs=512, hidden=512) for batch in (1, 32)),
]


class Layer(Problem):
    """torch and ONNX want time first, padded; fastkd wants the sequences one after the other."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.lengths, (self.inputs, self.hidden) = case.lengths, case.sizes
        self.ragged = len(set(self.lengths)) > 1
        self.lstm = nn.LSTM(self.inputs, self.hidden, bidirectional=True).eval()
        self.real = np.arange(max(self.lengths))[:, None] < np.array(self.lengths)
        self.padded = torch.randn(*self.real.shape, self.inputs) * torch.from_numpy(self.real)[..., None]
        self.rows = np.ascontiguousarray(self._flat(self.padded.numpy()))
        with torch.inference_mode():
            wide = nn.LSTM(self.inputs, self.hidden, bidirectional=True).double()
            wide.load_state_dict(self.lstm.state_dict())
            self.truth = self.answer(wide(self.pack(self.padded.double()))[0])

    def pack(self, padded: torch.Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, torch.tensor(self.lengths))

    def answer(self, raw: Any) -> NDArray[Any]:
        if isinstance(raw, PackedSequence):
            raw = pad_packed_sequence(raw)[0]
        states = np.asarray(raw)
        if states.ndim == 4:  # ONNX: (time, direction, batch, hidden)
            states = states.transpose(0, 2, 1, 3).reshape(*self.real.shape, -1)
        return states if states.ndim == 2 else self._flat(states)

    def _flat(self, states: NDArray[Any]) -> NDArray[Any]:
        """(time, batch, size) -> (tokens, size), sequence by sequence."""
        return states.transpose(1, 0, 2)[self.real.T]

    def limit(self, precision: str, peaks: Peaks) -> float:
        return peaks.bilstm(self.lengths, self.inputs, self.hidden, precision)

    @property
    def feeds(self) -> Feeds:
        x = {"x": self.padded.numpy()}
        return x | {"lengths": np.array(self.lengths, np.int32)} if self.ragged else x

    @cached_property
    def onnx(self) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        values = {name: tensor.numpy() for name, tensor in self.lstm.state_dict().items()}
        ends = ("l0", "l0_reverse")

        def gates(name: str) -> NDArray[np.float32]:
            """i, f, g, o of torch to i, o, f, c of ONNX."""
            return np.stack(
                [np.concatenate([np.split(values[f"{name}_{end}"], 4)[g] for g in (0, 3, 1, 2)]) for end in ends]
            )

        arrays = {
            "W": gates("weight_ih"),
            "R": gates("weight_hh"),
            "B": np.hstack([gates("bias_ih"), gates("bias_hh")]),
        }
        weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        names = ["x", "W", "R", "B", "lengths"] if self.ragged else ["x", "W", "R", "B"]
        node = helper.make_node("LSTM", names, ["states"], direction="bidirectional", hidden_size=self.hidden)
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", "batch", self.inputs])]
        if self.ragged:
            inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
        output = helper.make_tensor_value_info("states", TensorProto.FLOAT, ["time", 2, "batch", self.hidden])
        graph = helper.make_graph([node], "layer", inputs, [output], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return bytes(model.SerializeToString())

    @cached_property
    def onnx_int8(self) -> bytes:
        return to_int8(self.onnx)


SERVING = Serving("bilstm", CASES, Layer, {"float32": 1e-5, "bfloat16": 1e-3, "int8": 5e-2})


def _torch(layer: Layer, lstm: Any) -> Call:
    @torch.inference_mode()
    def call() -> Any:
        if not layer.ragged:
            return lstm(layer.padded)[0]
        return pad_packed_sequence(lstm(layer.pack(layer.padded))[0])[0]

    return call


@SERVING.system("torch", "float32")
def eager(layer: Layer, threads: int) -> Call:
    """Ragged batches as a PackedSequence, from and to padded ones."""
    return _torch(layer, layer.lstm)


@SERVING.system("torch compile", "float32")
def compiled(layer: Layer, threads: int) -> Call:
    torch.compiler.reset()
    return _torch(layer, torch.compile(layer.lstm, dynamic=False))


@SERVING.system("torch int8", "int8")
def dynamic_int8(layer: Layer, threads: int) -> Call:
    return _torch(layer, torch_int8(nn.Sequential(layer.lstm))[0])


@SERVING.system("ORT", "float32", objection=onnx_missing)
def ort(layer: Layer, threads: int) -> Call:
    return onnx_runtime(layer.onnx, layer.feeds, threads)


@SERVING.system("ORT int8", "int8", objection=onnx_missing)
def ort_int8(layer: Layer, threads: int) -> Call:
    return onnx_runtime(layer.onnx_int8, layer.feeds, threads)


def _openvino_objection(case: Case) -> str | None:
    if len(set(case.lengths)) > 1:
        return "its backward direction starts in the padding of ragged batches, which the check refuses"
    return openvino_missing(case)


@SERVING.system("OpenVINO", "float32", objection=_openvino_objection)
def vino(layer: Layer, threads: int) -> Call:
    return openvino(layer.onnx, layer.feeds, threads)


def _fastkd(precision: str) -> None:
    @SERVING.system(f"fastkd {precision}", precision)
    def start(layer: Layer, threads: int) -> Call:
        weights = {name: tensor.numpy() for name, tensor in layer.lstm.state_dict().items()}
        compiled_layer, lengths = BiLSTM(weights, precision=precision, threads=threads), np.array(layer.lengths)
        return lambda: compiled_layer(layer.rows, lengths)


for precision in ("float32", "bfloat16", "int8"):
    _fastkd(precision)
