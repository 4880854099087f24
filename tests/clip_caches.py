"""Clip caches made without videos."""

import json
from pathlib import Path

import numpy as np

from sdr.clip_cache import SETTINGS, clip_shape, read_shard, write_manifest, write_shard

T, S = 8, 16


def flicker(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """Real: one random frame, held still. Fake: every second frame of such a clip is brighter. [T, size, size, 3]."""
    clip = np.repeat(rng.integers(60, 180, (1, size, size, 3)), T, axis=0)
    if label:
        clip[::2] += 60
    return clip.astype(np.uint8)


def make_cache(
    folder: Path,
    *,
    real: int = 4,
    fake: int = 4,
    clips: int = 1,
    size: int = S,
    splits: tuple[str, ...] = ("train",),
    seed: int = 0,
    methods: tuple[str, ...] = ("Flicker",),
    layout: str = "csv",
    synthetic: bool = True,
) -> Path:
    """A cache of ``real`` videos, and ``fake`` of each method, of ``clips`` clips in each split.

    Clips are as ``flicker`` draws them. Real and fake take turns where the first method has as many as there are real.
    """
    folder.mkdir(parents=True)
    settings = {"layout": layout, "synthetic": synthetic, "num_frames": T, "size": size}
    (folder / SETTINGS).write_text(json.dumps(settings))
    rng = np.random.default_rng(seed)
    rows = []
    first, *others = methods
    names = ["real", first] * real if real == fake else ["real"] * real + [first] * fake
    names += [method for method in others for _ in range(fake)]
    for split in splits:
        for number, method in enumerate(names):
            label = int(method != "real")
            row = {
                "video": f"{split}/{number:03d}.mp4",
                "label": label,
                "method": method,
                "split": split,
                "identity": f"{split}{number}",
                "video_sha256": f"{split}{number}",
                "frames": list(range(T)),
                "track": 0,
                "tracks": 1,
                "chosen_by": "longest",
                "left_out": 0,
                "source": "",
                "transform": [1.0, 0, 0, 0, 1, 0],
                "detector": "none",
                "decoder": "none",
                "settings": json.dumps(settings),
                "shard": f"shards/{split}/{number:03d}.tar",
            }
            path = folder / row["shard"]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_shard(path, ((row | {"clip": c}, flicker(rng, label, size)) for c in range(clips)))
            rows += read_shard(path, clip_shape(settings))
    write_manifest(folder, rows)
    return folder
