"""``fastkd export``: a trained student as a folder that is served without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastkd.cli.arguments import positive
from fastkd.cli.config import CommandParser

EXAMPLE = """example:
  fastkd export runs/mkd/student --precision int8 --out student
  fastkd predict student --task sst2 < texts.txt

Nothing is calibrated: int8 rounds the weights as they are. The command ends with how far the exported student agrees
with the torch model, on sample sentences or on those of --check."""


def add_parser(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="make a trained student ready to be served without torch",
        description="Write a trained BiLSTM student as a folder for fastkd.runtime and `fastkd predict`.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("model", help="the student's folder that `fastkd distill` made")
    add("--out", required=True, help="folder to write; must be new or empty")
    add(
        "--precision",
        choices=("int8", "bfloat16", "float32"),
        default="int8",
        help="of the weights: int8 is smallest and fastest, bfloat16 and float32 are closer (default int8)",
    )
    add("--max-length", type=positive(int), default=128, help="tokens per text, as in training (default 128)")
    add("--check", type=Path, help="file of texts to compare on, one per line; pairs with a tab between")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastkd.students.export import SAMPLE, export_student

    texts = SAMPLE if args.check is None else _read(args.check)
    agreements = export_student(args.model, args.out, precision=args.precision, max_length=args.max_length, texts=texts)
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f"{args.out}: {args.precision}, {size / 1e6:.1f} MB")
    for a in agreements:
        print(
            f"{a.task}: same label on {a.same_label} of {a.texts} texts, "
            f"logits differ by at most {a.largest_difference:.2g}"
        )
    return 0


def _read(path: Path) -> list[str | tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
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
