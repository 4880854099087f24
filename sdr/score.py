"""A video file to a score, a timeline and the reason for it."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdr.config import TPAConfig, check, check_choice
from sdr.decoding import DECODERS, Limits
from sdr.detectors import Detector
from sdr.errors import SDRError, escape
from sdr.evaluate import in_halves
from sdr.faces import cut_clips, detect_faces, plan_clips, track_faces, why_no_clip
from sdr.fast import accelerate
from sdr.ftcn import FTCN
from sdr.model import SDRModel
from sdr.tpa import augment
from sdr.video import open_video

THUMBNAIL = 96  # pixels; small enough to keep every clip of a long run
Progress = Callable[[str, float], None]  # what is being done, share of the video done in 0..1


@dataclass(frozen=True)
class ScoreConfig:
    """How videos are scored.

    Args:
        stride: frames from the start of one clip to the next; FTCN's own test uses 1.
        min_frames: a face seen for fewer consecutive frames is not scored.
        batch_size: clips per forward pass; halved by itself when memory runs out.
        threshold: a video whose score is at or above it is called fake.
        reduce: ``mean`` over the clips of every face, or ``max`` over the faces' own means.
        views: ``same`` gives every branch the same clip, ``tpa`` gives each its augmentation, drawn from ``seed``.
        seed: of ``views="tpa"``.
        allow_damaged: score what could be read of a damaged video, and say so, instead of calling it inconclusive.
        decoder: ``pyav``; ``dali``, a GPU's video decoder where there is a GPU; ``auto``, DALI where there is a GPU
            and it takes the file, else PyAV. See :func:`sdr.video.open_video`.
        limits: what a file may ask for.
    """

    stride: int = 32
    min_frames: int = 8
    batch_size: int = 4
    threshold: float = 0.5
    reduce: Literal["mean", "max"] = "mean"
    views: Literal["same", "tpa"] = "same"
    seed: int = 0
    allow_damaged: bool = False
    decoder: Literal["pyav", "dali", "auto"] = "pyav"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("stride", "min_frames", "batch_size"):
            check(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        check(0 < self.threshold < 1, "threshold", "lie between 0 and 1", self.threshold)
        check_choice("reduce", self.reduce, ("mean", "max"))
        check_choice("views", self.views, ("same", "tpa"))
        check_choice("decoder", self.decoder, DECODERS)


@dataclass(frozen=True)
class ClipScore:
    """One scored clip: times in seconds, ``thumbnail`` its middle frame, [S, S, 3] uint8, or None: not kept."""

    track: int
    start: float
    end: float
    first_frame: int
    last_frame: int
    score: float
    thumbnail: np.ndarray | None


@dataclass(frozen=True)
class VideoScore:
    """One video's result; ``score`` is None exactly when the state is inconclusive.

    Args:
        path: as the user gave it.
        score: in [0, 1], 1 = fake.
        state: real, fake or inconclusive.
        reason: why it is inconclusive, or a warning about a score.
        clips: in the order of tracks and time.
        faces: face tracks that were found.
        seconds: time taken.
        duration: of the video, in seconds.
        top_clip: frames of the highest clip, [T, S, S, 3] uint8.
        truth: known label, where the user gave one.
        decoder: which one read the file, pyav or dali; empty where none could open it.
        again: the reason is the machine's and not the file's, so that another attempt may give a score.
    """

    path: str
    score: float | None
    state: Literal["real", "fake", "inconclusive"]
    reason: str = ""
    clips: tuple[ClipScore, ...] = ()
    faces: int = 0
    seconds: float = 0.0
    duration: float = 0.0
    top_clip: np.ndarray | None = None
    truth: int | None = None
    decoder: str = ""
    again: bool = False

    @property
    def label(self) -> int | None:
        """The decision: 1 = fake, 0 = real, None = inconclusive."""
        return None if self.score is None else int(self.state == "fake")


class Scorer:
    """A model, a face detector and their settings, ready to score any number of videos.

    Args:
        model: in evaluation mode, on its device; a copy of it is run by :mod:`sdr.fast`.
        detector: see :func:`sdr.detectors.load_detector`.
        config: how to score.
        cache: folder for detections; None keeps none.
    """

    def __init__(
        self,
        model: FTCN | SDRModel,
        detector: Detector,
        config: ScoreConfig | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        self.model, self.detector, self.cache = accelerate(model), detector, cache
        self.config = config or ScoreConfig()
        if self.config.views == "tpa" and isinstance(model, FTCN):
            raise ValueError("views must be 'same' for FTCN, which has one branch, got 'tpa'")

    def __call__(self, path: str | Path, *, truth: int | None = None, progress: Progress | None = None) -> VideoScore:
        """Score one file; whatever is wrong with it becomes an inconclusive result with its reason."""
        began = time.perf_counter()
        fields: dict = {"path": str(path), "truth": truth}
        try:
            self._score(path, fields, progress or (lambda what, share: None))
        except SDRError as error:
            fields |= {"score": None, "state": "inconclusive", "reason": error.reason, "again": error.again}
        except (OSError, RuntimeError, MemoryError) as error:  # of the machine or a library
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            fields |= {"score": None, "state": "inconclusive", "reason": escape(cause), "again": True}
        return VideoScore(**fields, seconds=time.perf_counter() - began)

    def _score(self, path: str | Path, fields: dict, progress: Progress) -> None:
        """Fills in the fields of the result; ``decoder`` also where it then fails."""
        config, shape = self.config, self.model.config
        if os.path.isdir(path):
            raise SDRError(path, "no video in this folder")
        with open_video(path, limits=config.limits, decoder=config.decoder) as video:
            info, fields["decoder"] = video.info, video.decoder
            expected = info.frames_declared or round(info.duration * info.fps) or config.limits.max_frames
            found = detect_faces(
                video, self.detector, cache=self.cache, progress=lambda n: progress("faces", 0.6 * min(1, n / expected))
            )
            if found.damage and not config.allow_damaged:
                raise SDRError(path, f"damaged: {found.damage}", "--allow_damaged true scores what could be read")
            tracks = track_faces(found.faces)
            plans = plan_clips(
                tracks,
                num_frames=shape.num_frames,
                stride=config.stride,
                size=shape.image_size,
                min_frames=config.min_frames,
            )
            if not plans:
                raise SDRError(path, why_no_clip(found.frames_read, tracks, config.min_frames))
            cut = cut_clips(video, plans, shape.image_size)
            clips, top = self._score_clips(
                cut, plans, found.times, progress=lambda n: progress("clips", 0.6 + 0.4 * n / len(plans))
            )
        fields |= judge(clips, config)
        fields |= {
            "reason": f"damaged: {found.damage}" if found.damage else "",
            "clips": clips,
            "faces": len(tracks),
            "duration": float(found.times[-1] - found.times[0]) if len(found.times) else 0.0,
            "top_clip": top,
        }

    def _score_clips(
        self,
        cut: Iterable[tuple[int, np.ndarray]],
        plans: Sequence,
        times: np.ndarray,
        progress: Callable[[int], None],
    ) -> tuple[tuple[ClipScore, ...], np.ndarray]:
        clips: dict[int, ClipScore] = {}
        best, top = (-1.0, 0), None
        cut = iter(cut)
        while batch := list(islice(cut, self.config.batch_size)):
            frames = torch.from_numpy(np.stack([clip for _, clip in batch])).permute(0, 4, 1, 2, 3)  # [N, 3, T, S, S]
            for (index, _), clip, score in zip(
                batch, frames, self.score_clips(frames, [i for i, _ in batch]), strict=True
            ):
                plan, small = plans[index], shrink(clip)
                first, last = int(plan.frames.min()), int(plan.frames.max())
                clips[index] = ClipScore(
                    plan.track, float(times[first]), float(times[last]), first, last, score, small[len(small) // 2]
                )
                if (score, -index) > best:  # of equal clips the first, as the report finds it
                    best, top = (score, -index), small
            progress(len(clips))
        return tuple(clips[i] for i in sorted(clips)), top

    @torch.inference_mode()
    def score_clips(self, clips: Tensor, samples: Sequence[int] | None = None) -> list[float]:
        """Scores of clips, uint8 [N, 3, T, S, S]; ``samples`` key the draws of ``views="tpa"``."""
        samples = list(range(len(clips))) if samples is None else list(samples)
        device = next(self.model.parameters()).device

        def run(clips: Tensor, samples: list[int]) -> Tensor:
            views = clips.to(device)
            if self.config.views == "tpa":
                V = self.model.config.num_branches
                views = augment(views, TPAConfig(), seed=self.config.seed, epoch=0, samples=samples, num_views=V)
            return self.model(views).logits.float().sigmoid()

        scores = in_halves(run, clips, samples, device=device)
        if not scores.isfinite().all():
            raise SDRError("weights", "the model gives no finite score for this clip")
        return scores.tolist()


def judge(clips: Sequence[ClipScore], config: ScoreConfig) -> dict[str, float | str]:
    """Score and state of a video with these clips."""
    score = reduce_scores(clips, config.reduce)
    return {"score": score, "state": "fake" if score >= config.threshold else "real"}


def reduce_scores(clips: Sequence[ClipScore], reduce: str) -> float:
    """Mean over all clips, or the highest of the tracks' means."""
    if reduce == "mean":
        return float(np.mean([clip.score for clip in clips]))
    tracks = {clip.track for clip in clips}
    return max(float(np.mean([clip.score for clip in clips if clip.track == track])) for track in tracks)


