"""One video of a dataset to its clips: decode, detect, follow, choose the face, cut. Runs in a process of its own."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sdr.clip_cache import SHARDS, write_shard
from sdr.config import check_choice, check_count
from sdr.datasets import Record
from sdr.decoding import DECODERS, DecoderName, Limits
from sdr.detectors import Detector, load_detector
from sdr.errors import SDRError, escape
from sdr.faces import ClipPlan, Track, cut_clips, detect_faces, plan_clips, track_faces, why_no_clip
from sdr.files import make_folder, remove, write_atomic
from sdr.frame_lists import open_frames
from sdr.layouts import frame_gap_reason
from sdr.video import Video, open_video, sample_clips

NAME_LENGTH = 60  # characters of a shard's name that are the video's own; a hash tells the rest


@dataclass(frozen=True)
class PrepareConfig:
    """How clips are cut.

    Args:
        num_frames: frames T of a clip; a shorter track is mirrored to this length.
        size: height and width S of a clip's frames, in pixels.
        stride: frames from the start of one clip to the next.
        min_frames: a face seen for fewer consecutive frames gives no clip.
        clips_per_video: at most, spread evenly over the track; None keeps all. One of 32 x 224 x 224 takes 4.8 MB.
        decoder: ``pyav``, ``dali`` (a GPU's NVDEC), or ``auto``, which takes DALI where it works.
        limits: what a file may ask for.
    """

    num_frames: int = 32
    size: int = 224
    stride: int = 32
    min_frames: int = 8
    clips_per_video: int | None = None
    decoder: DecoderName = "pyav"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("num_frames", "size", "stride", "min_frames"):
            check_count(name, getattr(self, name))
        if self.clips_per_video is not None:
            check_count("clips_per_video", self.clips_per_video)
        check_choice("decoder", self.decoder, DECODERS)


@dataclass(frozen=True)
class Job:
    """What all videos of a run share.

    Args:
        root: the dataset's folder; names in the manifest are relative to it.
        out: the cache's folder.
        config: how clips are cut.
        settings: of the cache, a part of every row.
        detector: name of the face detector.
        weights: of the detector; None takes its own.
        detections: folder for what the detector found; None keeps none.
    """

    root: Path
    out: Path
    config: PrepareConfig
    settings: dict
    detector: str
    weights: str | None
    detections: Path | None

    def name(self, record: Record) -> str:
        """The video's path in the dataset."""
        path, root = os.path.abspath(record.path), os.path.abspath(self.root)
        return escape(os.path.relpath(path, root) if Path(path).is_relative_to(root) else path)

    def source(self, record: Record) -> str:
        """A digest of what the clips are cut from: the record, and the file's size. Another one means other clips."""
        parts = (record.label, record.identity, record.mask and record.mask.name, [f.name for f in record.frames])
        try:
            size = os.path.getsize(record.path) if os.path.isfile(record.path) else 0
        except OSError:  # it vanished in between
            size = 0
        return hashlib.sha256(json.dumps([self.name(record), *parts, size]).encode()).hexdigest()

    def shard(self, record: Record) -> str:
        """The tar of the video's clips, relative to the cache: a name for any file system, its own for every record."""
        key = "\n".join((record.split, record.method, self.name(record)))
        stem, method = (re.sub(r"[^A-Za-z0-9_-]", "_", x)[:NAME_LENGTH] for x in (record.path.stem, record.method))
        return f"{SHARDS}/{record.split}/{method}/{stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.tar"

    def verdict(self, record: Record) -> Path:
        """The file that holds, in place of clips, why there are none."""
        return (self.out / self.shard(record)).with_suffix(".json")


def cut_record(record: Record, job: Job) -> str:
    """Write the clips of a video, or the reason why there are none; returns the reason, "" for clips.

    A reason that is the video's own is kept, so that it is not looked for again; one of the machine is not.

    Raises:
        SDRError: the cache cannot be written, or the detector not be loaded.
    """
    shard, verdict = job.out / job.shard(record), job.verdict(record)
    make_folder(shard.parent)
    detector = worker_detector(job.detector, job.weights)
    try:
        if record.frames and (reason := frame_gap_reason(record.frames)):
            raise SDRError(record.path, reason)
        write_shard(shard, sheltered(record_clips(record, job, detector)))
    except SDRError as error:
        if error.file == shard:
            raise
        reason = error.reason if error.file == record.path else str(error)
        remove(shard)  # of what the video was before
        write_atomic(verdict, json.dumps({"reason": reason, "source": job.source(record)}) + "\n")
        return reason
    except MachineError as error:
        return escape(str(error))
    remove(verdict)  # of an earlier attempt
    return ""


class MachineError(Exception):
    """A video's failure that lies in the machine or a library, not in the video."""


def sheltered(clips: Iterator) -> Iterator:
    """The clips; an error that is not ours becomes a MachineError, so that it is not taken for one of writing."""
    try:
        yield from clips
    except SDRError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        raise MachineError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def record_clips(record: Record, job: Job, detector: Detector) -> Iterator[tuple[dict, np.ndarray]]:
    """Rows of the manifest and clips, [T, S, S, 3] uint8, of the one face that a record's label speaks of.

    Raises:
        SDRError: the video is damaged or unreadable, or no face is seen for long enough.
    """
    config = job.config
    with open_record(record, config) as video:
        found = detect_faces(video, detector, cache=job.detections)
        if found.damage:
            raise SDRError(record.path, f"damaged: {found.damage}")
        tracks = track_faces(found.faces)
        number, chosen_by = choose_track(tracks, record, video)
        chosen = tracks[number : number + 1]
        shape = {"num_frames": config.num_frames, "stride": config.stride}
        plans = plan_clips(chosen, **shape, size=config.size, min_frames=config.min_frames)
        if not plans:
            raise SDRError(record.path, why_no_clip(found.frames_read, chosen, config.min_frames))
        left_out = len(sample_clips(len(chosen[0].scores), **shape)) - len(plans)
        plans = spread(plans, config.clips_per_video)
        shared = {
            "video": job.name(record),
            "label": record.label,
            "method": record.method,
            "split": record.split,
            "identity": record.identity,
            "video_sha256": video.sha256,
            "track": number,
            "tracks": len(tracks),
            "chosen_by": chosen_by,
            "left_out": left_out,  # clips of the track whose points resemble no face
            "detector": job.settings["detector"],
            "decoder": video.decoder,
            "settings": json.dumps(job.settings),
            "source": job.source(record),
            "shard": job.shard(record),
        }
        for index, clip in cut_clips(video, plans, config.size):
            own = {"clip": index, "frames": plans[index].frames.tolist()}
            yield shared | own | {"transform": plans[index].transform.ravel().tolist()}, clip


def open_record(record: Record, config: PrepareConfig):
    """The record's video, or its list of frames, which reads like one."""
    if record.frames:
        return open_frames(record.path, record.frames, limits=config.limits)
    return open_video(record.path, limits=config.limits, decoder=config.decoder)


def spread(plans: Sequence[ClipPlan], most: int | None) -> Sequence[ClipPlan]:
    """At most ``most`` of the plans, evenly over the whole."""
    if most is None or most >= len(plans):
        return plans
    return [plans[i] for i in np.linspace(0, len(plans) - 1, most).round().astype(int)]


def choose_track(tracks: Sequence[Track], record: Record, video: Video) -> tuple[int, str]:
    """Which face is meant, and what told it: ``mask`` or ``longest``.

    A fake's label speaks of the manipulated face: where the dataset has a mask and there are several tracks, the one
    whose boxes hold most of it. Else the longest is taken, the earlier of equals.

    Args:
        tracks: of the video.
        record: of the video.
        video: once it was read.

    Raises:
        SDRError: the mask cannot be read, is not the video's, or holds nothing in any track.
    """
    lengths = [len(track.scores) for track in tracks]
    if len(tracks) < 2 or record.mask is None:
        return int(np.argmax(lengths)) if tracks else 0, "longest"
    held = np.zeros(len(tracks))  # mask in each track's boxes, over all frames
    with open_video(record.mask, limits=video.limits) as mask:
        sides = [(info.width, info.height) for info in (mask.info, video.info)]
        for number, (_, frame) in enumerate(mask.frames()):
            for t, track in enumerate(tracks):
                if track.start <= number < track.start + lengths[t]:
                    left, top, right, bottom = track.boxes[number - track.start].round().astype(int).clip(0)
                    held[t] += frame[top:bottom, left:right, 0].sum(dtype=np.int64)
        if mask.damage:
            raise SDRError(record.mask, f"damaged: {mask.damage}")
        if sides[0] != sides[1] or mask.frames_read < max(t.start + n for t, n in zip(tracks, lengths, strict=True)):
            raise SDRError(record.mask, "is not of its video: it has other sides, or fewer frames")
    if not held.any():
        raise SDRError(record.mask, "marks no face that was found")
    return int(held.argmax()), "mask"


DETECTORS: dict[tuple[str, str | None], Detector] = {}


def worker_detector(name: str, weights: str | None) -> Detector:
    """This process's detector, loaded once; on one thread, as there are other processes."""
    if (name, weights) not in DETECTORS:
        torch.set_num_threads(1)
        DETECTORS[name, weights] = load_detector(name, weights=weights, threads=1)
    return DETECTORS[name, weights]
