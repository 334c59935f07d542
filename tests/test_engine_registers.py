"""The engine's products of floats, and of bytes by VNNI, as compiled: no sum and no weight goes through memory."""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from test_simd import FLAGS, NATIVE, ROOT

LEAST = 8
"""Products in a step of the smallest tile."""
MOST = {"avx2": 3, "avx512": 6}
"""Rows of the largest tile."""
PRODUCT = {"floats": "vfmadd", "bytes": r"(\{vex\} )?vpdpbusd"}


@pytest.fixture(scope="module")
def assembly(tmp_path_factory) -> str:
    if platform.machine() != "x86_64" or shutil.which(NATIVE) is None:
        pytest.skip(f"needs {NATIVE} on x86_64")
    path = tmp_path_factory.mktemp("assembly") / "lstm.s"
    command = [NATIVE, *FLAGS, "-S", "csrc/runtime/lstm.cpp", "-o", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path.read_text()


def innermost_loops(assembly: str, namespace: str) -> Iterator[list[str]]:
    """The instructions of each loop without a jump inside, of the functions in a namespace."""
    ours, since = False, {}
    body: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"([\w.]+):", line):
            if not label[1].startswith("."):
                ours = f"{len(namespace)}{namespace}" in label[1]
            since[label[1]] = len(body)
        elif line.startswith("\t") and not line.startswith("\t."):
            body.append(line.strip())
            jump = re.match(r"j\w+\s+(\S+)", body[-1])
            if ours and jump and jump[1] in since:
                loop = body[since[jump[1]] :]
                if sum(instruction.startswith("j") for instruction in loop) == 1:
                    yield loop


@pytest.mark.slow
@pytest.mark.parametrize("kind", PRODUCT)
@pytest.mark.parametrize("target", MOST)
def test_products_stay_in_registers(assembly, target, kind):
    products = {}
    for loop in innermost_loops(assembly, target):
        count = sum(re.match(PRODUCT[kind], instruction) is not None for instruction in loop)
        if count >= LEAST:
            products[count] = [*products.get(count, []), *(i for i in loop if re.search(r"\(%rsp", i))]
    assert max(products) == 4 * MOST[target], f"loops of {sorted(products)} products"
    assert not any(products.values()), products
