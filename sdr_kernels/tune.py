"""Time tiles of every shape class on this machine's GPU and write the fastest: a command for developers.

``python -m sdr_kernels.tune`` starts from the shipped tiles and tries their neighbours, a bounded number of rounds, for
one clip and for many. A tile that spills or does not fit is dropped; one that computes a wrong result ends the command.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from sdr_kernels._cases import BRANCHES, PRECISIONS, AuditCase, cases_of, op_modules
from sdr_kernels._ops import interpreted
from sdr_kernels._tiles import (
    SHARED_MEMORY,
    TILES,
    Tile,
    architecture,
    forced_tiles,
    load_tiles,
    tile_for_rows,
    tiles_of,
    write_tiles,
)

CLIPS = (1, 16)  # of BRANCHES each: latency and throughput
BLOCK_SIZES = range(16, 257)  # 16 is the smallest that a product takes
WARPS = range(2, 9)
STAGES = range(1, 9)
PROGRAMS = range(1, 9)

Key = tuple[tuple[str, int], ...]  # a tile that can be looked up
Timer = Callable[
    [AuditCase, int, str, Tile], float
]  # case, clips, shape class, tile to seconds; inf where it is no tile


@dataclass
class Winner:
    """The fastest tile of a shape class for some number of clips."""

    rows: float  # geometric mean of its problems
    tile: Tile
    seconds: float
    old: Tile
    old_seconds: float


def neighbours(tile: Tile) -> list[Tile]:
    """Every tile that differs in one value: a size halved or doubled, a stage more or less."""
    found = []
    for name, value in tile.items():
        allowed = {"num_warps": WARPS, "num_stages": STAGES, "PROGRAMS": PROGRAMS}.get(name, BLOCK_SIZES)
        changed = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [{**tile, name: new} for new in changed if new in allowed]
    return found


def key_of(tile: Tile) -> Key:
    """Without what says when to use it: the values that a launch takes."""
    return tuple((name, value) for name, value in tile.items() if name != "min_rows")


def fastest(starts: list[Tile], seconds: Callable[[Key], float], rounds: int) -> tuple[Tile, float]:
    """Climb from the best of ``starts`` to its fastest neighbour, at most ``rounds`` times; ``seconds`` is cached.

    Raises:
        RuntimeError: no tile runs.
    """
    best = min(map(key_of, starts), key=seconds)
    for _ in range(rounds):
        better = min([best, *map(key_of, neighbours(dict(best)))], key=seconds)
        if better == best:
            break
        best = better
    if math.isinf(seconds(best)):
        raise RuntimeError(f"no tile near {starts} fits this GPU")
    return dict(best), seconds(best)


def merged(few: Winner, many: Winner) -> list[Tile]:
    """Entries of a shape class: one tile where both agree, else two that meet half way, on a logarithmic scale."""
    if few.tile == many.tile:
        return [{"min_rows": 0, **few.tile}]
    return [{"min_rows": 0, **few.tile}, {"min_rows": round(math.sqrt(few.rows * many.rows)), **many.tile}]


def classes_of(cases: list[AuditCase], clips: int, device: torch.device) -> dict[str, list[tuple[AuditCase, int]]]:
    """Every shape class that the cases' launchers ask a tile of, with those cases and their rows."""
    found: dict[str, list[tuple[AuditCase, int]]] = {}
    arch = architecture(device)

    def choose(case: AuditCase, shape_class: str, rows: int) -> Tile:
        found.setdefault(shape_class, []).append((case, rows))
        return tile_for_rows(tiles_of(shape_class, arch), rows)

    for case in cases:
        with forced_tiles(partial(choose, case)):
            case.launcher(*case.inputs(clips, device))
    return found


def tune_cases(cases: list[AuditCase], device: torch.device, timer: Timer, rounds: int) -> dict[str, list[Winner]]:
    """For each shape class its winners, one for each of ``CLIPS``; the time of a tile is the sum over its cases."""
    winners: dict[str, list[Winner]] = {}
    for clips in CLIPS:
        for shape_class, problems in classes_of(cases, clips, device).items():
            seconds = cache(partial(seconds_of_tile, timer, [case for case, _ in problems], clips, shape_class))
            rows = math.exp(sum(math.log(rows) for _, rows in problems) / len(problems))
            starts = tiles_of(shape_class, architecture(device))
            old = tile_for_rows(starts, int(rows))
            tile, time = fastest(starts, seconds, rounds)
            winners.setdefault(shape_class, []).append(Winner(rows, tile, time, old, seconds(key_of(old))))
    return winners


def seconds_of_tile(timer: Timer, cases: list[AuditCase], clips: int, shape_class: str, key: Key) -> float:
    total = 0.0
    for case in cases:
        total += timer(case, clips, shape_class, dict(key))
        if math.isinf(total):
            break
    return total


