"""Compile every shipped configuration of every kernel, without a GPU, and judge the machine code.

``python -m sdr_kernels.audit`` prints a table of registers, spills, shared memory and instructions, and ends with 1
where a rule is broken: a spill, more shared memory than the architecture has, a matrix kernel in half precision
without tensor-core instructions, a pointer offset that is not computed in 64 bits, a maximum that drops NaN, a float32
product rounded to TF32, floats added in any order by atomics, a sum whose lanes round differently, a shape class that
no case compiles.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from sdr_kernels._cases import PRECISIONS, AuditCase, cases_of, op_modules
from sdr_kernels._offsets import narrow_offsets
from sdr_kernels._tiles import SHARED_MEMORY, Tile, forced_tiles, load_tiles, tiles_of

CLIPS = 16  # of a case's inputs, which are never allocated


class Job(NamedTuple):
    """One case of one module for one architecture: what a compiling process does at a time."""

    module: str  # with an audit_cases
    precision: str
    index: int  # of the case
    arch: str


@dataclass
class Row:
    """A compiled kernel and the rules that it breaks."""

    arch: str
    shape_class: str  # empty where the launcher asked for no tile
    kernel: str
    case: str
    dtype: str
    tile: Tile
    registers: int
    stack: int  # bytes; registers spill to it
    local: int  # bytes
    shared: int  # bytes
    tensor_core: int  # instructions in PTX: mma or wgmma
    loads: int  # instructions in PTX that read global memory
    wide_loads: int  # of those, of 16 bytes a thread or by bulk copy
    broken: list[str]


class CompileOnlyDriver:
    """Stands in for a GPU's driver: names the target, so that a launch compiles as on that GPU and ends there."""

    def __init__(self, arch: str) -> None:
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def launches_compile(arch: str, number: int) -> Iterator[list[tuple]]:
    """Within the block every launch only compiles its kernel, for ``arch`` and with tile ``number`` of its shape class.

    Types, alignment and constants of the arguments are those of the launcher itself, so that what is audited is what
    runs. Yields the list of (shape class, tile, compiled kernel). Only for a process that launches nothing else.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    asked, compiled, run = [("", {})], [], JITFunction.run

    def choose(shape_class: str, _rows: int) -> Tile:
        tiles = tiles_of(shape_class, arch)
        tile = {name: value for name, value in tiles[min(number, len(tiles) - 1)].items() if name != "min_rows"}
        asked.append((shape_class, tile))
        return dict(tile)

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((*asked[-1], run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(CompileOnlyDriver(arch))
    JITFunction.run = compile_only
    try:
        with forced_tiles(choose):
            yield compiled
    finally:
        JITFunction.run = run


def audit_job(job: Job) -> list[Row]:
    """Compile one case with each tile of its shape classes, in a process where Triton's interpreter is off."""
    case = list(cases_of(job.module, job.precision))[job.index]
    rows: dict[str, Row] = {}
    number, tiles = 0, 1
    while number < tiles:
        with launches_compile(job.arch, number) as compiled:
            try:
                case.launcher(*case.inputs(CLIPS, torch.device("meta")))
            except Exception as error:  # a compiler's complaint is a line of the table, not the end of the audit
                problem = f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                rows[f"tile {number}"] = Row(
                    job.arch, "", job.module, case.name, "", {}, 0, 0, 0, 0, 0, 0, 0, [problem]
                )
        for shape_class, tile, kernel in compiled:
            tiles = max(tiles, len(tiles_of(shape_class, job.arch)) if shape_class else 1)
            if kernel.hash not in rows:
                rows[kernel.hash] = judge(kernel, case, job, shape_class, tile)
        number += 1
    return list(rows.values())


def judge(kernel, case: AuditCase, job: Job, shape_class: str, tile: Tile) -> Row:
    """The row of a compiled kernel."""
    registers, stack, local = resources(kernel.asm["cubin"])
    tensor_core = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\b", kernel.asm["ptx"]))
    loads = re.findall(r"\b(?:ld\.global|cp\.async\.bulk\.tensor|cp\.async\.c[ag])\.[^;]*", kernel.asm["ptx"])
    wide = [load for load in loads if re.search(r"\.v4\.b32|\.v2\.b64|\.bulk|, 0x10\b", load)]
    shared = kernel.metadata.shared
    broken = narrow_offsets(kernel.asm["ttir"]) + lost_values(kernel.asm["ttir"])
    if lanes_differ(kernel.asm["ptx"]):
        broken.append("a product is fused into a sum over lanes, whose results then differ")
    if stack or local:
        broken.append(f"spills: {stack} bytes of stack, {local} of local memory")
    if shared > SHARED_MEMORY[job.arch]:
        broken.append(f"{shared} bytes of shared memory, {job.arch} has {SHARED_MEMORY[job.arch]}")
    if case.matrix and job.precision == "half" and not tensor_core:
        broken.append("no tensor-core instruction in a matrix kernel")
    dtype = str(PRECISIONS[job.precision]).removeprefix("torch.")
    return Row(
        job.arch, shape_class, kernel.metadata.name, case.name, dtype, tile,
        registers, stack, local, shared, tensor_core, len(loads), len(wide), broken,
    )  # fmt: skip


