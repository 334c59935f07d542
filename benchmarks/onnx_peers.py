"""ONNX Runtime and OpenVINO, as the benchmarks of answers ask them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from benchmarks.latency import Call
from benchmarks.serving import Case

Feeds = Mapping[str, NDArray[Any]]


def onnx_missing(case: Case) -> str | None:
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: pip install 'fastkd[bench]'" if missing else None


def openvino_missing(case: Case) -> str | None:
    if find_spec("openvino") is None:
        return "openvino not installed: pip install 'fastkd[bench]'"
    return onnx_missing(case)


def onnx_runtime(model: bytes, feeds: Feeds, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)[0]


def openvino(model: bytes, feeds: Feeds, threads: int) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    return lambda: request.infer(dict(feeds), share_inputs=True, share_outputs=True)[0]


def _has_vnni() -> bool:
    """Whether the CPU sums products of bytes in 32 bits; without, ONNX Runtime saturates pairs of them in 16."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return capabilities["architecture"] != "x86_64" or capabilities["avx512_vnni"] or capabilities["avx_vnni"]


def to_int8(model: bytes) -> bytes:
    """ONNX Runtime's dynamic quantization, a scale per output channel, in 7 bits where 8 would overflow its sums."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it advises a preparation that these graphs do not need
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": not _has_vnni()}
            quantize_dynamic(onnx.load_from_string(model), path, **options)
            return path.read_bytes()
    finally:
        logging.disable(logging.NOTSET)
