"""Faces of a video: found, followed, aligned once per clip, and cut out.

Coordinates are those of ``sdr.detectors``: continuous pixels, the first pixel's centre at 0.5.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sdr.detectors import Detector, Faces, box_iou
from sdr.errors import SDRError, escape
from sdr.files import digest_arrays, write_atomic
from sdr.video import Video, sample_clips

CACHE_FORMAT = 2  # to be raised when what is stored, or how faces are decoded, changes
TEMPLATE_SIZE = 256  # pixels, side of the crop that TEMPLATE is given for
TEMPLATE = np.array(  # left eye, right eye, nose, left and right mouth corner
    [(85.83, 85.78), (169.05, 84.34), (127.57, 137.00), (90.70, 174.70), (167.31, 173.37)]
)
MIN_SPREAD = 1e-6  # of five points, relative to their distance from the origin: below, they are one point

logger = logging.getLogger(__name__)


class Detections(NamedTuple):
    """What a detector saw in a video of F frames: faces [F], times [F] in seconds, the video's damage, F itself."""

    faces: list[Faces]
    times: np.ndarray
    damage: str
    frames_read: int


@dataclass(frozen=True)
class Track:
    """One face over L consecutive frames from ``start`` on: boxes [L, 4], points [L, 5, 2], scores [L]."""

    start: int
    boxes: np.ndarray
    points: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class ClipPlan:
    """Where a clip of T frames is to be cut.

    Args:
        track: index of the track.
        frames: numbers of the video's frames, [T] int64; mirrored where the track is shorter than a clip.
        transform: from the frame to the crop, [2, 3] float64, the same for all frames.
        boxes: the enlarged box of each frame, [T, 4]; the clip is black outside of it.
    """

    track: int
    frames: np.ndarray
    transform: np.ndarray
    boxes: np.ndarray


def _ignore(frames_done: int) -> None:
    """The progress of a caller who wants none."""


def track_faces(detections: Sequence[Faces], *, iou: float = 0.5) -> list[Track]:
    """Follow faces from each frame to the next.

    Best score first, each face continues the track whose last box it overlaps most, if by ``iou`` or more and no better
    face took it; otherwise it starts a track. A frame without the face ends its track.

    Args:
        detections: faces of consecutive frames.
        iou: least overlap, in (0, 1].

    Returns:
        Tracks in the order of their first frame, then of their score in it.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou must lie in (0, 1], got {iou}")
    tracks: list[list[tuple[int, int]]] = []  # each a list of (frame, face in it)
    current: list[list[tuple[int, int]]] = []
    for number, faces in enumerate(detections):
        last = np.array([detections[n].boxes[face] for n, face in (t[-1] for t in current)]).reshape(-1, 4)
        overlap = box_iou(faces.boxes, last)  # [N, tracks]
        following = []
        for face in np.argsort(-faces.scores, kind="stable"):
            best = int(overlap[face].argmax()) if current else 0
            if current and overlap[face, best] >= iou:
                track = current[best]
                overlap[:, best] = -1  # taken
            else:
                track = []
                tracks.append(track)
            track.append((number, int(face)))
            following.append(track)
        current = following
    return [_gather(detections, track) for track in tracks]


def _gather(detections: Sequence[Faces], track: list[tuple[int, int]]) -> Track:
    boxes, points, scores = (np.stack([detections[n][part][face] for n, face in track]) for part in range(3))
    return Track(track[0][0], boxes, points, scores)


def enlarge_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] grown by half their size on each side: twice as wide and high about the same centre."""
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, 2:] + half], axis=1)


