"""`sdr score`: videos in; a line for each, a table and a report out."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sdr.errors import SDRError, escape
from sdr.files import append_line, atomic_file, file_digest, make_folder, sole_writer, to_csv, write_atomic
from sdr.terminal import SYNTHETIC_NOTE, pick_cache, pick_device, progress_bars, refusals, require, settings

if TYPE_CHECKING:  # importing them for real waits until the command runs
    from rich.progress import Progress

    from sdr.checkpoint import WeightsInfo
    from sdr.report import RunInfo
    from sdr.score import Scorer, VideoScore
    from sdr.score_run import KeptScores, Stop

DEMONSTRATION_NOTE = (
    "No --weights given: using the demonstration weights. They were trained on synthetic videos and detect nothing "
    "real. For a real detector convert FTCN's published weights: sdr convert ftcn_tt.pth ftcn.safetensors"
)
FIELDS = ("path", "score", "label", "state", "reason", "clips", "faces", "seconds")
LOG, TABLE, REPORT = "scores.jsonl", "scores.csv", "report.html"
Videos = Sequence[tuple[Path, int | None]]  # each with its known label


def run_score(options) -> int:
    import sdr
    from sdr.checkpoint import DEMONSTRATION, load_model
    from sdr.detectors import load_detector
    from sdr.report import render_report
    from sdr.score import ScoreConfig, Scorer
    from sdr.score_run import KeptScores, Results, stopping

    require("faces", "report", *(["train"] if options.truth is not None else []))
    out = Path(options.out)
    if options.weights is None:
        print(DEMONSTRATION_NOTE, file=sys.stderr)
    weights = options.weights or DEMONSTRATION
    model, info = load_model(weights)
    config = settings(ScoreConfig, options)
    detector, device = load_detector(options.detector, weights=options.detector_weights), pick_device(options.device)
    with refusals():
        scorer = Scorer(model.to(device), detector, config, cache=pick_cache(options))
    videos = list_videos(options)
    if not any(os.path.lexists(video) for video, _ in videos):
        raise SDRError(videos[0][0], "no such file or folder")  # before earlier results are written over
    make_folder(out)
    made_by = {"version": sdr.__version__, "weights": file_digest(weights), "device": device.type}
    with sole_writer(out, "sdr score"), stopping() as stop:
        kept = KeptScores(out, config, made_by | {"detector": detector.name})
        records = score_all(scorer, videos, kept, out / LOG, stop)
        done = [video for video, record in zip(videos, records, strict=True) if record]
        records = list(filter(None, records))
        results = Results(kept, done)
        write_lines(out / LOG, results)  # in the videos' order, whatever was scored when
        fields = (*FIELDS, "truth") if options.truth else FIELDS
        write_atomic(out / TABLE, to_csv([{name: record[name] for name in fields} for record in records], fields))
        metrics = known_metrics(records, config.threshold)
        run = describe_run(options, type(model).__name__, info, metrics, len(records))
        write_atomic(out / REPORT, render_report(results, run))
    print_summary(records, metrics, info.synthetic, out)
    if len(done) < len(videos):
        what = f"interrupted after {len(done)} of {len(videos)} videos; the same command goes on"
        print(f"sdr score: {what}", file=sys.stderr)
        return stop.code
    return 0 if all(record["score"] is not None for record in records) else 1


def list_videos(options) -> Videos:
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


def score_all(scorer: Scorer, videos: Videos, kept: KeptScores, log: Path, stop: Stop) -> list[dict | None]:
    """Score what is not kept, one after the other; each result is kept, and a line of ``log``, as soon as it is there.

    Returns:
        The row of each video, None where the run was interrupted before it.
    """
    records = recall_all(videos, kept, log)
    with progress_bars() as bars, suppress(KeyboardInterrupt):
        total = bars.add_task("all videos", total=len(videos), visible=len(videos) > 1)
        for number, (path, truth) in enumerate(videos):
            if records[number] is None:
                result = score_one(scorer, path, truth, kept, stop, bars)
                append_line(log, to_line(result))
                records[number] = to_record(result)
            bars.console.print(one_line(records[number]), markup=False, highlight=False, soft_wrap=True)
            bars.advance(total)
    return records


def recall_all(videos: Videos, kept: KeptScores, log: Path) -> list[dict | None]:
    """The row of each video whose result is kept, or None; ``log`` has their lines and no other."""
    records, others = [], []
    with atomic_file(log) as file:
        for path, truth in videos:
            result, other = kept.recall(path, truth)
            if result is not None:
                file.write((to_line(result) + "\n").encode())
            if other:
                others.append(other)
            records.append(result and to_record(result))
    if known := len(records) - records.count(None):
        print(f"note: {known} of {len(videos)} videos have been scored before, and are not again", file=sys.stderr)
    if others:
        print(f"note: {len(others)} videos are scored again, with other settings: {others[0]}", file=sys.stderr)
    return records


def score_one(
    scorer: Scorer, path: Path, truth: int | None, kept: KeptScores, stop: Stop, bars: Progress
) -> VideoScore:
    """Score a video and keep the result; KeyboardInterrupt where a signal comes in between."""
    from sdr.score_run import find_source

    bar = bars.add_task(escape(path.name)[-40:], total=1.0)
    source = find_source(path)
    with stop.at_once():
        result = scorer(path, truth=truth, progress=lambda what, share: bars.update(bar, completed=share))
    bars.remove_task(bar)
    kept.keep(path, source, result)
    return result


def write_lines(log: Path, results: Sequence[VideoScore]) -> None:
    with atomic_file(log) as file:
        file.writelines((to_line(result) + "\n").encode() for result in results)


def one_line(record: Mapping) -> str:
    """What a person sees of one video: its state and score, or its file and the cause."""
    if record["score"] is None:
        return f"inconclusive        {record['path']}: {record['reason']}"
    note = f"  ({record['reason']})" if record["reason"] else ""
    return f"{record['state']:12} {record['score']:.3f}  {record['path']}{note}"


def to_line(result: VideoScore) -> str:
    """The line of scores.jsonl."""
    return json.dumps(to_record(result) | {"clip_scores": clip_records(result)})


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


def known_metrics(records: Sequence[Mapping], threshold: float) -> dict[str, float]:
    """Metrics over the scored videos whose label is known; empty where they hold a single class."""
    from sdr.evaluate import video_metrics

    known = [(r["score"], r["truth"]) for r in records if r["score"] is not None and r["truth"] is not None]
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


def print_summary(records: Sequence[Mapping], metrics: dict[str, float], synthetic: bool, out: Path) -> None:
    states = [record["state"] for record in records]
    print(", ".join(f"{states.count(state)} {state}" for state in ("real", "fake", "inconclusive")))
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    known = sum(record["truth"] is not None for record in records)
    if known and not metrics:
        print(f"no metrics: the {known} videos with a known label hold no score of one of the two classes")
    if metrics and synthetic:
        print(SYNTHETIC_NOTE)
    print(f"report: {escape((out / REPORT).resolve())}")
