"""`sdr evaluate`: weights and clip caches in; video-level metrics with intervals out, by dataset and method."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdr.config import check, check_choice, check_count
from sdr.datasets import SPLITS
from sdr.errors import SDRError, escape
from sdr.files import file_digest, make_folder, to_csv, write_atomic
from sdr.terminal import SYNTHETIC_NOTE, pick_device, progress_bars, require, settings

if TYPE_CHECKING:  # importing them for real waits until the command runs
    from sdr.checkpoint import WeightsInfo
    from sdr.clip_cache import ClipCache
    from sdr.config import FTCNConfig
    from sdr.evaluate import ScoredVideos

VALIDATION_THRESHOLD = "validation threshold"  # among the metrics of a weights file
VIDEO_FIELDS = ("dataset", "video", "label", "method", "clips", "score")
CACHE_TITLES = ("dataset", "videos", "clips", "folder", "digest")
SCORE_FIELDS = ("video_id", "prob", "label")  # what evaluation suites import


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated, and how.

    Args:
        split: of the caches whose videos are scored.
        methods: manipulations to evaluate, as '[Deepfakes,FaceSwap]'; default: all there are. Real videos always are.
        threshold: of the second accuracy, found on a validation split; default: the one that the weights carry.
        batch_size: clips per forward pass; halved by itself when memory runs out.
        resamples: sets of videos that are drawn for the 95 % intervals.
        seed: of these draws.
    """

    split: Literal["train", "val", "test"] = "test"
    methods: list[str] | None = None
    threshold: float | None = None
    batch_size: int = 8
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("split", self.split, SPLITS)
        for name in ("batch_size", "resamples"):
            check_count(name, getattr(self, name))
        check(self.threshold is None or 0 <= self.threshold <= 1, "threshold", "lie in 0..1", self.threshold)
        check(self.seed >= 0, "seed", "not be negative", self.seed)


def add_evaluate_arguments(parser) -> None:
    """The command's options, added to a parser of jsonargparse."""
    parser.add_argument("weights", type=str, help="safetensors that sdr train or sdr convert wrote")
    parser.add_argument("caches", nargs="+", help="clip caches that sdr prepare wrote")
    parser.add_argument("--out", type=str, default="sdr_evaluation", help="folder; earlier results are replaced")
    parser.add_class_arguments(EvaluateConfig)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_evaluate(options) -> int:
    import sdr
    from sdr.checkpoint import load_model
    from sdr.evaluate import evaluate_groups
    from sdr.fast import accelerate

    config = settings(EvaluateConfig, options)
    require("prepare", "train")
    device = pick_device(options.device)
    model, info = load_model(options.weights)
    sha256 = file_digest(options.weights)
    threshold, source = pick_threshold(config, info, options.weights)
    caches = open_caches(options.caches, config, model.config)
    out = Path(options.out)
    make_folder(out)
    if any(out.iterdir()) and not (out / "evaluation.json").is_file():
        raise SDRError(out, "is not empty and was not written by sdr evaluate", "choose a new folder")
    scored = score_all(accelerate(model.to(device)), caches, config, device)
    draws = {"resamples": config.resamples, "seed": config.seed}
    groups = [g for videos in scored for g in evaluate_groups(videos, validation_threshold=threshold, **draws)]
    synthetic = info.synthetic or any(cache.settings.get("synthetic") for cache in caches.values())
    weights = {"path": escape(Path(options.weights).resolve()), "sha256": sha256, "model": type(model).__name__}
    document = {
        "version": sdr.__version__,
        "synthetic": synthetic,
        "note": SYNTHETIC_NOTE if synthetic else "",
        "weights": weights | {"config": asdict(model.config), "info": asdict(info)},
        "settings": asdict(config) | {"device": str(device)},
        VALIDATION_THRESHOLD: {"value": threshold, "from": source},
        "caches": [describe_cache(name, cache) for name, cache in caches.items()],
        "groups": [group._asdict() for group in groups],
    }
    write_results(out, document, scored, caches)
    print_groups(document)
    print(f"results: {escape((out / 'evaluation.md').resolve())}")
    return 0


