"""`sdr score`: videos in; a line for each, a table and a report out."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sdr.errors import SDRError, escape
from sdr.files import append_line, make_folder, to_csv, write_atomic
from sdr.terminal import SYNTHETIC_NOTE, pick_cache, pick_device, progress_bars, refusals, require, settings

if TYPE_CHECKING:  # importing them for real waits until the command runs
    from sdr.checkpoint import WeightsInfo
    from sdr.report import RunInfo
    from sdr.score import Scorer, VideoScore

DEMONSTRATION_NOTE = (
    "No --weights given: using the demonstration weights. They were trained on synthetic videos and detect nothing "
    "real. For a real detector convert FTCN's published weights: sdr convert ftcn_tt.pth ftcn.safetensors"
)
FIELDS = ("path", "score", "label", "state", "reason", "clips", "faces", "seconds")


def run_score(options) -> int:
    from sdr.checkpoint import DEMONSTRATION, load_model
    from sdr.detectors import load_detector
    from sdr.report import render_report
    from sdr.score import ScoreConfig, Scorer

    require("faces", "report", *(["train"] if options.truth is not None else []))
    out = Path(options.out)
    if options.weights is None:
        print(DEMONSTRATION_NOTE, file=sys.stderr)
    model, info = load_model(options.weights or DEMONSTRATION)
    config = settings(ScoreConfig, options)
    detector = load_detector(options.detector, weights=options.detector_weights)
    with refusals():
        scorer = Scorer(model.to(pick_device(options.device)), detector, config, cache=pick_cache(options))
    videos = list_videos(options)
    if not any(os.path.lexists(video) for video, _ in videos):
        raise SDRError(videos[0][0], "no such file or folder")  # before earlier results are written over
    make_folder(out)
    results, interrupted = score_all(scorer, videos, out / "scores.jsonl")
    fields = (*FIELDS, "truth") if options.truth else FIELDS
    write_atomic(out / "scores.csv", to_csv([{name: to_record(r)[name] for name in fields} for r in results], fields))
    metrics = known_metrics(results, config.threshold)
    run = describe_run(options, type(model).__name__, info, metrics, len(results))
    write_atomic(out / "report.html", render_report(results, run))
    print_summary(results, metrics, info.synthetic, out)
    if interrupted:
        print(f"sdr score: interrupted after {len(results)} of {len(videos)} videos", file=sys.stderr)
        return 130
    return 0 if all(result.score is not None for result in results) else 1


def list_videos(options) -> list[tuple[Path, int | None]]:
    """The files to score, each with its known label or None."""
    from sdr.datasets import read_labels
    from sdr.score import find_videos

    videos = list(find_videos(options.paths))
    if options.truth is None:
        if options.split is not None:
            raise SDRError("--split", "needs --truth, whose file names the splits")
        return [(video, None) for video in videos]
    labels = read_labels(options.truth, split=options.split)
    if not any(os.path.realpath(video) in labels for video in videos):
        place = "" if options.split is None else f" in split {options.split!r}"
        raise SDRError(options.truth, f"lists none of the given videos{place}")
    known = [(video, labels.get(os.path.realpath(video))) for video in videos]
    return known if options.split is None else [(video, label) for video, label in known if label is not None]


def score_all(scorer: Scorer, videos: Sequence[tuple[Path, int | None]], log: Path) -> tuple[list[VideoScore], bool]:
    """Score one after the other; each result is a line of ``log`` as soon as it is there.

    Returns:
        The results, and whether Ctrl-C ended the run before the last video.
    """
    results: list[VideoScore] = []
    write_atomic(log, "")
    with progress_bars() as bars, suppress(KeyboardInterrupt):
        total = bars.add_task("all videos", total=len(videos), visible=len(videos) > 1)
        for path, truth in videos:
            name = escape(path.name)[-40:]
            bar = bars.add_task(name, total=1.0)
            result = scorer(
                path,
                truth=truth,
                progress=lambda what, share: bars.update(bar, completed=share),  # noqa: B023
            )
            bars.remove_task(bar)
            bars.console.print(one_line(result), markup=False, highlight=False, soft_wrap=True)
            append_line(log, json.dumps(to_record(result) | {"clip_scores": clip_records(result)}))
            results.append(result)
            bars.advance(total)
    return results, len(results) < len(videos)


def one_line(result: VideoScore) -> str:
    """What a person sees of one video: its state and score, or its file and the cause."""
    if result.score is None:
        return f"inconclusive        {escape(result.path)}: {result.reason}"
    note = f"  ({result.reason})" if result.reason else ""
    return f"{result.state:12} {result.score:.3f}  {escape(result.path)}{note}"


def to_record(result: VideoScore) -> dict:
    """The row of scores.csv and scores.jsonl; the path is escaped so that one video is always one line."""
    return {
        "path": escape(result.path),
        "score": result.score,
        "label": result.label,
        "state": result.state,
        "reason": result.reason,
        "clips": len(result.clips),
        "faces": result.faces,
        "seconds": round(result.seconds, 3),
        "truth": result.truth,
        "decoder": result.decoder,
    }


def clip_records(result: VideoScore) -> list[dict]:
    names = ("track", "start", "end", "first_frame", "last_frame", "score")
    return [{name: getattr(clip, name) for name in names} for clip in result.clips]


def known_metrics(results: Sequence[VideoScore], threshold: float) -> dict[str, float]:
    """Metrics over the scored videos whose label is known; empty where they hold a single class."""
    from sdr.evaluate import video_metrics

    known = [(r.score, r.truth) for r in results if r.score is not None and r.truth is not None]
    if len({truth for _, truth in known}) < 2:
        return {}
    return video_metrics(*zip(*known, strict=True), threshold=threshold)


def describe_run(options, model: str, info: WeightsInfo, metrics: dict[str, float], count: int) -> RunInfo:
    import sdr
    from sdr.report import RunInfo

    demonstration = options.weights is None
    name = "demonstration weights" if demonstration else escape(Path(options.weights).name)
    return RunInfo(
        title=f"Scores of {count} video{'s' if count != 1 else ''}",
        model=f"{model}, {name}: {info.origin}",
        demonstration=demonstration,
        synthetic=info.synthetic,
        detector=options.detector,
        threshold=options.threshold,
        reduce=options.reduce,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=escape(shlex.join(["sdr", *sys.argv[1:]])),
        version=sdr.__version__,
        metrics=metrics,
    )


def print_summary(results: Sequence[VideoScore], metrics: dict[str, float], synthetic: bool, out: Path) -> None:
    states = [result.state for result in results]
    print(", ".join(f"{states.count(state)} {state}" for state in ("real", "fake", "inconclusive")))
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    known = sum(result.truth is not None for result in results)
    if known and not metrics:
        print(f"no metrics: the {known} videos with a known label hold no score of one of the two classes")
    if metrics and synthetic:
        print(SYNTHETIC_NOTE)
    print(f"report: {escape((out / 'report.html').resolve())}")
