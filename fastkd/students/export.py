"""A trained BiLSTM student as a folder that :mod:`fastkd.runtime` serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from fastkd.data.encode import tells_apart
from fastkd.runtime import Student, load
from fastkd.runtime import folder as student_folder
from fastkd.runtime.quantize import quantize
from fastkd.students.bilstm import BiAttentiveLSTM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS = ("float32", "bfloat16", "int8")

Arrays = dict[str, np.ndarray[Any, Any]]

SAMPLE = (
    "The film is slow at first, but the second half is wonderful.",
    "I would not watch it again.",
    "A quiet, funny and deeply human story!",
    "What were they thinking?",
    "Sales rose by 4.2 % in the third quarter, the company said on Tuesday.",
    "Prices fell.",
    "The committee will meet again in March to decide who pays for the bridge, which was closed after the storm.",
    "She said that nobody had told her.",
    "no",
    "How many people live in the capital of Peru?",
    "It is neither good nor bad; it is simply there, for two and a half hours, on a very large screen.",
    "The battery lasts a day, the camera is fine, and the price is hard to beat.",
)


class Agreement(NamedTuple):
    """What one task's logits of the runtime have in common with those of the torch model, over some texts."""

    task: str
    texts: int
    same_label: int
    """Texts with the same most likely label; of a regression, all."""
    largest_difference: float
    """Largest absolute difference of two logits."""


def export_student(
    model: str | Path,
    output: str | Path,
    *,
    precision: Precision = "int8",
    max_length: int = 128,
    texts: Sequence[str | tuple[str, str]] = SAMPLE,
) -> list[Agreement]:
    """Writes a new folder for :func:`fastkd.runtime.load` and compares its answers with the model's, task by task.

    ``model`` is a folder with a :class:`BiAttentiveLSTM` and its tokenizer, as ``fastkd distill`` leaves it;
    ``max_length`` the tokens per text, longer ones being cut, as in training. Nothing is calibrated: int8 rounds the
    weights as they are, and the runtime scales activations text by text.

    Raises:
        ValueError: an option is wrong, the model is another one, or its tokenizer has no fast form.
        FileExistsError: the output folder holds something.
        RuntimeError: in float32 the runtime's logits differ from the model's by more than 1e-3. The folder is not made.
    """
    from safetensors.numpy import save

    from fastkd.training.output import new_folder

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    source = open_student(model, max_length)
    description = {
        "sizes": sizes_of(source.student),
        "pooling": list(source.student.config.pooling),
        **describe(source, precision, max_length),
    }
    files = {
        student_folder.WEIGHTS: save(arrays_of(source.student, precision)),
        student_folder.TOKENIZER: source.tokenizer.backend_tokenizer.to_str().encode(),
    }
    with new_folder(output) as folder:
        student_folder.write(folder, student_folder.FORMAT, description, files)
        agreements = compare(source, load(folder), texts, max_length)
        if precision == "float32":
            check_float32(agreements)
    return agreements


class Source(NamedTuple):
    """What is exported."""

    student: BiAttentiveLSTM
    tokenizer: PreTrainedTokenizerBase


def open_student(model: str | Path, max_length: int) -> Source:
    """A student's folder, and the checks that every format needs."""
    from transformers import AutoModelForSequenceClassification

    from fastkd.training.pretrained import load_tokenizer

    if max_length < 4:
        raise ValueError(f"max_length must be at least 4, got {max_length}")
    if not Path(model).is_dir():
        raise FileNotFoundError(f"{model} is no folder: name the student's folder that `fastkd distill` made")
    student = AutoModelForSequenceClassification.from_pretrained(model)
    if not isinstance(student, BiAttentiveLSTM):
        raise ValueError(
            f"{model} holds a {type(student).__name__}; a BiAttentiveLSTM (--student bilstm) can be exported. "
            "Any other student is loaded and served by transformers itself"
        )
    tokenizer = load_tokenizer(model)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {model} must be a fast one, got {type(tokenizer).__name__}")
    return Source(student.eval(), tokenizer)


def describe(source: Source, precision: str, max_length: int) -> dict[str, Any]:
    """What the description of every format says."""
    return {
        "precision": precision,
        "tasks": {task: list(about["labels"]) for task, about in source.student.config.tasks.items()},
        "max_length": max_length,
        "token_types": tells_apart(source.tokenizer),
    }


