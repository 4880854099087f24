"""Tile configurations of the Triton kernels: measured or audited once, shipped as data, looked up without tuning."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

Tile = dict[str, int]

TILES = Path(__file__).with_name("tiles.json")
# shared memory of one program, bytes: sm_80's tiles also serve sm_86, sm_89 and sm_120, which have less than an A100
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448}


@cache
def load_tiles() -> dict[str, dict[str, list[Tile]]]:
    """Architecture to shape class to tiles, each with the fewest rows that it is meant for, ascending."""
    return json.loads(TILES.read_text())


@cache
def architecture(device: torch.device) -> str:
    """The key of ``tiles.json`` for a device; the newest where kernels are interpreted."""
    if device.type != "cuda":
        return "sm_90"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 under the interpreter, so that programs walk over tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision_class(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


@cache
def width_class(channels: int) -> int:
    """Channels rounded up to a power of two, at least 16: the smallest that a product of tiles takes."""
    return max(16, 1 << (channels - 1).bit_length())


_forced: ContextVar[Callable[[str, int], Tile] | None] = ContextVar("forced", default=None)


@contextmanager
def forced_tiles(choose: Callable[[str, int], Tile]) -> Iterator[None]:
    """Within the block ``choose_tile`` answers ``choose(shape_class, rows)``: how audit and tuner try tiles."""
    token = _forced.set(choose)
    try:
        yield
    finally:
        _forced.reset(token)


def tiles_of(shape_class: str, arch: str) -> list[Tile]:
    """Every shipped tile of a shape class; ValueError where there is none."""
    tiles = load_tiles()[arch].get(shape_class)
    if not tiles:
        raise ValueError(f"shape_class must be one of {TILES.name} for {arch}, got {shape_class!r}")
    return tiles


def tile_for_rows(tiles: list[Tile], rows: int) -> Tile:
    """The last tile that is meant for this many rows, without its ``min_rows``; ``tiles`` ascend."""
    tile = [t for t in tiles if t["min_rows"] <= rows][-1]
    return {name: value for name, value in tile.items() if name != "min_rows"}


def choose_tile(shape_class: str, rows: int, device: torch.device) -> Tile:
    """The tile of a shape class for this many rows.

    Args:
        shape_class: op, precision and widths, as ``tiles.json`` names them.
        rows: of the output, over all clips and branches: a small problem needs small tiles to fill the GPU.
        device: whose architecture decides.

    Raises:
        ValueError: no tile of this class is shipped for the architecture.
    """
    choose = _forced.get()
    if choose is not None:
        return choose(shape_class, rows)
    return tile_for_rows(tiles_of(shape_class, architecture(device)), rows)


def write_tiles(tiles: dict[str, dict[str, list[Tile]]], path: Path = TILES) -> None:
    """Write the data file: one tile a line, architectures and classes in order."""
    lines = []
    for arch in sorted(tiles):
        classes = []
        for name in sorted(tiles[arch]):
            rows = ",\n".join(f"      {json.dumps(tile)}" for tile in tiles[arch][name])
            classes.append(f"    {json.dumps(name)}: [\n{rows}\n    ]")
        lines.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(classes) + "\n  }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
