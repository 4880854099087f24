"""Clips on disk for the loader's benchmarks, as `sdr prepare` writes them."""

from pathlib import Path

import numpy as np
import torch

from sdr.clip_cache import ClipCache, read_shard, write_shard
from sdr.datasets import Record


class NoiseClips(ClipCache):
    """A cache of videos of one clip of noise, every second one fake; without a manifest, which would need PyArrow.

    Args:
        folder: to write the shards to; one that is there.
        count: of videos.
        shape: of a clip, (T, S, S, 3).
    """

    def __init__(self, folder: Path, count: int, shape: tuple[int, int, int, int]) -> None:
        self.folder, self.shape = folder, shape
        self._places = []
        noise = np.random.default_rng(0)
        for number in range(count):
            name = f"{number}.tar"
            write_shard(folder / name, [({"clip": 0}, noise.integers(0, 256, shape, np.uint8))])
            self._places.append((name, read_shard(folder / name, shape)[0]["offset"], 0))
        self.records = tuple(Record(Path(f"{n}.mp4"), n % 2, "train", "noise", str(n)) for n in range(count))
        self.videos = self.samples = torch.arange(count)
        self.labels = self.videos % 2