def check_float32(agreements: Sequence[Agreement]) -> None:
    """Raises RuntimeError where logits in float32 differ by more than 1e-3."""
    worst = max(agreement.largest_difference for agreement in agreements)
    if not worst <= 1e-3:
        raise RuntimeError(f"the exported student's logits differ from the model's by {worst:.2g}; please report this")


@torch.inference_mode()
def compare(
    source: Source, served: Student, texts: Sequence[str | tuple[str, str]], max_length: int
) -> list[Agreement]:
    """Asks the model and the exported student the same texts, for every task."""
    student, tokenizer = source
    apart = tells_apart(tokenizer)
    agreements = []
    for task, about in student.config.tasks.items():
        expected = []
        for text in texts:
            parts = [[text]] if isinstance(text, str) else [[part] for part in text]  # batches of one, as in training
            encoding = tokenizer(*parts, truncation="longest_first", max_length=max_length, return_tensors="pt")
            if not apart:
                second = [part or 0 for part in encoding.sequence_ids(0)]
                encoding["token_type_ids"] = torch.tensor([second]).cummax(1).values
            expected.append(student(**encoding, task=task).logits[0].float().numpy())
        got, wanted = served.logits(texts, task=task), np.stack(expected)
        same = (got.argmax(1) == wanted.argmax(1)).sum() if about["labels"] else len(texts)
        agreements.append(Agreement(task, len(texts), int(same), float(np.abs(got - wanted).max())))
    return agreements


def sizes_of(student: BiAttentiveLSTM) -> dict[str, int]:
    config = student.config
    return {
        "words": config.vocab_size,
        "projection": config.projection_size,
        "hidden": config.hidden_size_per_direction,
        "sides": len(student.integrators),
        "head": config.head_size,
    }


@torch.no_grad()
def arrays_of(student: BiAttentiveLSTM, precision: Precision) -> Arrays:
    """The student's weights by the names that the runtime knows.

    The word embeddings come after projection and ReLU, which depend on the word alone: (vocabulary, projection). With
    ``"int8"`` a matrix is symmetric bytes with a float32 scale per output, and a word's row is bytes with 128 for zero,
    as the runtime makes them of any activation: the words lose nothing by it that int8 did not cost anyway.
    ``"bfloat16"`` stores float32, which the runtime packs.
    """
    arrays: Arrays = {}
    weights = {name: tensor.float() for name, tensor in student.state_dict().items()}

    def matrix(name: str, source: str) -> None:
        if precision == "int8":
            arrays[name], arrays[f"{name}.scale"] = quantize(weights[source].numpy())
        else:
            arrays[name] = weights[source].numpy()

    def bilstm(name: str) -> None:
        for direction in ("forward", "backward"):
            source = f"{name}.{direction}s"
            matrix(f"{name}.{direction}.input", f"{source}.weight_ih_l0")
            matrix(f"{name}.{direction}.recurrent", f"{source}.weight_hh_l0")
            bias = weights[f"{source}.bias_ih_l0"] + weights[f"{source}.bias_hh_l0"]
            arrays[f"{name}.{direction}.bias"] = bias.numpy()

    words = torch.cat(
        [student.projection(rows).relu().float() for rows in weights["word_embeddings.weight"].split(4096)]
    )
    arrays["words"] = words.numpy()
    if precision == "int8":
        quantized, arrays["words.scale"] = quantize(words.numpy())
        arrays["words"] = (quantized.astype(np.int16) + 128).astype(np.uint8)
    bilstm("encoder")
    for i in range(len(student.integrators)):
        bilstm(f"integrators.{i}")
        if "attention" in student.config.pooling:
            arrays[f"scorers.{i}"] = weights[f"pools.{i}.scorer.weight"][0].numpy()
    for task in student.heads:
        for name, layer in (("hidden", 0), ("output", 3)):
            matrix(f"heads.{task}.{name}", f"heads.{task}.{layer}.weight")
            arrays[f"heads.{task}.{name}.bias"] = weights[f"heads.{task}.{layer}.bias"].numpy()
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}