def shrink(clip: Tensor) -> np.ndarray:
    """uint8 [3, T, S, S] to [T, s, s, 3] uint8 with s at most THUMBNAIL, by area averaging."""
    frames = clip.transpose(0, 1)
    if frames.shape[-1] > THUMBNAIL:
        frames = F.interpolate(frames.float(), (THUMBNAIL, THUMBNAIL), mode="area").round().to(torch.uint8)
    return np.ascontiguousarray(frames.permute(0, 2, 3, 1).numpy())


CONTAINERS = "mp4 m4v mov qt 3gp mkv webm avi divx ts m2ts mts mpg mpeg vob"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in CONTAINERS.split())


def find_videos(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Files as given; a folder gives the video files below it by their suffix, sorted; each file once.

    A folder without any is given back itself; scoring it reports that.
    """
    seen = set()
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if is_video_name(p)) if os.path.isdir(path) else []
        for video in inside or [path]:
            if (real := os.path.realpath(video)) not in seen:
                seen.add(real)
                yield video


def is_video_name(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(path)


def score_video(
    path: str | Path,
    model: FTCN | SDRModel,
    detector: Detector,
    config: ScoreConfig | None = None,
    *,
    cache: Path | None = None,
) -> VideoScore:
    """Score one video file; see :class:`Scorer` for many."""
    return Scorer(model, detector, config, cache=cache)(path)
