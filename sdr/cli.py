"""The command line: sdr score | synth | train | convert.

Exit codes: 0 all done; 1 some videos were not scored; 2 the command could not be done: bad usage, or a file or setting
that it cannot do without is unusable; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdr.errors import SDRError, escape
from sdr.files import append_line, make_folder, to_csv, write_atomic

if TYPE_CHECKING:  # importing them for real waits until a command needs them
    from sdr.checkpoint import WeightsInfo
    from sdr.report import RunInfo
    from sdr.score import Scorer, VideoScore

DEMONSTRATION_NOTE = (
    "No --weights given: using the demonstration weights. They were trained on synthetic videos and detect nothing "
    "real. For a real detector convert FTCN's published weights: sdr convert ftcn_tt.pth ftcn.safetensors"
)
SYNTHETIC_NOTE = "A synthetic AUC shows that the pipeline works and nothing about real deepfakes."
FIELDS = ("path", "score", "label", "state", "reason", "clips", "faces", "seconds")


def build_parser():
    """All commands and their options; importing jsonargparse waits until a command line is read."""
    from jsonargparse import ArgumentParser

    import sdr
    from sdr.score import ScoreConfig
    from sdr.synth import synthesize
    from sdr.train import TrainConfig

    parser = ArgumentParser(prog="sdr", description=sdr.__doc__, version=sdr.__version__)
    commands = parser.add_subcommands()

    score = ArgumentParser(description="Score videos; writes scores.jsonl, scores.csv and report.html.")
    score.add_argument("paths", nargs="+", help="video files, or folders that are searched for them")
    score.add_argument("--weights", type=str | None, help="safetensors; default: the demonstration weights")
    score.add_argument("--out", type=str, default="sdr_scores", help="folder; results of an earlier run are replaced")
    score.add_argument("--truth", type=str | None, help="CSV path,label[,split] of known labels: adds AUC and accuracy")
    score.add_argument("--split", type=str | None, help="with --truth: score only the videos of this split")
    score.add_class_arguments(ScoreConfig)
    add_shared_arguments(score)
    commands.add_subcommand("score", score)

    synth = ArgumentParser(description="Write synthetic real and fake videos in FaceForensics++'s layout.")
    synth.add_argument("out", type=str, help="folder; empty or missing")
    synth.add_function_arguments(synthesize, skip={"out", "progress"})
    synth.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands.add_subcommand("synth", synth)

    train = ArgumentParser(description="Train a model on videos in FaceForensics++'s layout.")
    train.add_argument("--data", type=str, required=True, help="folder in FaceForensics++'s layout")
    train.add_argument("--out", type=str, required=True, help="folder for the weights and the log")
    train.add_argument("--compression", type=str, default="c23", help="c23, c40 or raw")
    train.add_argument("--methods", type=list[str] | None, help="manipulations to train on; default: all there are")
    train.add_argument("--clips_per_video", type=int, default=1, help="at most, of the longest face track")
    train.add_argument("--workers", type=int, default=2, help="processes that decode and find faces")
    train.add_argument("--max_bad", type=float, default=0.01, help="share of unusable videos that is accepted")
    train.add_class_arguments(TrainConfig)
    add_shared_arguments(train)
    commands.add_subcommand("train", train)

    convert = ArgumentParser(description="Convert an FTCN checkpoint to safetensors.")
    convert.add_argument("source", type=str, help="FTCN's published checkpoint (.pth)")
    convert.add_argument("target", type=str, help="safetensors file to write")
    convert.add_argument("--to", type=Literal["ftcn", "sdr"], default="ftcn", help="the single branch or all")
    convert.add_argument("--num_branches", type=int, default=4, help="of --to sdr")
    convert.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands.add_subcommand("convert", convert)
    return parser


def add_shared_arguments(parser) -> None:
    """What every command that finds faces and runs a model takes."""
    parser.add_argument(
        "--detector", type=Literal["centerface", "retinaface"], default="centerface", help="face detector"
    )
    parser.add_argument("--detector_weights", type=str | None, help="file or folder, so that nothing is downloaded")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--cache", type=str | None, help="folder for detections; default: the user's cache folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    command = arguments.subcommand
    run = {"score": run_score, "synth": run_synth, "train": run_train, "convert": run_convert}[command]
    try:
        with refusals():
            options = parser.instantiate(arguments)[command]
        return run(options)
    except SDRError as error:
        if arguments[command].debug:
            raise
        print(f"sdr {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sdr {command}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def refusals() -> Iterator[None]:
    """What a configuration's or a function's own checks refuse becomes one line."""
    try:
        yield
    except ValueError as error:
        raise SDRError("options", str(error)) from error


def settings(kind: type, options):
    """A configuration out of the command's options."""
    with refusals():
        return kind(**{name: options[name] for name in kind.__dataclass_fields__})


