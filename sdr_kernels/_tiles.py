"""Tile configurations of the Triton kernels: measured or audited once, shipped as data, looked up without tuning."""

import json
from functools import cache
from pathlib import Path

import torch

TILES = Path(__file__).with_name("tiles.json")
# shared memory of one program, bytes: sm_80's tiles also serve sm_86, sm_89 and sm_120, which have less than an A100
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448}


@cache
def load_tiles() -> dict[str, dict[str, list[dict[str, int]]]]:
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
    """Streaming multiprocessors of a GPU; 2 where kernels are interpreted, so that programs walk over tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision_class(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


@cache
def width_class(channels: int) -> int:
    """Channels rounded up to a power of two, at least 16: the smallest that a product of tiles takes."""
    return max(16, 1 << (channels - 1).bit_length())


def choose_tile(shape_class: str, rows: int, device: torch.device) -> dict[str, int]:
    """The tile of a shape class for this many rows.

    Args:
        shape_class: op, precision and widths, as ``tiles.json`` names them.
        rows: of the output, over all clips and branches: a small problem needs small tiles to fill the GPU.
        device: whose architecture decides.
    """
    tiles = load_tiles()[architecture(device)][shape_class]
    tile = [t for t in tiles if t["min_rows"] <= rows][-1]
    return {name: value for name, value in tile.items() if name != "min_rows"}


def write_tiles(tiles: dict[str, dict[str, list[dict[str, int]]]], path: Path = TILES) -> None:
    """Write the data file: one tile a line, architectures and classes in order."""
    lines = []
    for arch in sorted(tiles):
        classes = []
        for name in sorted(tiles[arch]):
            rows = ",\n".join(f"      {json.dumps(tile)}" for tile in tiles[arch][name])
            classes.append(f"    {json.dumps(name)}: [\n{rows}\n    ]")
        lines.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(classes) + "\n  }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
