"""What is installed and built here, and which implementation of each op runs: ``python -m sdr_kernels.info``."""

import argparse
import json
import platform
from importlib import metadata
from importlib.util import find_spec
from types import FunctionType

import torch

import sdr_kernels
from sdr_kernels._cuda import loader
from sdr_kernels._ops import COMPOSED, IMPLS, select_impl

PACKAGES = ("sdr", "triton", "cupy-cuda12x", "cupy-cuda13x")


def info() -> dict:
    """Versions, the build, GPUs, and by op and kind of tensor what would run and why the rest would not."""
    return {
        "versions": versions(),
        "build": build(),
        "csrc": str(loader.CSRC),
        "gpus": [gpu(device) for device in range(torch.cuda.device_count())],
        "ops": {name: choices(op_of(name)) for name in public_ops()},
    }


def build() -> dict | None:
    """Of ``sdr_kernels._C``; None where it was not built."""
    module = loader.built()
    if module is None:
        return None
    found = module.build_info()
    return {**found, "stale": loader.csrc_digest() not in ("", found.get("csrc")), "kernels": module.kernels()}


def versions() -> dict[str, str | None]:
    """By name; None where it is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda of torch": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def gpu(device: int) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def public_ops() -> list[str]:
    return [name for name in sdr_kernels.__all__ if isinstance(getattr(sdr_kernels, name), FunctionType)]


def op_of(name: str) -> str:
    """The module that defines a public function, by whose name its implementations go."""
    return getattr(sdr_kernels, name).__module__.rpartition(".")[2]


def choices(op: str) -> dict[str, dict | None]:
    """Of a CUDA and of a CPU tensor: what "auto" takes, and why not the others; None for CUDA where there is no GPU."""
    return {
        "cuda": choice(op, torch.empty(0, device="cuda")) if torch.cuda.is_available() else None,
        "cpu": choice(op, torch.empty(0)),
    }


def choice(op: str, x: torch.Tensor) -> dict:
    """What runs for such a tensor, of a dtype and shape that kernels take."""
    has_cpu = op in COMPOSED or find_spec(f"sdr_kernels._cpu.{op}") is not None
    runs, why_not = None, {}
    for impl in IMPLS:
        try:
            chosen = select_impl(impl, x, op=op, has_cpu=has_cpu)
        except RuntimeError as error:
            why_not[impl] = str(error).removeprefix(f"impl={impl!r} cannot run: ")
            continue
        if impl == "auto":
            runs = chosen
        elif impl != runs:
            why_not[impl] = f"{runs} comes first" if runs else "SDR_STRICT is set"
    return {"runs": runs, "why_not": why_not}


def table(found: dict) -> str:
    """The same for reading."""
    build = found["build"]
    lines = [f"{name}: {version or 'not installed'}" for name, version in found["versions"].items()]
    lines.append(f"csrc: {found['csrc']}")
    if build:
        lines.append(f"sdr_kernels._C: CUDA {build['cuda']}, {build['architectures']}, {build['host_compiler']}")
        if build["stale"]:
            lines.append("sdr_kernels._C was built from other sources than csrc: install again")
        lines.append(f"kernels: {', '.join(build['kernels'])}")
    else:
        lines.append("sdr_kernels._C: not built")
    lines += [
        f"GPU: {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        for gpu in found["gpus"]
    ] or ["GPU: none"]
    for op, by_device in found["ops"].items():
        lines.append(op)
        for device, chosen in by_device.items():
            if chosen is None:
                lines.append(f"  {device} tensor: there is no GPU")
                continue
            lines.append(f"  {device} tensor: {chosen['runs'] or 'nothing'}")
            lines += [f"    not {impl}: {reason}" for impl, reason in chosen["why_not"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sdr_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    print(json.dumps(info(), indent=2) if options.json else table(info()))


if __name__ == "__main__":
    main()