PACKAGES = {  # what each extra must have brought
    "faces": ("onnx", "onnxruntime"),
    "report": ("jinja2", "plotly", "PIL"),
    "train": ("sklearn",),
}


def require(*extras: str) -> None:
    """Raise SDRError for packages that are missing, before any work is done that would be lost for want of them."""
    missing = {extra: [name for name in PACKAGES[extra] if find_spec(name) is None] for extra in extras}
    names = [name for packages in missing.values() for name in packages]
    if names:
        wanted = ",".join(extra for extra, packages in missing.items() if packages)
        raise SDRError(", ".join(names), "not installed", f"pip install -c constraints.txt -e '.[{wanted}]'")


def pick_device(name: str):
    """``auto`` is a GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SDRError("--device", f"{name!r} cannot be used: {error}".split("\n")[0]) from error
    if device.type not in ("cpu", "cuda"):
        raise SDRError("--device", f"must be auto, cpu or cuda, got {name!r}")
    return device


def pick_cache(options) -> Path:
    from sdr.faces import default_cache

    return Path(options.cache) if options.cache else default_cache()


@contextmanager
def progress_bars(*columns: str) -> Iterator:
    """rich's progress on standard error: description, bar, share, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    fields = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    fields += [TextColumn(column) for column in columns]
    with Progress(*fields, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        yield bars


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


def run_synth(options) -> int:
    from sdr.synth import synthesize

    settings = {name: value for name, value in vars(options).items() if name not in ("debug", "config")}
    with progress_bars() as bars:
        bar = bars.add_task("videos", total=None, visible=False)  # until the settings are found sound

        def report(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total, visible=True)

        with refusals():
            synthesize(**settings, progress=report)
    print(f"videos: {escape(Path(options.out).resolve())}")
    return 0


def run_train(options) -> int:
    from sdr.checkpoint import WeightsInfo
    from sdr.datasets import check_identities, ffpp_records, is_synthetic
    from sdr.loading import load_clips
    from sdr.train import TrainConfig, train

    config = settings(TrainConfig, options)
    device = pick_device(options.device)
    records = ffpp_records(options.data, compression=options.compression, methods=options.methods)
    check_identities(records)
    synthetic = is_synthetic(options.data)
    require("faces", "train")
    sets = {}
    for split in ("train", "val"):
        chosen = [record for record in records if record.split == split]
        with progress_bars() as bars:
            bar = bars.add_task(f"clips of {split}", total=len(chosen))
            with refusals():
                sets[split] = load_clips(
                    chosen,
                    config.model(),
                    detector=options.detector,
                    weights=options.detector_weights,
                    clips_per_video=options.clips_per_video,
                    workers=options.workers,
                    max_bad=options.max_bad,
                    cache=pick_cache(options),
                    progress=lambda n: bars.update(bar, completed=n),  # noqa: B023
                )
        for record, reason in sets[split].failures:
            print(f"left out: {escape(record.path)}: {reason}", file=sys.stderr)
    kind = "synthetic matched-marginals" if synthetic else options.compression
    info = WeightsInfo(
        origin=f"{config.preset}, trained on {len(sets['train'].records)} {kind} videos", synthetic=synthetic
    )
    with progress_bars("loss {task.fields[loss]:.3f}") as bars:
        bar = bars.add_task("training", total=None, loss=float("nan"))

        def report(step: int, steps: int, figures: dict[str, float]) -> None:
            bars.update(bar, completed=step, total=steps, loss=figures["total"])

        weights, metrics = train(
            config, sets["train"], sets["val"], options.out, info=info, device=device, report=report
        )
    for name, value in metrics.items():
        print(f"validation {name}: {value:.4f}")
    if synthetic:
        print(SYNTHETIC_NOTE)
    print(f"weights: {escape(weights.resolve())}")
    return 0


def run_convert(options) -> int:
    from sdr.checkpoint import convert

    with refusals():
        model = convert(options.source, options.target, to=options.to, num_branches=options.num_branches)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} with {count / 1e6:.3f} M parameters: {escape(Path(options.target).resolve())}")
    return 0
