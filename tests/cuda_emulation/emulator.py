"""Compile ``csrc/<op>.cu`` with g++ and run its kernels on CPU tensors, in the place of ``_cuda.loader.launch``."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# nvcc contracts products and sums too
COMMAND = ["g++", "-std=c++20", "-O1", "-g", "-ffp-contract=fast", "-fPIC", "-include", "device.h"]


def texts(folder: Path, *suffixes: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in suffixes}


def compile_once(name: str, files: dict[str, str], *options: str) -> Path:
    """What g++ makes of these files, kept in a temporary folder under a hash of all that it depends on."""
    digest = hashlib.sha256(repr((COMMAND, options, files)).encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"sdr_cuda_emulation_{os.getuid()}"
    result = cache / f"{digest}_{name}"
    if not result.exists():
        cache.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            for file, text in files.items():
                (Path(folder) / file).write_text(text)
            subprocess.run([*COMMAND, *options, "-o", name], cwd=folder, check=True)
            (Path(folder) / name).replace(result)  # another process may be doing the same
    return result


def build(op: str, sources: dict[str, str]) -> ctypes.CDLL:
    """The shared library of an op; the emulation's headers replace CUDA's, and ours of the same name."""
    runtime = compile_once("runtime.o", texts(HERE, ".h", ".cpp"), "-c", "runtime.cpp")
    headers = {name: text for name, text in sources.items() if not name.endswith(".cu")}
    files = headers | texts(HERE, ".h", ".cuh") | {f"{op}.cpp": sources[f"{op}.cu"]}
    return ctypes.CDLL(str(compile_once(f"{op}.so", files, "-shared", f"{op}.cpp", str(runtime))))


def reach(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to its last."""
    if not tensor.numel():
        return 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in strides)) * tensor.element_size()


class Emulator:
    """Launches the kernels of one op; every launch runs twice, threads in either order, and must agree bit for bit."""

    def __init__(self, op: str, changed: dict[str, str] | None = None):
        """``changed``: texts that replace those of ``csrc/``, by their file's name."""
        self.kernels = build(op, texts(CSRC, ".h", ".cuh", ".cu") | (changed or {}))
        self.kernels.emulate.restype = ctypes.c_char_p

    def launch(self, kernel: str, x: Tensor, grid: tuple, block: tuple, args: Sequence, shared_bytes: int = 0) -> None:
        """Like ``_cuda.loader.launch``; RuntimeError where a kernel leaves its tensors or races."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        before = [tensor.clone() for tensor in tensors]
        self._run(kernel, grid, block, args, shared_bytes, backwards=True)
        backwards = [tensor.clone() for tensor in tensors]
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)
        self._run(kernel, grid, block, args, shared_bytes, backwards=False)
        for tensor, values in zip(tensors, backwards, strict=True):
            if not torch.equal(bits(tensor), bits(values)):
                raise RuntimeError(f"{kernel}: the result depends on which thread runs first")

    def _run(self, kernel, grid, block, args, shared_bytes, *, backwards):
        slots, sizes = (ctypes.c_uint64 * len(args))(), (ctypes.c_int64 * len(args))(*[-1] * len(args))
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                slots[i], sizes[i] = value.data_ptr(), reach(value)
            elif isinstance(value, float):
                ctypes.c_float.from_buffer(slots, 8 * i).value = value
            else:
                slots[i] = (value or 0) % 2**64
        self.emulate(kernel, slots, sizes, grid[0], range(grid[0]), block[0], shared_bytes, backwards)

    def emulate(self, kernel, slots, sizes, grid, blocks, threads, shared_bytes, backwards=False):
        """Run some blocks of a launch; see runtime.cpp."""
        problem = self.kernels.emulate(
            getattr(self.kernels, f"emulate_{kernel}"), slots, sizes, len(slots),
            *map(ctypes.c_uint, (grid, blocks.start, blocks.stop, threads)), ctypes.c_size_t(shared_bytes), backwards,
        )  # fmt: skip
        if problem:
            raise RuntimeError(f"{kernel}: {problem.decode()}")


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that a NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