def lost_values(ttir: str) -> list[str]:
    """What the interpreter cannot tell: maxima that drop NaN, products rounded to TF32, sums in an order of chance."""
    broken = []
    # inside a reduction, on scalars, Triton has no other
    if re.search(r"arith\.maxnumf [^\n]*: tensor<", ttir):
        broken.append("a maximum drops NaN")
    if re.search(r"tt\.dot [^\n]*inputPrecision = tf32[^\n]*: tensor<\w*xf32> \*", ttir):
        broken.append("a float32 product is rounded to TF32")
    if re.search(r"tt\.atomic_rmw f\w+", ttir):
        broken.append("floats are added by atomics, in any order")
    return broken


def lanes_differ(ptx: str) -> bool:
    """A multiply-add takes another lane's value as what it adds.

    Lanes of a butterfly then add the rounded product of one to the exact product of the other. The results that they
    hold, or write to one place of shared memory, differ in the last bit: racecheck's write-write hazard.
    """
    shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    shuffled |= {new for new, old in re.findall(r"mov\.b32\s+(%\w+),\s*(%\w+);", ptx) if old in shuffled}
    added = re.findall(r"fma\.rn(?:\.ftz)?\.f32\s+%\w+,\s*\S+,\s*\S+,\s*(%\w+);", ptx)
    return not shuffled.isdisjoint(added)


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread and its bytes of stack and of local memory, by the tool that Triton carries."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return int(registers), int(stack), int(local)


@contextmanager
def interpreter_off() -> Iterator[None]:
    """Within the block a new process does not interpret: the variable must be gone before it imports Triton."""
    value = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["TRITON_INTERPRET"] = value


def run_jobs(jobs: Iterable[Job], processes: int) -> list[Row]:
    """Rows of all jobs, in order; the processes are fresh, because Triton's interpreter may be on in this one."""
    with interpreter_off(), ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return [row for rows in pool.map(audit_job, jobs) for row in rows]


def shipped_jobs(archs: Iterable[str]) -> list[Job]:
    return [
        Job(module, precision, index, arch)
        for arch in archs
        for module in op_modules()
        for precision in PRECISIONS
        for index, _ in enumerate(cases_of(module, precision))
    ]


def uncovered_classes(rows: Iterable[Row], archs: Iterable[str]) -> list[str]:
    """Shape classes of ``tiles.json`` that no row has."""
    covered = {(row.arch, row.shape_class) for row in rows}
    return [f"{arch} {name}" for arch in archs for name in load_tiles()[arch] if (arch, name) not in covered]


def commit() -> str | None:
    """Of the checkout that holds this file; None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


HEADER = ("arch", "shape class", "kernel", "case", "tile", "regs", "spill", "shared", "tensor", "wide", "verdict")


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned text, one a line."""
    lines = [HEADER]
    for row in rows:
        tile = " ".join(f"{name.removeprefix('BLOCK_')}{value}" for name, value in row.tile.items())
        tile = tile.replace("num_warps", "warps").replace("num_stages", "stages")
        cells = (
            row.arch,
            row.shape_class,
            row.kernel.strip("_").removesuffix("_kernel"),
            row.case,
            tile,
            row.registers,
        )
        cells += (row.stack + row.local, row.shared, row.tensor_core, f"{row.wide_loads}/{row.loads}")
        more = f" and {len(row.broken) - 1} more" if len(row.broken) > 1 else ""
        lines.append((*map(str, cells), row.broken[0] + more if row.broken else "ok"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write versions and rows as JSON, a row a line."""
    import triton

    lines = [
        f'  "{name}": {json.dumps(value)},'
        for name, value in {"triton": triton.__version__, "torch": torch.__version__, "commit": commit()}.items()
    ]
    rows_text = ",\n".join(f"    {json.dumps(asdict(row))}" for row in rows)
    path.write_text("\n".join(["{", *lines, '  "rows": [', rows_text, "  ]", "}", ""]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdr_kernels.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=sorted(SHARED_MEMORY), help="default: all of them")
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")
    parser.add_argument("--out", type=Path, help="also write the table to this JSON file")
    options = parser.parse_args(arguments)
    if find_spec("triton") is None:
        print("the audit needs Triton: pip install -c constraints.txt triton", file=sys.stderr)
        return 2
    archs = options.arch or sorted(SHARED_MEMORY)
    rows = run_jobs(shipped_jobs(archs), options.jobs)
    rows.sort(key=lambda row: (row.arch, row.shape_class, row.kernel))
    print(table(rows))
    if options.out:
        write(rows, options.out)
    uncovered = uncovered_classes(rows, archs)
    for name in uncovered:
        print(f"no case compiles the shape class {name}", file=sys.stderr)
    broken = sum(bool(row.broken) for row in rows)
    print(f"{len(rows)} kernels compiled, {broken} break a rule, {len(uncovered)} shape classes without a case")
    return 1 if broken or uncovered else 0


if __name__ == "__main__":
    sys.exit(main())
