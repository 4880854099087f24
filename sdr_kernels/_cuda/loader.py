"""Launches a kernel of ``csrc/`` by its name: built into ``sdr_kernels._C`` at install, else compiled when first used.

The second way is NVRTC, through CuPy: of the same sources, headers and flags, so that a launcher is written once.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sdr_kernels._csrc import digest
from sdr_kernels._ops import why_not_gpu

PACKAGE = Path(__file__).parent.parent
CSRC = (PACKAGE if (PACKAGE / "csrc").is_dir() else PACKAGE.parent) / "csrc"  # of a wheel, of a clone
OPT_IN_BYTES = 48 * 1024  # CUDA grants so much dynamic shared memory without being asked


@cache
def built() -> ModuleType | None:
    """``sdr_kernels._C``, or None where the install had no nvcc."""
    return import_module("sdr_kernels._C") if find_spec("sdr_kernels._C") else None


def why_not_cuda(device: torch.device) -> str:
    """Empty where the kernels of ``csrc/`` run on ``device``, else the reason why not."""
    problem = why_not_gpu(device)
    if problem:
        return problem
    module = built()
    if module is None:
        return "" if find_spec("cupy") else "sdr_kernels._C was not built, and CuPy, to compile csrc, is not installed"
    build = module.build_info()
    if csrc_digest() not in ("", build.get("csrc")):
        return "sdr_kernels._C was built from other sources than csrc: install again"
    architectures, capability = build["architectures"], torch.cuda.get_device_capability(device)
    fit = [architecture for architecture in architectures.split() if runs_on(architecture, capability)]
    if not fit:
        return f"sdr_kernels._C was built for {architectures}, {device} is sm_{capability[0]}{capability[1]}"
    return _driver_problem(module, only_ptx=all(architecture.startswith("compute_") for architecture in fit))


@cache
def csrc_digest() -> str:
    """Of the sources that lie here; empty where there are none."""
    return digest(CSRC) if CSRC.is_dir() else ""


def _driver_problem(module: ModuleType, only_ptx: bool) -> str:
    """Empty where the driver is new enough for the CUDA runtime in ``sdr_kernels._C``."""
    major, minor = map(int, module.build_info()["cuda"].split(".")[:2])
    driver = divmod(module.driver_version() // 10, 100)
    # a driver runs machine code of all of its major version's toolkits, and PTX of those not newer than it
    if driver >= (major, minor if only_ptx else 0):
        return ""
    return f"sdr_kernels._C was built with CUDA {major}.{minor}, the driver is for CUDA {driver[0]}.{driver[1]}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for sm_X or PTX for compute_X runs on a GPU; one with a letter runs on that GPU alone."""
    kind, number = architecture.split("_")
    if not number.isdigit():
        return number[:-1] == f"{capability[0]}{capability[1]}"
    made_for = divmod(int(number), 10)
    return made_for <= capability and (kind == "compute" or made_for[0] == capability[0])


def launch(
    kernel: str, x: Tensor, grid: Sequence[int], block: Sequence[int], args: Sequence, shared_bytes: int = 0
) -> None:
    """Launch a kernel on the current stream of ``x``'s device; nothing where the grid is empty.

    Args:
        kernel: its name, which begins with its source's.
        x: a CUDA tensor.
        grid: blocks, up to three dimensions.
        block: threads, up to three dimensions.
        args: for a pointer a tensor or None, for an int64_t an int, for a float a float.
        shared_bytes: of dynamic shared memory in a block.

    Raises:
        RuntimeError: the kernel is unknown or does not compile, an argument is of the wrong kind, or CUDA refuses.
    """
    if 0 in grid:
        return
    grid, block = ((*size, 1, 1)[:3] for size in (grid, block))
    values = [0 if arg is None else arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    stream = torch.cuda.current_stream(x.device)
    module = built()
    if module is None:
        _launch_nvrtc(kernel, x.device.index, grid, block, shared_bytes, stream, values)
    else:
        module.launch(kernel, x.device.index, grid, block, shared_bytes, stream.cuda_stream, values)


def _launch_nvrtc(kernel, device, grid, block, shared_bytes, stream, values) -> None:
    import cupy

    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(stream):
        function = _nvrtc_kernel(kernel, device)
        if shared_bytes > OPT_IN_BYTES:
            function.max_dynamic_shared_size_bytes = shared_bytes
        # CuPy would pack a Python float as a double
        packed = tuple((cupy.float32 if isinstance(value, float) else cupy.int64)(value) for value in values)
        function(grid, block, packed, shared_mem=shared_bytes)


@cache
def _nvrtc_kernel(kernel: str, device: int) -> Any:
    """A ``cupy.RawKernel``; its source is compiled unless the cache on disk has it."""
    import cupy

    capability = "{}{}".format(*torch.cuda.get_device_capability(device))
    module = cupy.RawModule(path=str(cached_cubin(source_of(kernel), capability)))
    return module.get_function(kernel)


def source_of(kernel: str) -> Path:
    """The file in ``csrc/`` by whose name the kernel's begins."""
    sources = [source for source in CSRC.glob("*.cu") if kernel.startswith(f"{source.stem}_")]
    if not sources:
        raise RuntimeError(f"csrc has no source for kernel {kernel}")
    return max(sources, key=lambda source: len(source.stem))


def flags() -> list[str]:
    """What nvcc is given too."""
    return [line for line in (CSRC / "flags.txt").read_text().splitlines() if line.startswith("-")]


def headers() -> dict[str, bytes]:
    """Our own headers by name."""
    return {path.name: path.read_bytes() for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh")])}


def cached_cubin(source: Path, capability: str) -> Path:
    """The cubin of a source in CuPy's cache, named after all that it depends on; compiled if it is not there."""
    from cupy.cuda import nvrtc

    depends = [source.read_bytes(), capability, flags(), headers(), nvrtc.getVersion()]
    name = f"sdr_{source.stem}_sm_{capability}_{hashlib.sha256(repr(depends).encode()).hexdigest()[:16]}.cubin"
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    if not (folder / name).exists():
        cubin = compile_cubin(source, capability)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(cubin)
        os.chmod(file.name, 0o644)  # others may share the cache, and a temporary file is its owner's alone
        os.replace(file.name, folder / name)  # another process never reads half a file
    return folder / name


def compile_cubin(source: Path, capability: str) -> bytes:
    """Compile a file of ``csrc/`` by NVRTC, which needs CuPy and CUDA's headers but no GPU.

    Args:
        source: the file.
        capability: of the GPU, as "90".

    Raises:
        RuntimeError: it does not compile, with the compiler's words, or CUDA's headers are not found.
    """
    from cuda.pathfinder import find_nvidia_header_directory
    from cupy.cuda import nvrtc

    include = find_nvidia_header_directory("cudart")
    if include is None:
        raise RuntimeError("NVRTC needs CUDA's headers: install nvidia-cuda-runtime, or set CUDA_HOME")
    own = headers()
    program = nvrtc.createProgram(source.read_text(), source.name, list(own.values()), [name.encode() for name in own])
    try:
        nvrtc.compileProgram(program, (*flags(), f"--gpu-architecture=sm_{capability}", f"-I{include}"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{source.name} does not compile: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
