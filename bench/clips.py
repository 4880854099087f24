"""Clips on disk for the loader's benchmarks, as `sdr prepare` writes them, and a video file."""

from collections.abc import Iterable, Iterator
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


def moving_pictures(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """[H, W, 3] uint8: a smooth pattern that moves, with a little noise, so that an encoder has something to do."""
    random = np.random.default_rng(0)
    row, column = np.mgrid[:height, :width]
    for number in range(count):
        waves = [np.sin((column * (c + 1) + 3 * row + 7 * number) / 40) for c in range(3)]
        noise = random.normal(scale=4, size=(height, width, 1))
        yield (127 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


def write_h264(path: Path, pictures: Iterable[np.ndarray]) -> Path:
    """An MP4 of these pictures, at least one, at 25 frames/s."""
    import av

    with av.open(str(path), "w") as container:
        stream = None
        for picture in pictures:
            if stream is None:
                stream = container.add_stream("libx264", rate=25)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
