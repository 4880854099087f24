"""`sdr score`: videos in; a line for each, a table and a report out."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence, Sized
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
    from sdr.score_run import KeptScores
    from sdr.stopping import Stop

DEMONSTRATION_NOTE = (
    "No --weights given: using the demonstration weights. They were trained on synthetic videos and detect nothing "
    "real. For a real detector convert FTCN's published weights: sdr convert ftcn_tt.pth ftcn.safetensors"
)
FIELDS = ("path", "score", "label", "state", "reason", "clips", "faces", "seconds")
LOG, TABLE, REPORT = "scores.jsonl", "scores.csv", "report.html"
Videos = Sequence[tuple[Path, int | None]]  # each with its known label


def run_score(options) -> int:
    from sdr.score_run import KeptScores
    from sdr.stopping import stopping

    require("faces", "report", *(["train"] if options.truth is not None else []))
    out = Path(options.out)
    scorer, info, made_by = load_scorer(options)
    videos = list_videos(options)
    if not any(os.path.lexists(video) for video, _ in videos):
        raise SDRError(videos[0][0], "no such file or folder")  # before earlier results are written over
    make_folder(out)
    with sole_writer(out, "sdr score"), stopping() as stop:
        kept = KeptScores(out, scorer.config, made_by)
        records = recall_all(videos, kept, out / LOG, stop)
        if records is None:
            print("sdr score: interrupted; the same command goes on", file=sys.stderr)
            return stop.code
        score_all(scorer, videos, records, kept, out / LOG, stop)
        done = [video for video, record in zip(videos, records, strict=True) if record]
        records = list(filter(None, records))
        fields = (*FIELDS, "truth") if options.truth else FIELDS
        write_atomic(out / TABLE, to_csv([{name: record[name] for name in fields} for record in records], fields))
        metrics = known_metrics(records, options.threshold)
        run = describe_run(options, made_by["model"], info, metrics, len(records))
        finished = len(done) == len(videos) and write_report(out, kept, done, run, stop)
    print_summary(records, metrics, info.synthetic)
    if not finished:
        what = f"interrupted after {len(done)} of {count_of(videos)}; the same command goes on"
        print(f"sdr score: {what}", file=sys.stderr)
        return stop.code
    print(f"report: {escape((out / REPORT).resolve())}")
    return 0 if all(record["score"] is not None for record in records) else 1


def load_scorer(options) -> tuple[Scorer, WeightsInfo, dict[str, str]]:
    """The scorer, what its weights say of themselves, and what a score depends on besides the settings."""
    import sdr
    from sdr.checkpoint import DEMONSTRATION, load_model
    from sdr.detectors import load_detector
    from sdr.score import ScoreConfig, Scorer
    from sdr.score_run import find_source

    if options.weights is None:
        print(DEMONSTRATION_NOTE, file=sys.stderr)
    weights = options.weights or DEMONSTRATION
    source = find_source(weights)
    model, info = load_model(weights)
    sha256 = file_digest(weights)
    if find_source(weights) != source:
        raise SDRError(weights, "changed while it was being read", "give the command again")
    config = settings(ScoreConfig, options)
    detector, device = load_detector(options.detector, weights=options.detector_weights), pick_device(options.device)
    with refusals():
        scorer = Scorer(model.to(device), detector, config, cache=pick_cache(options))
    made_by = {"version": sdr.__version__, "model": type(model).__name__, "weights": sha256}
    return scorer, info, made_by | {"device": device.type, "detector": detector.name}


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


def recall_all(videos: Videos, kept: KeptScores, log: Path, stop: Stop) -> list[dict | None] | None:
    """The row of each video whose result is kept, or None; ``log`` has their lines and no other.

    Returns None, and leaves ``log`` as it was, where a signal came in between.
    """
    records, others = [], []
    with suppress(KeyboardInterrupt), progress_bars() as bars, stop.at_once():
        bar = bars.add_task("kept results", total=len(videos), visible=len(videos) > 1)
        with atomic_file(log) as file:
            for path, truth in videos:
                result, other = kept.recall(path, truth)
                if result is not None:
                    file.write((to_line(result) + "\n").encode())
                if other:
                    others.append(other)
                records.append(result and to_record(result))
                bars.advance(bar)
        bars.remove_task(bar)
    if stop():
        return None
    if known := len(records) - records.count(None):
        place = escape(kept.folder)
        print(f"note: {known} of {count_of(videos)} scored before: results are taken from {place}", file=sys.stderr)
    if others:
        print(f"note: {count_of(others)} scored again, with other settings: {others[0]}", file=sys.stderr)
    return records


def score_all(
    scorer: Scorer, videos: Videos, records: list[dict | None], kept: KeptScores, log: Path, stop: Stop
) -> None:
    """Score the videos that have no row, one after the other, until a signal comes in between.

    Each result is kept, and a line of ``log``, and a row in ``records``, as soon as it is there.
    """
    with progress_bars() as bars, suppress(KeyboardInterrupt):
        total = bars.add_task("all videos", total=len(videos), visible=len(videos) > 1)
        for number, (path, truth) in enumerate(videos):
            if records[number] is None:
                result = score_one(scorer, path, truth, kept, stop, bars)
                append_line(log, to_line(result))
                records[number] = to_record(result)
            bars.console.print(one_line(records[number]), markup=False, highlight=False, soft_wrap=True)
            bars.advance(total)


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


def write_report(out: Path, kept: KeptScores, videos: Videos, run: RunInfo, stop: Stop) -> bool:
    """Write the lines in the videos' order, whatever was scored when, and the report.

    Returns:
        Whether that was done before a signal came.
    """
    from sdr.report import render_report
    from sdr.score_run import Results

    with suppress(KeyboardInterrupt), stop.at_once():
        with atomic_file(out / LOG) as file:
            file.writelines((to_line(result) + "\n").encode() for result in Results(kept, videos, pictures=False))
        write_atomic(out / REPORT, render_report(Results(kept, videos, pictures=True), run))
        return True
    return False


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
    path = escape(result.path)
    return {
        "path": f"./{path}" if path.startswith(("=", "+", "-", "@")) else path,  # to a spreadsheet it were a formula
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
        title=f"Scores of {count_of(range(count))}",
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


def count_of(videos: Sized) -> str:
    return f"{len(videos)} video{'s' if len(videos) != 1 else ''}"


def print_summary(records: Sequence[Mapping], metrics: dict[str, float], synthetic: bool) -> None:
    states = [record["state"] for record in records]
    print(", ".join(f"{states.count(state)} {state}" for state in ("real", "fake", "inconclusive")))
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    known = sum(record["truth"] is not None for record in records)
    if known and not metrics:
        print("no metrics: of one of the two classes no video with a known label has a score")
    if metrics and synthetic:
        print(SYNTHETIC_NOTE)
