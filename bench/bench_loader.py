"""Data: the loader from shards on disk to batches of views, and decoding of H.264, by wall clock."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import WrongAnswerError
from clips import NoiseClips, moving_pictures, write_h264
from ledger import NOT_MEASURED
from timing import Row, time_op

from sdr import SDRError, TPAConfig
from sdr.loading import LoaderConfig, TrainingLoader
from sdr.video import open_video

KIND = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, VIEWS = (16 if KIND == "cuda" else 4), 4
VIDEO = (250, 360, 640)  # frames, height, width: ten seconds
MAX_APART = 4.0  # of 255 in the mean: PyAV alone takes FFmpeg's short cuts from YUV to RGB


@pytest.mark.parametrize("augmentation", ["reference", "dali", *["triton"] * (KIND == "cuda")])
def bench_loader(benchmark, tmp_path, augmentation, device, small):
    frames, side = (2, 32) if small else (32, 224)
    clips = NoiseClips(tmp_path, 4 * BATCH, (frames, side, side, 3))
    config = LoaderConfig(augmentation=augmentation, readers=1 if KIND == "cpu" else 8)
    dtype = torch.bfloat16 if KIND == "cuda" else torch.float32
    key = {"batch_size": BATCH, "num_views": VIEWS, "device": device, "dtype": dtype}
    subject = f"loader, batches of {BATCH} x {VIEWS} views of {frames} x {side} x {side}"
    row = Row(subject, "loader", augmentation, clips=BATCH, wall=True, whole=True, baseline="", limit_s=10.0)
    row = replace(row, dtype=str(dtype).removeprefix("torch."))

    def check(batch) -> None:
        if list(batch.views.shape) != [BATCH, VIEWS, 3, frames, side, side] or not batch.views.isfinite().all():
            raise WrongAnswerError(f"a batch of {list(batch.views.shape)}")

    try:
        loader = TrainingLoader(clips, config, TPAConfig(), **key)
    except SDRError as error:
        pytest.skip(f"{NOT_MEASURED}{error}")
    with closing(iter(loader)) as batches:
        for _ in range(4):
            next(batches)  # until the batches made ahead no longer count
        time_op(benchmark, lambda: next(batches), None, (), row, check=check)


def decoded_by_worker(path: Path) -> tuple[int, np.ndarray]:
    """Frames, and the last one, through the separate process with limits."""
    with open_video(path) as video:
        return last_of(picture for _, picture in video.frames())


def decoded_plainly(path: Path) -> tuple[int, np.ndarray]:
    """The same by PyAV in this process."""
    import av

    with av.open(str(path)) as container:
        return last_of(frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))


def last_of(pictures: Iterator[np.ndarray]) -> tuple[int, np.ndarray]:
    count, last = 0, np.empty(0)
    for picture in pictures:
        count, last = count + 1, picture
    return count, last


@pytest.mark.parametrize("how", ["worker", "PyAV"])
def bench_decode(benchmark, tmp_path, how, small):
    count, height, width = (12, 48, 64) if small else VIDEO
    path = write_h264(tmp_path / "a.mp4", moving_pictures(count, height, width))
    plain_count, plain = decoded_plainly(path)

    def check(result: tuple[int, np.ndarray]) -> None:
        apart = np.abs(result[1].astype(int) - plain).mean()
        if result[0] != plain_count or apart > MAX_APART:
            raise WrongAnswerError(f"{result[0]} frames instead of {plain_count}, the last {apart:.2f} steps apart")

    calls = {"worker": decoded_by_worker, "PyAV": decoded_plainly}
    subject = f"decode {count} frames of H.264, {width} x {height}"
    row = Row(subject, "decode", how, whole=True, baseline="PyAV", threads=2, dtype="uint8", limit_s=5.0)
    plainly = partial(decoded_plainly, path)
    time_op(benchmark, partial(calls[how], path), None, (), row, check=check, baseline=plainly)
    if not benchmark.disabled:
        benchmark.extra_info["frames"] = count
        benchmark.extra_info["frames_per_s"] = count / benchmark.extra_info["cold_median_s"]