@contextmanager
def kernels_launched() -> Iterator[list]:
    """Yields the list of the compiled kernels that launches within the block run."""
    from triton.runtime.jit import JITFunction

    kernels, run = [], JITFunction.run

    def recorded(self, *args, **kwargs):
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    JITFunction.run = recorded
    try:
        yield kernels
    finally:
        JITFunction.run = run


class GpuTimer:
    """Launches a case with a tile on a GPU: drops what does not fit, checks the result once, takes the median time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.truths: dict[AuditCase, tuple[torch.Tensor, float]] = {}
        self.checked: set[tuple[AuditCase, Key]] = set()

    def __call__(self, case: AuditCase, clips: int, shape_class: str, tile: Tile) -> float:
        from triton.errors import TritonError
        from triton.testing import do_bench

        arch = architecture(self.device)

        def choose(asked: str, rows: int) -> Tile:
            return dict(tile) if asked == shape_class else tile_for_rows(tiles_of(asked, arch), rows)

        with forced_tiles(choose):
            try:
                with kernels_launched() as kernels:
                    out = case.launcher(*self.inputs(case, CLIPS[0]))
            except TritonError:  # out of registers or shared memory, or no such tile for the compiler
                return math.inf
            if any(kernel.n_spills or kernel.metadata.shared > SHARED_MEMORY[arch] for kernel in kernels):
                return math.inf
            self.check(case, tile, judged(out))
            inputs = self.inputs(case, clips)
            return do_bench(lambda: case.launcher(*inputs), return_mode="median") / 1000

    def inputs(self, case: AuditCase, clips: int) -> tuple:
        torch.manual_seed(0)
        return case.inputs(clips, self.device)

    def check(self, case: AuditCase, tile: Tile, out: torch.Tensor) -> None:
        """Raise RuntimeError where the root mean square error is over twice the reference's in the same dtype."""
        if (case, key_of(tile)) in self.checked:
            return
        self.checked.add((case, key_of(tile)))
        if case not in self.truths:
            inputs = self.inputs(case, CLIPS[0])
            exact = judged(case.reference(*map(widened, inputs))).double()
            error = rms(judged(case.reference(*inputs)).double() - exact)
            self.truths[case] = exact, 2 * (error + torch.finfo(out.dtype).eps * rms(exact))
        exact, limit = self.truths[case]
        error = rms(out.double() - exact)
        if not error <= limit:
            raise RuntimeError(f"{case.name} with {tile} errs by {error:.2e}, allowed are {limit:.2e}")


def judged(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The result that is compared: the first of several."""
    return result[0] if isinstance(result, tuple) else result


def widened(value):
    """A floating tensor in float64, anything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def report(winners: dict[str, list[Winner]]) -> str:
    """Old and new tile and time of each shape class, a line for each number of clips."""
    lines = []
    for shape_class, pair in sorted(winners.items()):
        for clips, winner in zip(CLIPS, pair, strict=True):
            changed = {name: value for name, value in winner.tile.items() if winner.old[name] != value}
            times = f"{winner.old_seconds * 1e6:9.1f} us -> {winner.seconds * 1e6:9.1f} us"
            lines.append(f"{shape_class:40} {clips:3} clips x {BRANCHES}  {times}  {changed or 'unchanged'}")
    return "\n".join(lines)


def retuned(winners: dict[str, list[Winner]], arch: str) -> dict[str, dict[str, list[Tile]]]:
    """The shipped data with the winners' entries in place; other classes and architectures as they are."""
    tiles = copy.deepcopy(load_tiles())
    for shape_class, (few, many) in winners.items():
        tiles[arch][shape_class] = merged(few, many)
    return tiles


def main(arguments: list[str] | None = None) -> int:
    ops = [module.rpartition(".")[2] for module in op_modules()]
    parser = argparse.ArgumentParser(prog="python -m sdr_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=f"default: {' '.join(ops)}")
    parser.add_argument("--rounds", type=int, default=2, help="steps to a faster neighbour from the shipped tiles")
    parser.add_argument("--out", type=Path, default=TILES, help="the data file to write; default: the shipped one")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or interpreted():
        why = "TRITON_INTERPRET is set" if torch.cuda.is_available() else "there is no CUDA GPU"
        print(f"sdr_kernels.tune: tiles are timed on a GPU, and {why}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.allow_tf32 = False
    winners = {}
    for module in op_modules():
        if module.rpartition(".")[2] in options.ops:
            for precision in PRECISIONS:
                cases = list(cases_of(module, precision))
                tuned = tune_cases(cases, device, GpuTimer(device), options.rounds)
                print(report(tuned), flush=True)
                winners |= tuned
    write_tiles(retuned(winners, architecture(device)), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
