"""A trained BiLSTM student as a folder with an ONNX model, for runtimes other than fastkd's."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkd.runtime import folder as student_folder
from fastkd.runtime.student import Student, read_tokenizer
from fastkd.students.export import SAMPLE, Agreement, check_float32, compare, describe, open_student
from fastkd.students.onnx_graph import FIRST, OPSET, SECOND, SINGLE, build_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT, MODEL = "fastkd-student-onnx", "student.onnx"
SAMPLE_PAIRS = tuple(zip(SAMPLE[::2], SAMPLE[1::2], strict=True))


def export_onnx(
    model: str | Path,
    output: str | Path,
    *,
    pairs: bool = False,
    max_length: int = 128,
    texts: Sequence[str | tuple[str, str]] | None = None,
) -> list[Agreement]:
    """Writes a new folder with student.onnx and compares what ONNX Runtime makes of it with the model, task by task.

    Beside it lie tokenizer.json and student.json: tasks with their labels, names of the inputs and outputs,
    ``max_length``. ``pairs`` is whether the model is asked pairs of texts, see
    :func:`fastkd.students.onnx_graph.build_model`; ``texts`` are what is compared on, by default sample sentences. The
    rest is as in :func:`fastkd.students.export.export_student`.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: an option is wrong, the model is another one, or its tokenizer has no fast form.
        FileExistsError: the output folder holds something.
        RuntimeError: the logits differ from the model's by more than 1e-3. The folder is not made.
    """
    from fastkd.training.output import new_folder

    _check_installed()
    source = open_student(model, max_length)
    inputs = [*FIRST, *SECOND] if pairs else list(SINGLE)
    tasks = source.student.config.tasks
    description = describe(source, "float32", max_length) | {
        "opset": OPSET,
        "inputs": inputs,
        "outputs": {task: f"logits.{task}" for task in tasks},
    }
    files = {
        MODEL: build_model(source.student, pairs=pairs).SerializeToString(),
        student_folder.TOKENIZER: source.tokenizer.backend_tokenizer.to_str().encode(),
    }
    with new_folder(output) as folder:
        student_folder.write(folder, FORMAT, description, files)
        served = Student(
            OnnxModel(folder / MODEL, threads=1),
            description,
            read_tokenizer(folder / student_folder.TOKENIZER, max_length),
            threads=1,
        )
        agreements = compare(source, served, texts or (SAMPLE_PAIRS if pairs else SAMPLE), max_length)
        check_float32(agreements)
    return agreements


def _check_installed() -> None:
    for package in ("onnx", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(
                f"an ONNX model needs onnx and onnxruntime ({error}): pip install 'fastkd[onnx]'"
            ) from error


class OnnxModel:
    """student.onnx in ONNX Runtime, asked as the compiled model is."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, task: str, ids: NDArray[Any], lengths: NDArray[np.int64], pairs: bool) -> NDArray[np.float32]:
        """(texts, labels) of sentences that follow one another in ids."""
        feeds = {}
        names = (FIRST, SECOND) if pairs else (SINGLE,)
        begins = np.cumsum(lengths) - lengths
        for i, (of_ids, of_lengths) in enumerate(names):
            own = slice(i, None, len(names))
            feeds[of_ids], feeds[of_lengths] = pad(ids, begins[own], lengths[own]), lengths[own]
        logits: NDArray[np.float32] = self.session.run([f"logits.{task}"], feeds)[0]
        return logits


def pad(ids: NDArray[Any], begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(sentences, longest) with zeros beyond each sentence."""
    padded = np.zeros((len(lengths), lengths.max(initial=0)), np.int64)
    for row, begin, length in zip(padded, begins, lengths, strict=True):
        row[:length] = ids[begin : begin + length]
    return padded
