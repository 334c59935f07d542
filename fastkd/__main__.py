"""``python -m fastkd``: what is built, what this CPU has, and which backend answers each op here."""

import platform
from importlib.metadata import PackageNotFoundError, version

import fastkd


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backends() -> list[str]:
    import torch

    from fastkd import ops
    from fastkd.ops import _extension

    lines = []
    for op in ops.__all__:
        for device in ("cpu", "cuda"):
            name, reason = _extension.fused_backend(device, op)
            if device == "cuda" and not torch.cuda.is_available():
                reason = f"{reason}; no CUDA device here"
            lines.append(f"  {op:<16} {device:<5} {name or 'reference':<10} {reason}")
    return lines


def _runtime() -> str:
    try:
        from fastkd import _runtime
    except ImportError as error:
        return f"not built ({error})"
    return f"fastkd._runtime, {_runtime.cpu()}"


def main() -> None:
    import torch

    packages = ("torch", "triton", "transformers", "datasets")
    print(f"fastkd {fastkd.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages  " + ", ".join(f"{name} {_version(name)}" for name in packages))
    print(f"CPU       {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"GPU       {gpu}")
    print(f"runtime   {_runtime()}")
    print("float32, bfloat16 and float16 take these backends; float64 takes the reference:")
    print("\n".join(_backends()))


if __name__ == "__main__":
    main()