def pick_threshold(config: EvaluateConfig, info: WeightsInfo, weights: str) -> tuple[float | None, str | None]:
    """The validation threshold and where it is from; none is said on standard error."""
    if config.threshold is not None:
        return config.threshold, "--threshold"
    found = info.metrics.get(VALIDATION_THRESHOLD)
    if found is None:
        what = f"note: the weights carry no {VALIDATION_THRESHOLD}, so the accuracy is that at 0.5 alone"
        print(f"{what}; --threshold gives another", file=sys.stderr)
        return None, None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise SDRError(weights, f"carries a {VALIDATION_THRESHOLD} that is no number", "--threshold takes its place")
    return float(found), "the weights"


def open_caches(folders: Sequence[str], config: EvaluateConfig, model: FTCNConfig) -> dict[str, ClipCache]:
    """The caches by the name of their dataset, each found fit for the model and the metrics before any is scored."""
    from sdr.clip_cache import ClipCache
    from sdr.evaluate import require_classes, require_shape

    caches: dict[Path, ClipCache] = {}
    for folder in folders:
        real = Path(folder).resolve()
        if real in caches:
            raise SDRError(folder, "is given twice")
        cache = caches[real] = ClipCache(folder, split=config.split, methods=config.methods)
        require_shape(cache, model)
        require_classes(cache.folder, [record.label for record in cache.records], f" in the split {config.split!r}")
        videos = Counter(escape(record.path) for record in cache.records)
        video, count = videos.most_common(1)[0]
        if count > 1:
            raise SDRError(folder, f"has two videos of the name {video}")
    return dict(zip(distinct_names(caches), caches.values(), strict=True))


def distinct_names(caches: Mapping[Path, ClipCache]) -> list[str]:
    """The dataset's name for each cache; caches of one dataset are told apart by their folder's name, or its path."""
    from sdr.evaluate import dataset_name

    short = [escape(dataset_name(cache)) for cache in caches.values()]
    named = [f"{name} ({escape(folder.name)})" for name, folder in zip(short, caches, strict=True)]
    whole = [f"{name} ({escape(folder)})" for name, folder in zip(short, caches, strict=True)]
    choices = zip(short, named, whole, strict=True)
    return [s if short.count(s) == 1 else n if named.count(n) == 1 else w for s, n, w in choices]


def score_all(model, caches: Mapping[str, ClipCache], config: EvaluateConfig, device) -> list[ScoredVideos]:
    """The videos of each cache, under a bar each."""
    from sdr.evaluate import score_videos

    scored = []
    with progress_bars() as bars:
        tasks = {name: bars.add_task(name, total=len(cache)) for name, cache in caches.items()}
        for name, cache in caches.items():
            videos = score_videos(
                model,
                cache,
                dataset=name,
                batch_size=config.batch_size,
                device=device,
                progress=lambda done, total: bars.update(tasks[name], completed=done),  # noqa: B023
            )
            scored.append(videos)
    return scored


def describe_cache(name: str, cache: ClipCache) -> dict:
    return {
        "dataset": name,
        "folder": escape(cache.folder.resolve()),
        "layout": cache.settings.get("layout"),
        "synthetic": bool(cache.settings.get("synthetic")),
        "videos": len(cache.records),
        "clips": len(cache),
        "digest": cache.digest,
    }


def write_results(
    out: Path, document: Mapping, scored: Sequence[ScoredVideos], caches: Mapping[str, ClipCache]
) -> None:
    """The four files; evaluation.json, which holds the whole, comes last."""
    rows = [row for videos in scored for row in video_rows(videos, caches[videos.dataset])]
    ids = [
        {"video_id": f"{row['dataset']}/{row['video']}", "prob": row["score"], "label": row["label"]} for row in rows
    ]
    write_atomic(out / "videos.csv", to_csv(rows, VIDEO_FIELDS))
    write_atomic(out / "scores.csv", to_csv(ids, SCORE_FIELDS))
    write_atomic(out / "evaluation.md", to_markdown(document))
    write_atomic(out / "evaluation.json", json.dumps(document, indent=1) + "\n")


