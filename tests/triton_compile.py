"""Compiles Triton kernels for GPUs that are not there and reports what they take of each multiprocessor.

A process that interprets Triton cannot compile it, so this file is also a program: jobs in on stdin, resources out on
stdout, both JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
CAPABILITIES = (80, 90, 100)


class Job(NamedTuple):
    """A kernel as one launch specialises it: ``signature`` names types of arguments, ``constexprs`` their values.

    An argument that is a named tuple has a dict of its fields' types; a field's name is "argument.field".
    """

    kernel: str  # "package.module:function"
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    aligned: list[str]  # arguments divisible by 16, as Triton would have seen at the launch
    options: dict[str, Any]  # num_warps and the like
    capability: int


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes of local memory of a thread: spilled registers


def compile_jobs(jobs: list[Job]) -> list[Resources]:
    """Compile in a fresh process, whatever this one does with Triton."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), env=environment, text=True, capture_output=True
    )
    if done.returncode:
        raise RuntimeError(f"compilation failed:\n{done.stdout}\n{done.stderr}")
    return [Resources(*resources) for resources in json.loads(done.stdout)]


def assert_nothing_spills(jobs: dict[Any, Job]) -> None:
    """Compile all of them; jobs go by names that a failure can show."""
    resources = dict(zip(jobs, compile_jobs([*jobs.values()]), strict=True))
    report = "\n".join(f"{name}: {found}" for name, found in resources.items())
    print(report)
    assert not any(found.stack for found in resources.values()), report


def _compile(job: Job) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = job.kernel.split(":")
    kernel = getattr(import_module(module), function)
    signature = {name: _types(name, kind, job.constexprs) for name, kind in job.signature.items()}
    constexprs = {_position(name, signature): value for name, value in job.constexprs.items()}
    attributes = {_position(name, signature): [["tt.divisibility", 16]] for name in job.aligned}
    source = ASTSource(kernel, signature, constexprs, attributes)
    target = GPUTarget("cuda", job.capability, 32)
    binary = triton.compile(source, target=target, options=job.options)
    return _resources(binary.asm["cubin"])


def _types(name: str, kind: Any, constexprs: dict[str, Any]) -> Any:
    if isinstance(kind, dict):
        return namedtuple(name, kind)(*(_types(f"{name}.{field}", of, constexprs) for field, of in kind.items()))
    return "constexpr" if name in constexprs else kind


def _position(name: str, signature: dict[str, Any]) -> tuple[int, ...]:
    argument, *field = name.split(".")
    return (list(signature).index(argument), *(signature[argument]._fields.index(each) for each in field))


def _resources(cubin: bytes) -> Resources:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in: {usage}")
    return Resources(int(found[1]), int(found[2]))


if __name__ == "__main__":
    print(json.dumps([_compile(Job(*job)) for job in json.load(sys.stdin)]))
