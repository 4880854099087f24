"""Compile ``csrc/<op>.cu`` with g++ and run its kernels on CPU tensors, in the place of ``_cuda.loader.launch``."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# the sums of a product may be contracted as nvcc contracts them
COMMAND = ["g++", "-std=c++20", "-O1", "-g", "-ffp-contract=fast", "-fPIC", "-shared", "-include", "device.h"]


def build(op: str, source: str) -> ctypes.CDLL:
    """The shared library of one ``.cu`` text, compiled anew only where a text of it or of the emulation is new."""
    files = {path.name: path.read_text() for path in sorted(CSRC.glob("*.*h")) if path.suffix in (".h", ".cuh")}
    files |= {path.name: path.read_text() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cuh", ".cpp")}
    files[f"{op}.cpp"] = source
    digest = hashlib.sha256("\0".join([*COMMAND, *files, *files.values()]).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"sdr_cuda_emulation_{os.getuid()}" / f"{op}_{digest}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=library.parent))
        for name, text in files.items():
            (folder / name).write_text(text)
        command = [*COMMAND, f"{op}.cpp", "runtime.cpp", "-o", "built.so"]
        subprocess.run(command, cwd=folder, check=True)
        (folder / "built.so").replace(library)  # another process may be doing the same
        shutil.rmtree(folder)
    return ctypes.CDLL(str(library))


def reach(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to its last."""
    if not tensor.numel():
        return 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in strides)) * tensor.element_size()


class Emulator:
    """Launches the kernels of one op; every launch runs twice, threads in either order, and must agree bit for bit."""

    def __init__(self, op: str, source: str | None = None):
        self.library = build(op, source or (CSRC / f"{op}.cu").read_text())
        self.library.emulate.restype = ctypes.c_char_p

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
        if 0 in grid:
            return
        slots, sizes = (ctypes.c_uint64 * len(args))(), (ctypes.c_int64 * len(args))(*[-1] * len(args))
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                slots[i], sizes[i] = value.data_ptr(), reach(value)
            elif isinstance(value, float):
                ctypes.c_float.from_buffer(slots, 8 * i).value = value
            else:
                slots[i] = (value or 0) % 2**64
        problem = self.library.emulate(
            getattr(self.library, f"emulate_{kernel}"), slots, sizes, len(args),
            *(ctypes.c_uint(size) for size in (grid[0], block[0])), ctypes.c_size_t(shared_bytes), backwards,
        )  # fmt: skip
        if problem:
            raise RuntimeError(f"{kernel}: {problem.decode()}")


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that a NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