def video_rows(scored: ScoredVideos, cache: ClipCache) -> list[dict]:
    """The rows of videos.csv; names are escaped so that one video is always one line."""
    clips = cache.videos.bincount().tolist()
    columns = zip(scored.videos, scored.labels.tolist(), scored.methods, clips, scored.scores.tolist(), strict=True)
    return [
        dict(zip(VIDEO_FIELDS, (scored.dataset, escape(video), label, escape(method), count, score), strict=True))
        for video, label, method, count, score in columns
    ]


def metric_titles(document: Mapping) -> dict[str, str]:
    """The metrics in the order of the tables, and their columns' titles."""
    from sdr.evaluate import VALIDATION_ACCURACY

    titles = {"video accuracy": "video accuracy at 0.5"}
    if (threshold := document[VALIDATION_THRESHOLD]["value"]) is not None:
        titles[VALIDATION_ACCURACY] = f"video accuracy at {threshold:.3g} (val)"
    return {name: titles.get(name, name) for name in document["groups"][0]["metrics"]}


def in_percent(group: Mapping) -> list[tuple[str, str]]:
    """Each metric of a group and its interval."""
    pairs = zip(group["metrics"].values(), group["intervals"].values(), strict=True)
    return [(f"{100 * value:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]") for value, (low, high) in pairs]


def group_cells(group: Mapping) -> list[str]:
    """A row of a Markdown table without its name."""
    return [str(group["real"]), str(group["fake"]), *map(" ".join, in_percent(group))]


def to_markdown(document: Mapping) -> str:
    """The page of an evaluation: what was measured, tables over the datasets and over the methods of each."""
    config, weights, threshold = document["settings"], document["weights"], document[VALIDATION_THRESHOLD]
    titles = ["real", "fake", *metric_titles(document).values()]
    groups: dict[str, list[Mapping]] = {}
    for group in document["groups"]:
        groups.setdefault(group["dataset"], []).append(group)
    known = f"The validation threshold, {threshold['value']}, is from {threshold['from']}."
    lines = [
        f"# Evaluation on {', '.join(map(plain, groups))}",
        *([f"**{SYNTHETIC_NOTE}**"] if document["synthetic"] else []),
        f"Metrics of videos in percent, split {config['split']}; a video's score is the mean over its clips. "
        + ("No validation threshold is known." if threshold["value"] is None else known),
        f"In brackets: 95 % intervals of {config['resamples']} bootstrap draws of the videos within each class, seed "
        f"{config['seed']}. One without width says that all draws were alike, as with few videos, and not that the "
        "figure is certain.",
        table(["dataset", *titles], [[plain(name), *group_cells(whole)] for name, (whole, *_) in groups.items()]),
    ]
    for name, (_, *methods) in groups.items():
        lines += [f"## Methods of {plain(name)}", "Each against all real videos of the dataset."]
        lines.append(table(["method", *titles], [[plain(g["method"]), *group_cells(g)] for g in methods]))
    caches = [[plain(str(cache[name])) for name in CACHE_TITLES] for cache in document["caches"]]
    lines += [
        "## Weights and data",
        f"{weights['model']}, {plain(weights['path'])}: {plain(weights['info']['origin'])}",
        f"sha256 {weights['sha256']}, sdr {document['version']}",
        table(CACHE_TITLES, caches),
    ]
    return "\n\n".join(lines) + "\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])


def plain(text: str) -> str:
    """Markdown that shows this text, whatever is in it."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", escape(text))


def print_groups(document: Mapping) -> None:
    """The table of all groups on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table("videos", "metric", "percent", "95 % interval", show_lines=True)
    titles = "\n".join(metric_titles(document).values())
    for group in document["groups"]:
        name = f"{group['dataset']}\n{escape(group['method'])}\n{group['real']} real, {group['fake']} fake"
        values, bounds = map("\n".join, zip(*in_percent(group), strict=True))
        shown.add_row(*map(Text, (name, titles, values, bounds)))
    Console().print(shown)
    if document["synthetic"]:
        print(SYNTHETIC_NOTE)
