"""What the commands share: their options made into configurations, refusals, missing packages, devices, progress."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from sdr.errors import SDRError

SYNTHETIC_NOTE = "A synthetic AUC shows that the pipeline works and nothing about real deepfakes."


@contextmanager
def refusals() -> Iterator[None]:
    """What a configuration's or a function's own checks refuse becomes one line."""
    try:
        yield
    except ValueError as error:
        raise SDRError("options", str(error)) from error


def settings(kind: type, options):
    """A configuration out of the command's options."""
    with refusals():
        return kind(**{name: options[name] for name in kind.__dataclass_fields__})


PACKAGES = {  # what each extra must have brought
    "faces": ("onnx", "onnxruntime"),
    "report": ("jinja2", "plotly", "PIL"),
    "prepare": ("pyarrow", "PIL"),
    "train": ("lightning_fabric", "sklearn", "tensorboard"),
    "hub": ("huggingface_hub",),
}


def require(*extras: str) -> None:
    """Raise SDRError for packages that are missing, before any work is done that would be lost for want of them."""
    missing = {extra: [name for name in PACKAGES[extra] if find_spec(name) is None] for extra in extras}
    names = [name for packages in missing.values() for name in packages]
    if names:
        wanted = ",".join(extra for extra, packages in missing.items() if packages)
        raise SDRError(", ".join(names), "not installed", f"pip install -c constraints.txt -e '.[{wanted}]'")


def pick_device(name: str):
    """``auto`` is a GPU where there is one."""
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SDRError("--device", f"must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of torchrun
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SDRError("--device", f"{name!r} cannot be used: {error}".split("\n")[0]) from error
    if device.type not in ("cpu", "cuda"):
        raise SDRError("--device", f"must be auto, cpu or cuda, got {name!r}")
    return device


def leave_processes() -> None:
    """Close what torchrun's processes have opened to one another: at the end of Python its threads would abort."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def pick_cache(options) -> Path | None:
    from sdr.faces import default_cache

    return Path(options.cache) if options.cache else default_cache()


@contextmanager
def progress_bars(*columns: str) -> Iterator:
    """rich's progress on standard error: description, bar, share, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    fields = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    fields += [TextColumn(column) for column in columns]
    with Progress(*fields, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        yield bars
