"""A training run as one HTML page: its curves, what the validation split says, and how it was configured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdr.errors import escape
from sdr.page import render_page
from sdr.run_log import LOSS_PARTS
from sdr.terminal import SYNTHETIC_NOTE
from sdr.train_config import flatten

if TYPE_CHECKING:
    from sdr.evaluate import ScoredVideos

Row = Mapping[str, float]
POINTS = 2000  # of a curve, at most; a screen has fewer columns
SMOOTHED = 50  # parts of the run that one smoothed value is the mean of one of
MARKS = 1000  # skipped steps that are drawn, at most
BINS = 40  # of a histogram of scores
CURVES = ("video AUC", "video accuracy", "video EER")  # of the validation's plot; its table has every metric
TITLES = {"total": "Total", "ce": "Cross-entropy", "mi": "Mutual information", "contrastive": "Contrastive"}
TITLES |= {"aux": "Auxiliary cross-entropy", "lr": "Learning rate", "grad_norm": "Gradient norm"}
TITLES |= {"clips_per_second": "Clips a second", "memory_gb": "GPU memory, GB"}


@dataclass(frozen=True)
class TrainingRun:
    """What the page says of a run.

    Args:
        title: the page's heading.
        config: settings, nested.
        origin: what the model was trained on, in a sentence.
        synthetic: on synthetic videos; a banner says what a metric is worth then.
        version: version of this software.
        created: ISO 8601 time.
        losses: rows of losses.csv.
        throughput: rows of throughput.csv.
        validation: rows of validation.csv; the last of the highest AUC is marked as the best.
        scored: the validation videos, by the weights that were kept; None without a validation split.
        threshold: the validation split's most accurate one.
        metrics: name to value, of the weights that were kept.
    """

    title: str
    config: Mapping[str, object]
    origin: str
    synthetic: bool
    version: str
    created: str
    losses: Sequence[Row]
    throughput: Sequence[Row]
    validation: Sequence[Row]
    scored: ScoredVideos | None
    threshold: float | None
    metrics: Mapping[str, float]


def render_training_report(run: TrainingRun) -> str:
    """The page of a run; all text is escaped, and the page forbids itself every network request."""
    curves = [*loss_curves(run.losses), *throughput_curves(run.throughput)]
    scores = None if run.scored is None or len(set(run.scored.labels.tolist())) < 2 else score_plots(run)
    return render_page(
        "training_report.html",
        run=run,
        version=escape(run.version),
        title=escape(run.title),
        facts=facts(run),
        metrics={escape(name): shown(value) for name, value in run.metrics.items()},
        groups={group: [c for c in curves if c["group"] == group] for group in ("loss", "step", "speed")},
        window=smoothing_window(len(run.losses)),
        thinned=len(run.losses) > POINTS,
        validation=validation_table(run.validation),
        scores=scores,
        settings=settings_tables(run.config),
        synthetic_note=SYNTHETIC_NOTE,
        data={
            "curves": curves,
            "skipped": skipped_steps(run.losses)[:MARKS],
            "validation": validation_plot(run.validation),
            "scores": scores,
        },
    )


def facts(run: TrainingRun) -> dict[str, str]:
    """What the head of the page lists."""
    skipped = len(skipped_steps(run.losses))
    found = {"Trained on": escape(run.origin) or "not recorded"}
    if run.losses:
        found["Steps"] = f"{int(run.losses[-1]['step']):,}"
        found["Skipped steps"] = f"{skipped}: their loss or gradient was not finite" if skipped else "none"
    if run.throughput:
        found["Time in training"] = duration(math.fsum(row["seconds"] for row in run.throughput))
    if run.scored is not None:
        fake = int(np.sum(run.scored.labels))
        found["Validation videos"] = f"{len(run.scored.labels) - fake} real, {fake} fake"
    if run.threshold is not None:
        found["Validation threshold"] = f"{run.threshold:.4f}, the most accurate there"
    return found | {"Made": escape(run.created), "Version": escape(run.version)}


def duration(seconds: float) -> str:
    """In the two largest units that it takes."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.1f} s"
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def thin(length: int, most: int) -> np.ndarray:
    """Indices of at most ``most`` of ``length`` values, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def smoothing_window(length: int) -> int:
    """Steps in a smoothed value: an odd number."""
    return 2 * (length // (2 * SMOOTHED)) + 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over ``window`` neighbours of each value, fewer at the ends; leaves out what is not finite, which is
    NaN where nothing is left."""
    finite = np.isfinite(values)
    sums = np.r_[0.0, np.cumsum(np.where(finite, values, 0.0))]
    counts = np.r_[0, np.cumsum(finite)]
    place = np.arange(len(values))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def numbers(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """For JSON: five digits, and None for what is not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def skipped_steps(losses: Sequence[Row]) -> list[int]:
    return [int(row["step"]) for row in losses if row["skipped"]]


def loss_curves(losses: Sequence[Row]) -> list[dict[str, Any]]:
    """The parts of the loss, the learning rate and the gradient's norm; a part that is 0 throughout is left out."""
    if not losses:
        return []
    window = smoothing_window(len(losses))
    curves = []
    for name in (*LOSS_PARTS, "lr", "grad_norm"):
        values = column(losses, name)
        if name == "total" or values.any():
            smoothed = smooth(values, window) if name != "lr" and window > 1 else None
            curves.append(curve(name, "loss" if name in LOSS_PARTS else "step", losses, values, smoothed))
    return curves


def throughput_curves(throughput: Sequence[Row]) -> list[dict[str, Any]]:
    """Clips a second and memory; memory that is 0 throughout was not measured."""
    if not throughput:
        return []
    found = {name: column(throughput, name) for name in ("clips_per_second", "memory_gb")}
    return [curve(name, "speed", throughput, values) for name, values in found.items() if np.nan_to_num(values).any()]


def curve(
    name: str, group: str, rows: Sequence[Row], values: np.ndarray, smoothed: np.ndarray | None = None
) -> dict[str, Any]:
    """One curve over the steps, thinned to what a screen can show."""
    keep = thin(len(rows), POINTS)
    return {
        "name": name,
        "title": TITLES[name],
        "group": group,
        "step": column(rows, "step")[keep].astype(int).tolist(),
        "value": numbers(values[keep]),
        "smooth": None if smoothed is None else numbers(smoothed[keep]),
    }


def best_row(validation: Sequence[Row]) -> int | None:
    """Index of the last row of the highest AUC: the one whose weights are kept."""
    found = [row.get("video AUC", math.nan) for row in validation]
    return len(found) - 1 - int(np.nanargmax(found[::-1])) if np.isfinite(found).any() else None


def validation_plot(validation: Sequence[Row]) -> dict[str, Any] | None:
    names = [name for name in CURVES if validation and name in validation[0]]
    if not names:
        return None
    best, keep = best_row(validation), thin(len(validation), POINTS)
    return {
        "epoch": numbers(column(validation, "epoch")[keep]),
        "step": column(validation, "step")[keep].astype(int).tolist(),
        "curves": [{"name": name, "value": numbers(column(validation, name)[keep])} for name in names],
        "best": None if best is None else {name: validation[best][name] for name in ("epoch", "step", "video AUC")},
    }


def validation_table(validation: Sequence[Row]) -> dict[str, Any] | None:
    """Every metric of every evaluation."""
    if not validation:
        return None
    names = [name for name in validation[0] if name not in ("step", "epoch")]
    best = best_row(validation)
    rows = [
        {
            "step": int(row["step"]),
            "epoch": f"{row['epoch']:.4g}",
            "cells": [shown(row[n]) for n in names],
            "best": i == best,
        }
        for i, row in enumerate(validation)
    ]
    return {"names": [escape(name) for name in names], "rows": rows}


def score_plots(run: TrainingRun) -> dict[str, Any]:
    """ROC curve with the thresholds on it, and a histogram for the real videos and for each method."""
    from sdr.evaluate import video_metrics

    scores, labels = np.asarray(run.scored.scores, np.float64), np.asarray(run.scored.labels)
    thresholds = {"0.5": 0.5} | ({} if run.threshold is None else {"validation": run.threshold})
    false, true = roc(scores, labels)
    keep = thin(len(false), POINTS)
    marks = [
        {
            "name": name,
            "value": value,
            "false": float(np.mean(scores[labels == 0] >= value)),
            "true": float(np.mean(scores[labels == 1] >= value)),
        }
        for name, value in thresholds.items()
    ]
    auc = video_metrics(scores, labels)["video AUC"]
    methods = np.array(run.scored.methods)
    return {
        "auc": shown(auc),
        "false": numbers(false[keep]),
        "true": numbers(true[keep]),
        "thresholds": marks,
        "methods": [histogram("real", scores[labels == 0], fake=False)]
        + [
            histogram(str(name), scores[(labels == 1) & (methods == name)], fake=True)
            for name in sorted(set(methods[labels == 1]))
        ],
    }


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, one point for each distinct score, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    last = np.r_[np.diff(scores[order]) != 0, True]  # of equal scores, which a threshold cannot part
    true, false = np.cumsum(labels[order] == 1)[last], np.cumsum(labels[order] == 0)[last]
    return np.r_[0, false] / false[-1], np.r_[0, true] / true[-1]


def histogram(name: str, scores: np.ndarray, *, fake: bool) -> dict[str, Any]:
    counts, _ = np.histogram(scores, BINS, (0, 1))
    return {"name": escape(name), "fake": fake, "videos": len(scores), "counts": counts.tolist()}


def settings_tables(config: Mapping[str, object]) -> dict[str, list[tuple[str, str]]]:
    """Group to its settings, names and values as text; the group of what stands alone is named run."""
    tables: dict[str, list[tuple[str, str]]] = {}
    for name, value in flatten(config).items():
        group, dot, rest = name.partition(".")
        text = value if isinstance(value, str) else json.dumps(value)
        tables.setdefault(escape(group) if dot else "run", []).append((escape(rest or name), escape(text)))
    return tables
