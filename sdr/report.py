"""One scoring run as one HTML page that needs nothing else: no network, no second file, no server."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdr.errors import escape
from sdr.page import render_page

if TYPE_CHECKING:
    from sdr.score import ClipScore, VideoScore

JPEG_QUALITY = 82
REDUCTIONS = {"mean": "mean over all clips", "max": "highest face (mean over its clips)"}
STATES = ("fake", "real", "inconclusive")
FILTER_FROM = 8  # videos; fewer fit on a screen, a filter would be in the way


@dataclass(frozen=True)
class RunInfo:
    """What all videos of a run share, as the page says it.

    Args:
        title: the page's heading.
        model: model and weights, in words.
        demonstration: the weights detect nothing real; a banner says so.
        synthetic: the model learned from synthetic videos; a banner says what a metric is worth then.
        detector: face detector, in words.
        threshold: scores from here on are called fake.
        reduce: "mean" over all clips or "max" over faces of the mean over a face's clips.
        created: ISO 8601 time.
        command: the command line that made the run.
        version: version of this software.
        metrics: name to value, over the videos with a known truth; a value that is not finite is shown as undefined.
    """

    title: str
    model: str
    demonstration: bool
    synthetic: bool
    detector: str
    threshold: float
    reduce: str
    created: str
    command: str
    version: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Budget:
    """What each video may put into the page.

    Args:
        segments: clips in the timeline; a clip stride of 1 makes thousands.
        faces: faces with a row of thumbnails.
        thumbnails: pictures in such a row, of at most ``thumbnail_size`` pixels a side.
        frames: pictures of the highest clip, of at most ``frame_size`` pixels a side.
    """

    segments: int
    faces: int
    thumbnails: int
    thumbnail_size: int
    frames: int
    frame_size: int


BUDGETS = {  # by the number of videos up to which they hold
    50: Budget(segments=1000, faces=4, thumbnails=9, thumbnail_size=96, frames=16, frame_size=96),
    300: Budget(segments=250, faces=2, thumbnails=5, thumbnail_size=72, frames=8, frame_size=88),
    math.inf: Budget(segments=100, faces=1, thumbnails=2, thumbnail_size=56, frames=4, frame_size=64),
}


def plan_budget(videos: int) -> Budget:
    """Less per video the more videos there are: 300 videos stay below 25 MB, 1,000 too."""
    return next(budget for most, budget in BUDGETS.items() if videos <= most)


def pictured(result: VideoScore) -> list[int]:
    """Indices of the clips whose thumbnail a report can show, however many videos it has."""
    shown = {id(clip) for budget in BUDGETS.values() for _, clips in _shown_clips(result, budget) for clip in clips}
    return [i for i, clip in enumerate(result.clips) if id(clip) in shown]


def render_report(results: Sequence[VideoScore], run: RunInfo) -> str:
    """The page of a run: overview, one section per video, and what a score means.

    File names and all other text are escaped; the page forbids itself every network request.

    Args:
        results: each is asked for once, in order, so that a sequence which reads them needs memory for one alone.
        run: what they share.

    Raises:
        ValueError: a score or the threshold is outside [0, 1], a state is none of the three, an inconclusive video
            has a score or another has none, or ``run.reduce`` is unknown.
    """
    _check_run(run)
    budget = plan_budget(len(results))
    paths, videos, plots = [], [], []
    for index, result in enumerate(results):
        _check(result)
        paths.append(result.path)
        videos.append(_video(index, result, run, budget))
        plots.append(_plot_data(result, run, budget))
    for video, plot, name in zip(videos, plots, short_names(paths), strict=True):
        cut = name.rfind("/") + 1
        video |= {"name": name, "folder": name[:cut], "file": name[cut:]}
        plot["name"] = name
    return render_page(
        "report.html",
        run=_run(run),
        version=escape(run.version),
        videos=videos,
        counts={state: sum(v["state"] == state for v in videos) for state in STATES},
        judged=sum(v["truth"] is not None and v["score"] is not None for v in videos),
        truth_known=any(v["truth"] is not None for v in videos),
        show_filter=len(videos) > FILTER_FROM,
        reduced_images=budget != plan_budget(1),
        data={
            "threshold": run.threshold,
            "threshold_text": format_threshold(run.threshold),
            "videos": plots,
        },
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """What is left of each path without the folder common to all, escaped: two a/000.mp4, b/000.mp4 stay apart."""
    folders = {os.path.dirname(path) for path in paths}
    try:
        common = os.path.commonpath(folders)
    except ValueError:  # no path, or absolute and relative ones mixed
        common = ""
    return [escape(os.path.relpath(path, common) if common else path) for path in paths]


def format_threshold(threshold: float) -> str:
    """Two decimals, or more where the threshold has more."""
    return f"{threshold:.2f}" if round(threshold, 2) == threshold else f"{threshold:g}"


def format_score(score: float, threshold: float) -> str:
    """Two decimals, or as many as it takes to show on which side of the threshold the score lies."""
    if score == threshold:
        return format_threshold(score)
    for digits in range(2, 16):
        text = f"{score:.{digits}f}"
        if text != f"{threshold:.{digits}f}":
            return text
    return repr(score)


def explain(result: VideoScore, run: RunInfo) -> str:
    """Why the video has its state, as sentences."""
    if result.score is None:
        return f"No score: {escape(result.reason) or 'no reason was recorded'}."
    side = "at or above" if result.score >= run.threshold else "below"
    text = (
        f"{_reduction(result, run.reduce)}: {format_score(result.score, run.threshold)}, {side} the threshold "
        f"{format_threshold(run.threshold)}."
    )
    top = top_clip_of(result)
    if top is not None and len(result.clips) > 1:
        text += f" The highest clip, {_span(top)}, scored {format_score(top.score, run.threshold)}."
    return text


def top_clip_of(result: VideoScore) -> ClipScore | None:
    """The clip with the highest score, the first of equal ones; None without clips."""
    return max(result.clips, key=lambda clip: clip.score, default=None)


def frame_numbers(clip: ClipScore, num_frames: int) -> np.ndarray:
    """Number in the video of each of a clip's frames, [num_frames]; a short track runs forth and back."""
    last = clip.last_frame - clip.first_frame
    if last == 0:
        return np.full(num_frames, clip.first_frame)
    position = np.arange(num_frames) % (2 * last)
    return clip.first_frame + np.minimum(position, 2 * last - position)