def similarity_transform(points: np.ndarray, size: int) -> np.ndarray:
    """The one similarity that maps the points of all frames onto the template best, in least squares.

    Args:
        points: [T, 5, 2] in frame pixels.
        size: side of the crop, pixels.

    Returns:
        [2, 3] float64, frame to crop: uniform scale, rotation and shift, never a reflection.

    Raises:
        ValueError: the points are not finite, all the same, or fit the template no better than one point does.
    """
    if points.ndim != 3 or points.shape[1:] != (5, 2) or len(points) == 0:
        raise ValueError(f"points must be [T, 5, 2], got {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError("points must be finite")
    # as complex numbers z = x + iy a similarity is z -> a z + b, linear in a and b
    source = np.asarray(points, np.float64) @ [1, 1j]  # [T, 5]
    target = np.broadcast_to(TEMPLATE @ [1, 1j] * (size / TEMPLATE_SIZE), source.shape)
    centred = source - source.mean()
    spread = np.linalg.norm(centred)
    if spread <= MIN_SPREAD * max(1.0, np.linalg.norm(source)):
        raise ValueError("points must not all be the same")
    a = np.vdot(centred, target) / spread**2  # vdot conjugates its first argument
    if abs(a) * spread <= MIN_SPREAD * np.linalg.norm(target - target.mean()):
        raise ValueError("points must resemble a face, no rotation and scale brings them near the template")
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def plan_clips(
    tracks: Sequence[Track], *, num_frames: int = 32, stride: int = 32, size: int = 224, min_frames: int = 8
) -> list[ClipPlan]:
    """Where to cut the clips of every track.

    Args:
        tracks: of one video.
        num_frames: frames of a clip; shorter tracks are mirrored to this length.
        stride: frames from one clip's start to the next.
        size: side of the crop, pixels.
        min_frames: shorter tracks give no clip [ours]: mirroring makes any number of frames from one, but there is no
            time in them to judge.

    Returns:
        Plans by track, then by time. A clip whose points are no face is left out, with a warning in the log.
    """
    if min_frames < 1 or size < 1:
        raise ValueError(f"min_frames and size must be at least 1, got {min_frames} and {size}")
    plans = []
    for number, track in enumerate(tracks):
        if len(track.scores) < min_frames:
            continue
        boxes = enlarge_boxes(track.boxes)
        for index in sample_clips(len(track.scores), num_frames, stride=stride):
            try:
                transform = similarity_transform(track.points[index], size)
            except ValueError as error:
                logger.warning("clip at frame %d of track %d left out: %s", track.start + index[0], number, error)
                continue
            plans.append(ClipPlan(number, track.start + index, transform, boxes[index]))
    return plans


def why_no_clip(frames: int, tracks: Sequence[Track], min_frames: int) -> str:
    """One phrase: what keeps a readable video, of which these tracks were to be cut, from giving a clip."""
    if frames < min_frames:
        return f"too few frames: {frames}, at least {min_frames} are needed"
    if not tracks:
        return f"no face in {frames} frames"
    longest = max(len(track.boxes) for track in tracks)
    if longest >= min_frames:
        return "the points that were found resemble no face"
    return f"too few frames with a face: {longest} in a row at most, at least {min_frames} are needed"


def warp_frame(frame: np.ndarray, transform: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The crop of one frame, bilinear; black outside ``box`` and outside the frame.

    Args:
        frame: [H, W, 3] uint8.
        transform: from the frame to the crop, [2, 3].
        box: x1 y1 x2 y2 in frame pixels.
        size: side of the crop.

    Returns:
        [size, size, 3] uint8. Where frames agree, so do their crops, bit for bit.
    """
    limits = np.array([frame.shape[1], frame.shape[0]])
    inverse = np.linalg.inv(transform[:, :2])  # [2, 2]
    offset = inverse @ transform[:, 2]
    centres = np.arange(size) + 0.5
    # positions in the frame of the crop's pixels, x and y: [size, size] each
    position = [
        row[0] * centres + row[1] * centres[:, None] - shift for row, shift in zip(inverse, offset, strict=True)
    ]
    low = [max(0, int(np.floor(np.clip(p.min(), 0, n))) - 1) for p, n in zip(position, limits, strict=True)]
    high = [min(n, int(np.ceil(np.clip(p.max(), 0, n))) + 1) for p, n in zip(position, limits, strict=True)]
    region = frame[low[1] : high[1], low[0] : high[0]].astype(np.float32)  # a whole 4K frame in float32 is 100 MB
    image = torch.from_numpy(region).permute(2, 0, 1)[None]
    grid = np.stack([2 * (p - a) / (b - a) - 1 for p, a, b in zip(position, low, high, strict=True)], -1)
    crop = F.grid_sample(
        image, torch.from_numpy(grid.astype(np.float32))[None], padding_mode="border", align_corners=False
    )
    x, y = position
    first, last = np.maximum(box[:2], 0), np.minimum(box[2:], limits)
    inside = (x >= first[0]) & (x < last[0]) & (y >= first[1]) & (y < last[1])
    return np.where(inside[..., None], crop[0].round().to(torch.uint8).permute(1, 2, 0).numpy(), np.uint8(0))


def cut_clips(
    video: Video, plans: Sequence[ClipPlan], size: int, progress: Callable[[int], None] = _ignore
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut all planned clips in one pass over the video.

    Memory: crops of the clips that have begun and not ended at a frame; with stride 1 half a clip's length of them for
    each face.

    Args:
        video: the one that the plans were made for.
        plans: from ``plan_clips``.
        size: side of the crops, as in ``plan_clips``.
        progress: called after every frame with the number of frames read.

    Yields:
        Index into ``plans`` and the clip, [T, size, size, 3] uint8, as each is complete.

    Raises:
        SDRError: the video ends before a planned frame.
    """
    waiting = sorted(range(len(plans)), key=lambda i: -plans[i].frames.min())  # the next to begin is the last
    begun: dict[int, dict[int, np.ndarray]] = {}  # plan to its crops by frame number
    frames = video.frames() if plans else iter(())
    for number, (_, frame) in enumerate(frames):
        while waiting and plans[waiting[-1]].frames.min() <= number:
            begun[waiting.pop()] = {}
        for index, crops in list(begun.items()):
            plan = plans[index]
            box = plan.boxes[np.argmax(plan.frames == number)]
            crops[number] = warp_frame(frame, plan.transform, box, size)
            if number == plan.frames.max():
                yield index, np.stack([crops[n] for n in plan.frames])
                del begun[index]
        progress(number + 1)
        if not waiting and not begun:
            return
    if plans:
        raise SDRError(video.path, "ended sooner the second time it was read", "did it change in between?")


def detect_faces(
    video: Video, detector: Detector, *, cache: Path | None, progress: Callable[[int], None] = _ignore
) -> Detections:
    """Run a detector on every frame of a video, or recall what it found before.

    Args:
        video: read in one pass, or only hashed where the cache knows it.
        detector: its ``name`` is part of the cache's key.
        cache: folder of the cache, made if need be; None neither reads nor writes one. A broken entry is computed
            again, a folder that cannot be written is a warning in the log.
        progress: called with the number of frames done.

    Raises:
        SDRError: from ``video.frames``.
    """
    entry = None if cache is None else Path(cache) / f"{_cache_key(video, detector)}.safetensors"
    if entry and (known := _recall(entry)):
        progress(known.frames_read)
        return known
    faces, times = [], []
    for seconds, frame in video.frames():
        faces.append(detector(frame))
        times.append(seconds)
        progress(len(times))
    found = Detections(faces, np.array(times, np.float64), video.damage, video.frames_read)
    if entry:
        _remember(entry, found)
    return found


def default_cache() -> Path | None:
    """The user's own folder for detections; None, and a warning in the log, for a user who has no home folder."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("sdr")
    except RuntimeError:  # HOME is unset and the system does not know the user
        logger.warning("there is no home folder, detections are not kept (--cache names a folder)")
        return None


def _cache_key(video: Video, detector: Detector) -> str:
    return hashlib.sha256(f"{CACHE_FORMAT}\n{video.sha256}\n{detector.name}\n{video.decoder}".encode()).hexdigest()


def _remember(entry: Path, found: Detections) -> None:
    from safetensors.numpy import save

    tensors = {
        "boxes": np.concatenate([np.empty((0, 4), np.float32), *(f.boxes for f in found.faces)]),
        "points": np.concatenate([np.empty((0, 5, 2), np.float32), *(f.points for f in found.faces)]),
        "scores": np.concatenate([np.empty(0, np.float32), *(f.scores for f in found.faces)]),
        "counts": np.array([len(f.scores) for f in found.faces], np.int64),
        "times": found.times,
        "damage": np.frombuffer(found.damage.encode(), np.uint8),
        "frames_read": np.array([found.frames_read], np.int64),
    }
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(entry, save(tensors | {"sha256": digest_arrays(tensors)}))
    except (OSError, SDRError) as error:
        _warn_unwritable(entry.parent, error.reason if isinstance(error, SDRError) else error.strerror)


@functools.cache  # once per folder, not once per video
def _warn_unwritable(folder: Path, reason: str) -> None:
    logger.warning("detections are not kept, the cache folder %s cannot be written: %s", escape(folder), reason)


def _recall(entry: Path) -> Detections | None:
    """What ``_remember`` wrote, or None where there is nothing or nothing sound."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(entry.read_bytes())
        stored = tensors.pop("sha256")
    except OSError:  # not there, most often; where it cannot be read, writing it will tell
        return None
    except (SafetensorError, KeyError, ValueError, TypeError):
        tensors, stored = {}, None
    if stored is None or not np.array_equal(stored, digest_arrays(tensors)):
        logger.warning("cache entry %s is damaged, faces are detected again", escape(entry))
        return None
    ends = np.cumsum(tensors["counts"])
    parts = (np.split(tensors[name], ends)[:-1] for name in ("boxes", "points", "scores"))  # nothing after the last
    faces = [Faces(*part) for part in zip(*parts, strict=True)]
    damage = tensors["damage"].tobytes().decode()
    return Detections(faces, tensors["times"], damage, int(tensors["frames_read"][0]))
