"""Whether a clip cache holds what its manifest says, and whether its splits keep identities apart."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdr.clip_cache import MANIFEST, SHARDS, clip_shape, leaks, read_manifest, read_settings, read_shard, require_inside
from sdr.errors import SDRError


class Count(NamedTuple):
    """Videos and clips of one method in one split."""

    split: str
    method: str
    label: int
    videos: int
    clips: int


@dataclass(frozen=True)
class CacheReport:
    """What a check found: counts by split and method, and every problem in one line each."""

    counts: tuple[Count, ...]
    problems: tuple[str, ...]


def check_cache(
    folder: Path, *, threads: int = 2, progress: Callable[[int, int], None] = lambda done, total: None
) -> CacheReport:
    """Compare the manifest with the shards, checksums included, and look for leaks between splits.

    Args:
        folder: of the cache.
        threads: that read and hash.
        progress: called with the shards checked and all shards.

    Raises:
        SDRError: there is no finished cache, or its manifest is damaged.
    """
    shape = clip_shape(read_settings(folder))
    table = read_manifest(folder)
    rows: dict[str, list[dict]] = {}
    for values in zip(*table.values(), strict=True):
        row = dict(zip(table, values, strict=True))
        rows.setdefault(row["shard"], []).append(row)
    problems = list(leaks(table))
    with ThreadPoolExecutor(threads) as pool:
        checks = pool.map(lambda item: check_shard(folder, shape, *item), rows.items())
        for done, found in enumerate(checks, 1):
            problems += found
            progress(done, len(rows))
    for path in sorted((folder / SHARDS).rglob("*.tar")):
        if path.relative_to(folder).as_posix() not in rows:
            problems.append(str(SDRError(path, f"is not in {MANIFEST}")))
    return CacheReport(count(table), tuple(problems))


def check_shard(folder: Path, shape: tuple[int, ...], name: str, rows: list[dict]) -> list[str]:
    """What is wrong with one shard, at most one line."""
    path = folder / name
    try:
        require_inside(os.path.realpath(folder), path)
        if read_shard(path, shape) != rows:
            raise SDRError(path, f"does not hold what {MANIFEST} says")
        with open(path, "rb") as file:
            for row in rows:
                file.seek(row["offset"])
                if hashlib.sha256(file.read(shape[0] * shape[1] * shape[2] * shape[3])).hexdigest() != row["sha256"]:
                    raise SDRError(path, f"clip {row['clip']} is damaged: its checksum is another")
    except SDRError as error:
        return [str(error)]
    except OSError as error:
        return [str(SDRError(path, f"cannot be read: {error.strerror}"))]
    return []


def count(table: dict[str, list]) -> tuple[Count, ...]:
    """Videos and clips by split, label and method."""
    keys = list(zip(table["split"], table["label"], table["method"], strict=True))
    clips = Counter(keys)
    videos = Counter(key for key, _ in {(key, shard) for key, shard in zip(keys, table["shard"], strict=True)})
    return tuple(
        Count(split, method, label, videos[s], clips[s]) for s in sorted(clips) for split, label, method in [s]
    )
