"""Records to batches: clips cut once into memory, then balanced batches whose order is a function of the seed."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdr.config import FTCNConfig, check
from sdr.datasets import Record
from sdr.detectors import load_detector
from sdr.errors import SDRError
from sdr.faces import cut_clips, detect_faces, plan_clips, track_faces
from sdr.video import open_video


@dataclass(frozen=True)
class ClipSet:
    """Clips of many videos.

    Args:
        clips: uint8, [N, 3, T, S, S].
        labels: int64, [N], 1 = fake.
        videos: int64, [N], index into ``records``.
        records: one per video that gave clips.
        failures: videos that gave none, each with its reason.
    """

    clips: Tensor
    labels: Tensor
    videos: Tensor
    records: tuple[Record, ...]
    failures: tuple[tuple[Record, str], ...]


def cut_record(
    record: Record, *, config: FTCNConfig, detector: str, weights: str | None, most: int, cache: Path | None
) -> np.ndarray | str:
    """Up to ``most`` clips of a record's longest face track, [N, 3, T, S, S] uint8, or why there is none."""
    try:
        with open_video(record.path) as video:
            found = detect_faces(video, worker_detector(detector, weights), cache=cache, progress=lambda n: None)
            if found.damage:
                return f"damaged: {found.damage}"
            tracks = sorted(track_faces(found.faces), key=lambda track: -len(track.boxes))[:1]
            plans = plan_clips(tracks, num_frames=config.num_frames, stride=config.num_frames, size=config.image_size)
            if not plans:
                return f"no face in enough of its {found.frames_read} frames"
            cut = dict(cut_clips(video, plans[:most], config.image_size, progress=lambda n: None))
        return np.stack([cut[i] for i in sorted(cut)]).transpose(0, 4, 1, 2, 3)
    except SDRError as error:
        return error.reason


DETECTORS: dict[tuple[str, str | None], Callable] = {}


def worker_detector(name: str, weights: str | None) -> Callable:
    """This process's detector, loaded once."""
    if (name, weights) not in DETECTORS:
        torch.set_num_threads(1)
        DETECTORS[name, weights] = load_detector(name, weights=weights)
    return DETECTORS[name, weights]


def load_clips(
    records: Sequence[Record],
    config: FTCNConfig,
    *,
    detector: str = "centerface",
    weights: str | None = None,
    clips_per_video: int = 1,
    workers: int = 2,
    max_bad: float = 0.01,
    cache: Path | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> ClipSet:
    """Decode, detect, track and cut every record, in ``workers`` processes.

    Raises:
        SDRError: more than ``max_bad`` of the videos gave no clip; names the first and its reason.
    """
    for name, value in (("workers", workers), ("clips_per_video", clips_per_video)):
        check(value >= 1, name, "be at least 1", value)
    check(0 <= max_bad <= 1, "max_bad", "lie in 0..1", max_bad)
    work = partial(cut_record, config=config, detector=detector, weights=weights, most=clips_per_video, cache=cache)
    good: list[tuple[Record, np.ndarray]] = []
    failures: list[tuple[Record, str]] = []
    # Ctrl-C is for this process alone, which then gives up what has not begun
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), **ignore)
    try:
        for record, result in zip(records, pool.map(work, records), strict=True):
            if isinstance(result, str):
                failures.append((record, result))
            else:
                good.append((record, result))
            progress(len(good) + len(failures))
    except BrokenProcessPool as error:
        raise SDRError("loading", "a worker process died, most likely for want of memory", "fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
    if not good or len(failures) > max_bad * len(records):
        record, reason = failures[0] if failures else (None, "no video was given")
        raise SDRError(
            record.path if record else "dataset",
            f"{reason}; {len(failures)} of {len(records)} videos gave no clip",
            f"--max_bad {max_bad} is the share that is accepted",
        )
    counts = torch.tensor([len(clips) for _, clips in good])
    videos = torch.arange(len(good)).repeat_interleave(counts)
    return ClipSet(
        clips=torch.from_numpy(np.concatenate([clips for _, clips in good])),
        labels=torch.tensor([record.label for record, _ in good])[videos],
        videos=videos,
        records=tuple(record for record, _ in good),
        failures=tuple(failures),
    )


def balanced_batches(labels: Tensor, batch_size: int, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """Indices of each batch: half real, half fake; the larger class once an epoch, the smaller as often as it takes.

    The order is a function of (seed, epoch). A last batch that would not be full is left out, unless it is the only
    one.
    """
    generator = np.random.default_rng((seed, epoch))
    classes = [np.flatnonzero(labels.numpy() == label) for label in (0, 1)]
    if not all(len(members) for members in classes):
        raise SDRError("dataset", f"training needs both classes, got {len(classes[0])} real and {len(classes[1])} fake")
    length = max(len(members) for members in classes)
    rounds = [-(-length // len(members)) for members in classes]
    real, fake = (
        np.concatenate([generator.permutation(members) for _ in range(n)])[:length]
        for members, n in zip(classes, rounds, strict=True)
    )
    half = max(1, batch_size // 2)
    for start in range(0, max(1, length - half + 1), half):
        yield np.concatenate([real[start : start + half], fake[start : start + half]]).tolist()