def _check_run(run: RunInfo) -> None:
    if not 0 <= run.threshold <= 1:
        raise ValueError(f"run.threshold must lie in [0, 1], got {run.threshold}")
    if run.reduce not in REDUCTIONS:
        raise ValueError(f"run.reduce must be one of {sorted(REDUCTIONS)}, got {run.reduce!r}")


def _check(result: VideoScore) -> None:
    path = escape(result.path)
    for score in (result.score, *(clip.score for clip in result.clips)):
        if score is not None and not 0 <= score <= 1:
            raise ValueError(f"{path}: a score must lie in [0, 1], got {score}")
    if result.state not in STATES:
        raise ValueError(f"{path}: state must be real, fake or inconclusive, got {result.state!r}")
    if (result.score is None) != (result.state == "inconclusive"):
        raise ValueError(f"{path}: inconclusive means no score, got {result.state}, {result.score}")


def _run(run: RunInfo) -> dict[str, Any]:
    """The run's texts, printable: a command line carries file names."""
    return {
        "title": escape(run.title),
        "demonstration": run.demonstration,
        "synthetic": run.synthetic,
        "threshold": format_threshold(run.threshold),
        "model": escape(run.model),
        "detector": escape(run.detector),
        "reduce": REDUCTIONS[run.reduce],
        "created": escape(run.created),
        "command": escape(run.command),
        "version": escape(run.version),
        "metrics": {escape(k): f"{v:.3f}" if math.isfinite(v) else "undefined" for k, v in run.metrics.items()},
    }


def _video(index: int, result: VideoScore, run: RunInfo, budget: Budget) -> dict[str, Any]:
    """Everything the template says about one video, but for its name among the others."""
    top = top_clip_of(result)
    agrees = result.truth is not None and result.score is not None
    return {
        "index": index,
        "path": escape(result.path),
        "state": result.state,
        "score": result.score,
        "score_text": _score_text(result, run),
        "reason": escape(result.reason),
        "top": "" if top is None else f"highest clip {format_score(top.score, run.threshold)}, {_span(top)}",
        "explanation": explain(result, run),
        "clips": len(result.clips),
        "faces": result.faces,
        "scored_faces": len({clip.track for clip in result.clips}),
        "seconds": result.seconds,
        "duration": result.duration,
        "truth": _truth(result),
        "agrees": agrees and (result.state == "fake") == (result.truth == 1),
        "differs": agrees and (result.state == "fake") != (result.truth == 1),
        "clips_drawn": len(_thin(result.clips, budget.segments)),
        "face_rows": _face_rows(result, run, budget),
        "film": _film(result, budget),
        "top_span": "" if top is None else _span(top),
    }


def _score_text(result: VideoScore, run: RunInfo) -> str:
    return "" if result.score is None else format_score(result.score, run.threshold)


def _truth(result: VideoScore) -> str | None:
    return None if result.truth is None else ("real", "fake")[result.truth]


