"""The machine that a step runs on, and the small stand-in for it that rehearses the steps on a CPU."""

import gc
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch

from sdr import SDRConfig, ftcn_released, paper
from sdr.timing import REPEATS, Call, Ceilings, cpu_name, measure

ROOT = Path(__file__).resolve().parent.parent
REHEARSED = 3  # repeats
# as many stages and kinds of block as the presets, small enough for one core
SMALL = {
    "num_branches": 2,
    "num_frames": 4,
    "image_size": 32,
    "width": 8,
    "blocks": (1, 3, 1, 1),
    "embed_dim": 32,
    "num_heads": 2,
    "head_dim": 16,
    "mlp_dim": 64,
}


@dataclass(frozen=True)
class Machine:
    """Where a step runs, and what earlier steps measured there.

    Args:
        rehearsal: tiny shapes on the CPU instead of real ones on the GPU.
        report: the run's JSON so far.
    """

    rehearsal: bool
    report: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name to dtype; float32 first."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    @property
    def half(self) -> torch.dtype:
        """What the timings run in: bf16; float32 in the rehearsal, where CPUs are faster."""
        return torch.float32 if self.rehearsal else torch.bfloat16

    @property
    def half_name(self) -> str:
        """As "bfloat16"."""
        return str(self.half).removeprefix("torch.")

    def configs(self) -> dict[str, SDRConfig]:
        """The presets of full width; ``ftcn_released`` first."""
        presets = {"ftcn_released": ftcn_released(), "paper": paper()}
        return {name: replace(config, **SMALL) for name, config in presets.items()} if self.rehearsal else presets

    def scaled(self, real: int, small: int) -> int:
        """A size of the measurement, or of its rehearsal."""
        return small if self.rehearsal else real

    def release(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()  # a captured graph's tensors can hang in a cycle
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def results(self, step: str) -> dict:
        """What an earlier step found; empty where it did not run."""
        steps = json.loads(self.report.read_text())["steps"] if self.report.exists() else {}
        return steps.get(step, {}).get("result", {})

    @cached_property
    def rates(self) -> tuple[float, float] | None:
        """Measured FLOP/s and bytes/s; None where the ceilings were not measured."""
        ceilings = self.results("ceilings").get("ceilings")
        return Ceilings(**ceilings).rates(self.half) if isinstance(ceilings, dict) else None

    def measure(self, calls: Call | Sequence[Call], *, limit_s: float, wall: bool = False) -> dict[str, float | int]:
        """As :func:`sdr.timing.measure`; of the rehearsal's times none means anything, so it takes few."""
        repeats = REHEARSED if self.rehearsal else REPEATS
        return measure(calls, self.device, repeats=repeats, limit_s=limit_s, wall=wall)


def output_of(*command: str) -> str:
    """Standard output of a command, or "unknown" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def why_no_gpu() -> str:
    """Empty where the kernels can run here, else the reason in one line."""
    if not torch.cuda.is_available():
        return "no CUDA GPU found"
    major, minor = torch.cuda.get_device_capability()
    return (
        ""
        if major >= 8
        else f"compute capability 8.0 or later is needed, {torch.cuda.get_device_name()} has {major}.{minor}"
    )


def stamp(commit: str | None) -> dict[str, object]:
    """What a result must name to mean something later.

    Args:
        commit: names the code where there is no git; None asks git.
    """
    status = output_of("git", "status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else short_cpu_name(),
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "capability": list(torch.cuda.get_device_capability()) if gpu else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "commit": commit or output_of("git", "rev-parse", "HEAD"),
        "dirty": status if status == "unknown" else status != "",
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S%z"),
    }


def version_of(package: str) -> str:
    """As it is installed, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def short_cpu_name() -> str:
    """The CPU's model without marks and filler, and its cores, as "AMD EPYC 9R14, 2 cores"."""
    short = re.sub(r"\((R|TM)\)|\bCPU\b|\b\d+-Core\b|\bProcessor\b|@.*", " ", cpu_name(), flags=re.IGNORECASE)
    return f"{' '.join(short.split())}, {os.cpu_count()} cores"


def file_name(stamp: dict[str, object]) -> str:
    """<device>_<date>_<commit>.json in letters, digits, dashes and underscores."""
    device = re.sub(r"[^a-z0-9]+", "-", str(stamp["device"]).lower()).strip("-")
    dirty = "-dirty" if stamp["dirty"] is True else ""
    return f"{device}_{stamp['date']}_{str(stamp['commit'])[:7]}{dirty}.json"
