"""A shortcut in space: a cue that tells real from fake in training and says nothing, or the reverse, in testing.

Every clip of a marked cache carries fine stripes, the same in all its frames, so that time says nothing of them. Where
the cue is, they are horizontal; where it is not, the same stripes stand upright. No single pixel tells the two apart:
half of the pixels are lighter and half are darker by the same amount, wherever they lie. A convolution that looks
sideways tells them at a glance. A network whose kernels are Kt x 1 x 1 and whose pools are square gives a clip and its
transpose, rows for columns, the same score; so it can tell horizontal stripes on a face from upright ones only as far
as it tells a face from one that lies on its side. That is little, but not nothing: a pool takes the maximum of a stripe
and the face's own slope across it, and a face has steeper slopes from row to row than from column to column.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sdr.clip_cache import (
    MANIFEST,
    SETTINGS,
    ClipCache,
    clip_shape,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from sdr.config import check, check_choice
from sdr.errors import SDRError
from sdr.files import claim_folder, make_folder

Arrangement = Literal["aligned", "reversed", "absent"]
ARRANGEMENTS = ("aligned", "reversed", "absent")
FORMAT = 1  # part of a cache's settings: raise it when the same clips are marked in another way


@dataclass(frozen=True)
class Cue:
    """Stripes on every clip.

    Args:
        strength: of the stripes: grey levels above and below the clip, of 0..255.
        period: rows from one light stripe to the next; even.
    """

    strength: int = 8
    period: int = 2

    def __post_init__(self) -> None:
        for name, low in (("strength", 1), ("period", 2)):
            value = getattr(self, name)
            check(type(value) is int and low <= value <= 127, name, f"be a whole number in {low}..127", value)
        check(self.period % 2 == 0, "period", "be even", self.period)

    def stripes(self, size: int, *, cue: bool) -> np.ndarray:
        """[S, S] int16: horizontal stripes where the cue is, else the same stripes upright."""
        light = np.arange(size) % self.period < self.period // 2
        rows = np.where(light, self.strength, -self.strength).astype(np.int16)
        pattern = np.broadcast_to(rows[:, None], (size, size))
        return pattern if cue else pattern.T

    def mark(self, clip: np.ndarray, *, cue: bool) -> np.ndarray:
        """The clip, uint8 [T, S, S, 3], with its stripes."""
        return (clip + self.stripes(clip.shape[1], cue=cue)[:, :, None]).clip(0, 255).astype(np.uint8)


def has_cue(label: int, arrangement: Arrangement) -> bool:
    """Whether a clip of this label carries the cue: fakes where it is aligned, real ones where it is reversed."""
    return arrangement != "absent" and (label == 1) == (arrangement == "aligned")


def write_marked(source: Path, out: Path, cue: Cue, arrangements: Mapping[str, Arrangement]) -> int:
    """A copy of some splits of a finished clip cache whose clips carry the cue; nothing is done where it is there.

    Args:
        source: the cache, which stays as it is.
        out: a new or empty folder, or one that this wrote for the same cache and settings.
        cue: the stripes.
        arrangements: of the cue in each split that is copied.

    Returns:
        The number of clips.

    Raises:
        SDRError: the source is no finished cache, or ``out`` is another's or cannot be written.
    """
    for arrangement in arrangements.values():
        check_choice("arrangements", arrangement, ARRANGEMENTS)
    whole = ClipCache(source)
    mark = {"format": FORMAT, "source": whole.digest, **asdict(cue), "arrangements": dict(arrangements)}
    settings = whole.settings | {"cue": mark}
    claim_folder(out, SETTINGS, settings, command="the shortcut study")
    if (out / MANIFEST).is_file():
        return len(ClipCache(out))
    table = read_manifest(source)
    rows: dict[str, list[tuple[int, dict]]] = {}
    for index, values in enumerate(zip(*table.values(), strict=True)):
        row = dict(zip(table, values, strict=True))
        if row["split"] in arrangements:
            rows.setdefault(row["shard"], []).append((index, row))
    if missing := set(arrangements) - {split for split in table["split"] if split in arrangements}:
        raise SDRError(source, f"has no clip of the split {', '.join(sorted(missing))}")

    def marked(shard: str) -> Iterator[tuple[dict, np.ndarray]]:
        for index, row in rows[shard]:
            own = {name: value for name, value in row.items() if name not in ("sha256", "offset")}
            present = has_cue(row["label"], arrangements[row["split"]])
            yield own | {"settings": json.dumps(settings)}, cue.mark(whole.read(index), cue=present)

    for shard in rows:
        make_folder((out / shard).parent)
        write_shard(out / shard, marked(shard))
    return write_manifest(out, (row for shard in rows for row in read_shard(out / shard, clip_shape(settings))))


def marginal_gap(cache: ClipCache, cue: Cue) -> float:
    """How far the cue shows in single pixels: the total variation, 0..1, between the clips' values with it and without.

    Every clip is marked in both ways, so that nothing but the stripes differs. The largest of the three colours'.
    """
    counts = np.zeros((2, 3, 256), np.int64)
    for index in range(len(cache)):
        clip = cache.read(index)
        for present in (0, 1):
            marked = cue.mark(clip, cue=bool(present))
            counts[present] += [np.bincount(marked[..., c].ravel(), minlength=256) for c in range(3)]
    shares = counts / counts.sum(-1, keepdims=True)
    return float(np.abs(shares[0] - shares[1]).sum(-1).max() / 2)
