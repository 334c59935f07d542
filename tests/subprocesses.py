"""Python in a process of its own, which finds this tree and its tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(*arguments: str, **environment: str) -> str:
    """What ``python *arguments`` prints; fails with what it complained about."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
