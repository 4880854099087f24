"""The calls of launchers that the audit compiles and the tuner times: the layers of the shipped models."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple

import torch

PRECISIONS = {"half": torch.bfloat16, "float32": torch.float32}
BRANCHES = 4
FRAMES = 32


class AuditCase(NamedTuple):
    """One call of a launcher in ``_triton/<op>.py``, whose ``audit_cases(precision)`` yields all that are shipped."""

    name: str  # widths and options, for a table
    launcher: Callable
    reference: Callable  # of the same arguments and result
    inputs: Callable[[int, torch.device], tuple]  # arguments for this many clips on this device, "meta" included
    matrix: bool = True  # its kernels multiply matrices: in half precision on tensor cores, or the audit fails


class Block(NamedTuple):
    """A bottleneck at its place in a model."""

    channels_in: int
    channels: int  # inner; the output has four times as many
    kernel: int
    frames: int  # of the input
    size: int  # H and W of the input
    pool: bool = False  # 2x2
    time_pool: bool = False


# stem width and kernel, image size: `paper` and `ftcn_released`, then `tiny`
STEMS = ((64, 5, 224), (8, 5, 64))
# every distinct block of `paper`, of which `ftcn_released` has all but the last three, then of `tiny`
BLOCKS = (
    Block(64, 64, 3, 32, 56),
    Block(256, 64, 3, 32, 56),
    Block(256, 64, 3, 32, 56, time_pool=True),
    Block(256, 128, 3, 16, 56, pool=True),
    Block(512, 128, 1, 16, 28),
    Block(512, 128, 3, 16, 28),
    Block(512, 256, 3, 16, 28, pool=True),
    Block(1024, 256, 1, 16, 14),
    Block(1024, 256, 3, 16, 14),
    Block(1024, 512, 1, 16, 14, pool=True),
    Block(2048, 512, 3, 16, 7),
    Block(2048, 512, 1, 16, 7),
    Block(8, 8, 3, 32, 16, time_pool=True),
    Block(32, 16, 3, 16, 16, pool=True),
)


def op_modules() -> list[str]:
    """Full names of the modules of Triton kernels that have cases; importing one needs Triton."""
    package = import_module("sdr_kernels._triton")
    names = (module.name for module in iter_modules(package.__path__))
    return [f"{package.__name__}.{name}" for name in names if not name.startswith("_")]


def cases_of(module: str, precision: str) -> Iterator[AuditCase]:
    return import_module(module).audit_cases(precision)


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, fan_in: int = 1) -> torch.Tensor:
    """Values that keep a layer's output near 1 where its weights are given their ``fan_in``."""
    return (torch.randn(shape, device=device) / fan_in**0.5).to(dtype)
