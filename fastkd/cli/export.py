"""``fastkd export``: a trained student as a folder that is served without torch, or as an ONNX model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd.cli.arguments import positive
from fastkd.cli.config import CommandParser
from fastkd.data.files import open_text

if TYPE_CHECKING:
    from fastkd.students.export import Agreement

Texts = list[str] | list[tuple[str, str]]

EXAMPLE = """example:
  fastkd export runs/mkd/student --precision int8 --output student
  fastkd predict student --task sst2 < texts.txt
  fastkd export runs/mkd/student --format onnx --output student-onnx

Nothing is calibrated: int8 rounds the weights as they are. The command ends with how far the exported student agrees
with the torch model, on sample sentences or on those of --check."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="make a trained student ready to be served without torch",
        description="Write a trained BiLSTM student as a folder for fastkd.runtime and `fastkd predict`, or for ONNX.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("model", help="the student's folder that `fastkd distill` made")
    add("--output", required=True, help="folder to write; must be new or empty")
    add(
        "--format",
        choices=("fastkd", "onnx"),
        default="fastkd",
        help="fastkd: for `fastkd predict` and fastkd.runtime (default); onnx: in float32, for other runtimes",
    )
    add("--pairs", action="store_true", help="with --format onnx: a model of pairs of texts, else of single ones")
    add(
        "--precision",
        choices=("int8", "bfloat16", "float32"),
        help="of the weights: int8 is smallest and fastest, bfloat16 is closer, float32 is closest "
        "(default int8; onnx: float32 alone)",
    )
    add("--max-length", type=positive(int), default=128, help="tokens per text, as in training (default 128)")
    add("--check", type=Path, help="file of texts to compare on, one per line; pairs with a tab between")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    texts = None if args.check is None else _read(args.check)
    agreements = (_onnx if args.format == "onnx" else _fastkd)(args, texts)
    size = sum(file.stat().st_size for file in Path(args.output).iterdir())
    print(f"{args.output}: {args.format}, {args.precision}, {size / 1e6:.1f} MB")
    for a in agreements:
        print(
            f"{a.task}: same label on {a.same_label} of {a.texts} texts, "
            f"logits differ by at most {a.largest_difference:.2g}"
        )
    return 0


def _fastkd(args: argparse.Namespace, texts: Texts | None) -> list[Agreement]:
    from fastkd.students.export import SAMPLE, export_student

    if args.pairs:
        raise ValueError("--pairs is for --format onnx: fastkd's own format takes single texts and pairs")
    args.precision = args.precision or "int8"
    return export_student(
        args.model, args.output, precision=args.precision, max_length=args.max_length, texts=texts or SAMPLE
    )


def _onnx(args: argparse.Namespace, texts: Texts | None) -> list[Agreement]:
    from fastkd.students.onnx_export import export_onnx

    args.precision = args.precision or "float32"
    if args.precision != "float32":
        raise ValueError(f"--precision of --format onnx must be float32, got {args.precision}")
    if texts is not None and isinstance(texts[0], tuple) != args.pairs:
        raise ValueError(f"--check: {args.check} holds {'single texts' if args.pairs else 'pairs'}; see --pairs")
    return export_onnx(args.model, args.output, pairs=args.pairs, max_length=args.max_length, texts=texts)


def _read(path: Path) -> Texts:
    with open_text(path) as file:
        lines = [line.rstrip("\r\n") for line in file]
    tabs = ["\t" in line for line in lines]
    if not lines:
        raise ValueError(f"--check: {path} holds no text")
    if not any(tabs):
        return list(lines)
    if not all(tabs):
        raise ValueError(
            f"--check: line {tabs.index(False) + 1} of {path} has no tab between two texts, others have one"
        )
    return [(first, second) for first, _, second in (line.partition("\t") for line in lines)]
