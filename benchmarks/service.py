"""What a service cares for besides speed: how a student starts, and how it answers beside a busy neighbour."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from benchmarks import student
from benchmarks.latency import Call
from benchmarks.onnx_peers import onnx_missing
from benchmarks.results import Row
from benchmarks.serving import make_row

STARTS, BLOCKS, BLOCK_SECONDS = 5, 3, 2.0
CASE = student.CASES[0]
CHECKOUT = Path(__file__).parent.parent
TEXT = " ".join(f"word{i}" for i in range(22))  # and two special tokens

SCRIPTS = {
    "fastkd": "import fastkd.runtime\nfastkd.runtime.load(folder).predict([text])",
    "ORT": "import numpy, onnxruntime, tokenizers\n"
    "ids = numpy.array([tokenizers.Tokenizer.from_file(folder + '/tokenizer.json').encode(text).ids])\n"
    "options = onnxruntime.SessionOptions()\n"
    "options.intra_op_num_threads = 1\n"
    "session = onnxruntime.InferenceSession(folder + '/student.onnx', options)\n"
    "session.run(None, {'ids': ids, 'lengths': numpy.array([ids.shape[1]])})",
    "torch": "import torch, transformers, fastkd.students\n"
    "tokenizer = transformers.AutoTokenizer.from_pretrained(folder)\n"
    "model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()\n"
    "with torch.inference_mode():\n"
    "    model(**tokenizer(text, return_tensors='pt'))",
}
"""From the first import to the first answer."""
MEMORY = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')), flush=True)"


@student.SERVING.extra
def starts() -> Iterator[Row]:
    """A new process each time, until its first answer, on one thread; and what memory it then holds."""
    if sys.platform != "linux":
        return
    with tempfile.TemporaryDirectory() as place:
        folders = exported(Path(place))
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in folders}
        for _ in range(STARTS + 1):  # the first brings the files into the cache of the system
            for name, folder in folders.items():
                found[name].append(_start(SCRIPTS[name.split()[0]], folder))
        for name, folder in folders.items():
            seconds, resident = zip(*found[name][1:], strict=True)
            files = sum(file.stat().st_size for file in folder.iterdir())
            yield make_row("student", "start", 1, name, seconds, resident_bytes=int(median(resident)), file_bytes=files)


def _start(script: str, folder: Path) -> tuple[float, int]:
    code = f"folder, text = {str(folder)!r}, {TEXT!r}\n{script}\n{MEMORY}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    begin = perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        kilobytes = process.stdout.readline()
        seconds = perf_counter() - begin
    if not kilobytes:
        raise RuntimeError(f"a student did not start:\n{code}")
    return seconds, 1024 * int(kilobytes)


def exported(place: Path) -> dict[str, Path]:
    """The student in every format, by the name of its system."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from fastkd.students.export import PRECISIONS, export_student
    from fastkd.students.onnx_export import export_onnx

    model = student.make_student(student.config_of(CASE))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(model.config.vocab_size - 4))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokens.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    folders = {"torch": place / "torch"}
    model.save_pretrained(folders["torch"])
    tokenizer.save_pretrained(folders["torch"])
    for precision in PRECISIONS:
        folders[f"fastkd {precision}"] = place / precision
        export_student(folders["torch"], place / precision, precision=precision)
    if onnx_missing(CASE) is None:
        folders["ORT"] = place / "onnx"
        export_onnx(folders["torch"], place / "onnx")
    return folders


@student.SERVING.extra
def neighbours() -> Iterator[Row]:
    """One request after the other, while the other cores are idle or burnt by another process, in turn."""
    problem = student.Student(CASE)
    systems = {"fastkd int8": 1, "torch": 2}
    started = {system.name: system.start for system in student.SERVING.systems if system.name in systems}
    calls = {name: started[name](problem, threads) for name, threads in systems.items()}
    found: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in ("idle", "busy") for name in systems}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(BLOCKS):
            for (kind, name), seconds in found.items():
                with _burnt_cores(kind == "busy"):
                    seconds += _requests(calls[name])
    finally:
        torch.set_num_threads(before)
    for (kind, name), seconds in found.items():
        yield make_row("student", f"{CASE.size}, torch on 2 threads", systems[name], name, seconds, neighbour=kind)


def _requests(call: Call) -> list[float]:
    seconds: list[float] = []
    end = perf_counter() + BLOCK_SECONDS
    while (begin := perf_counter()) < end:
        call()
        seconds.append(perf_counter() - begin)
    return seconds


@contextmanager
def _burnt_cores(busy: bool) -> Iterator[None]:
    count = max(1, (os.cpu_count() or 2) - 1) if busy else 0
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