def _reduction(result: VideoScore, reduce: str) -> str:
    faces = len({clip.track for clip in result.clips})
    if reduce == "max" and faces > 1:
        return f"Highest of {faces} faces, each the mean of its clips ({len(result.clips)} in all)"
    if len(result.clips) == 1:
        return "Score of the only clip"
    return f"Mean of {len(result.clips)} clip scores over {_count(faces, 'face')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _span(clip: ClipScore) -> str:
    return f"{clip.start:.1f}\u2013{clip.end:.1f} s"


def _axis(result: VideoScore) -> tuple[float, float]:
    """First and last second of the time axis; a stream whose clock starts late begins at its first clip."""
    first = min((clip.start for clip in result.clips), default=0.0)
    last = max((clip.end for clip in result.clips), default=0.0)
    begin = min(first, 0.0) if last <= result.duration + 1 else first
    return begin, max(last, begin + result.duration, begin + 0.1)


def _thin(clips: Sequence[ClipScore], most: int) -> list[ClipScore]:
    """At most ``most`` of the clips, evenly, the highest always among them."""
    if len(clips) <= most:
        return list(clips)
    keep = set(np.linspace(0, len(clips) - 1, most - 1).round().astype(int).tolist())
    keep.add(max(range(len(clips)), key=lambda i: clips[i].score))
    return [clips[i] for i in sorted(keep)]


def _plot_data(result: VideoScore, run: RunInfo, budget: Budget) -> dict[str, Any]:
    """What the page's script draws: columns per face, rounded to a tenth of a millisecond and 1e-4."""
    tracks: dict[int, list[ClipScore]] = {}
    for clip in _thin(result.clips, budget.segments):
        tracks.setdefault(clip.track, []).append(clip)
    top = top_clip_of(result)
    return {
        "state": result.state,
        "score": result.score,
        "text": _score_text(result, run),
        "truth": _truth(result),
        "axis": _axis(result),
        "top": None if top is None else [round(top.start, 4), round(top.end, 4)],
        "faces": [
            {
                "face": track + 1,
                "start": [round(clip.start, 4) for clip in clips],
                "end": [round(clip.end, 4) for clip in clips],
                "score": [round(clip.score, 4) for clip in clips],
                "first": [clip.first_frame for clip in clips],
                "last": [clip.last_frame for clip in clips],
            }
            for track, clips in sorted(tracks.items())
        ],
    }


def _face_rows(result: VideoScore, run: RunInfo, budget: Budget) -> list[dict[str, Any]]:
    """Thumbnails along the time axis, one row per face."""
    begin, end = _axis(result)
    tracks = sorted({clip.track for clip in result.clips})
    rows = []
    for track, clips in _shown_clips(result, budget):
        pictures = [
            {
                "image": data_uri(clip.thumbnail, budget.thumbnail_size),
                "left": round(100 * ((clip.start + clip.end) / 2 - begin) / (end - begin), 2),
                "score": format_score(clip.score, run.threshold),
                "span": _span(clip),
            }
            for clip in clips
        ]
        rows.append({"face": track + 1, "colour": tracks.index(track), "pictures": pictures})
    return rows


def _shown_clips(result: VideoScore, budget: Budget) -> Iterator[tuple[int, list[ClipScore]]]:
    """The faces that have a row, those with the highest clips when there are many; and the clips in it."""
    begin, end = _axis(result)
    tracks: dict[int, list[ClipScore]] = {}
    for clip in result.clips:
        tracks.setdefault(clip.track, []).append(clip)
    ranked = sorted(sorted(tracks), key=lambda track: -max(clip.score for clip in tracks[track]))
    for track in sorted(ranked[: budget.faces]):
        yield track, _spread(tracks[track], (end - begin) / budget.thumbnails)


def _spread(clips: Sequence[ClipScore], gap: float) -> list[ClipScore]:
    """Clips whose middles lie at least ``gap`` seconds apart, in the order of time; the highest is always kept."""
    top = max(clips, key=lambda clip: clip.score)
    kept = [top]
    for clip in sorted(clips, key=lambda clip: clip.start):
        if all(abs(clip.start + clip.end - other.start - other.end) / 2 >= gap * 0.999 for other in kept):
            kept.append(clip)
    return sorted(kept, key=lambda clip: clip.start)


def _film(result: VideoScore, budget: Budget) -> list[dict[str, Any]]:
    """Evenly chosen frames of the highest clip with their numbers in the video."""
    top = top_clip_of(result)
    if top is None or result.top_clip is None or len(result.top_clip) == 0:
        return []
    total = len(result.top_clip)
    numbers = frame_numbers(top, total)
    chosen = np.unique(np.linspace(0, total - 1, min(budget.frames, total)).round().astype(int))
    return [{"image": data_uri(result.top_clip[t], budget.frame_size), "frame": int(numbers[t])} for t in chosen]


def data_uri(picture: np.ndarray, size: int) -> str:
    """``picture`` [H,W,3] uint8 as a JPEG data URI of at most ``size`` pixels a side."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((size, size), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
