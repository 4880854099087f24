"""Video-level metrics with intervals, and the scores that they are taken of: what the paper's tables report."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdr.bootstrap import percentile_bounds, resample_metrics
from sdr.clip_cache import ClipCache
from sdr.config import FTCNConfig, check, check_count
from sdr.errors import SDRError
from sdr.ftcn import FTCN
from sdr.model import SDRModel

VALIDATION_ACCURACY = "video accuracy at the validation threshold"


def video_metrics(scores: Sequence[float], labels: Sequence[int], *, threshold: float = 0.5) -> dict[str, float]:
    """AUC, accuracy at ``threshold``, EER and AP of one score per video.

    Args:
        scores: higher means more likely fake.
        labels: 1 = fake, 0 = real.
        threshold: a score at or above it counts as fake.

    Returns:
        ``video AUC``, ``video accuracy``, ``video EER``, ``video AP``; an AUC counts a tie as one half.

    Raises:
        ValueError: different lengths, a score or threshold that is not finite, a label other than 0 and 1, or only one
            class, for which no AUC exists.
    """
    scores, labels = check_scores(scores, labels)
    check(math.isfinite(threshold), "threshold", "be finite", threshold)
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    except ImportError as error:
        raise SDRError("scikit-learn", "is not installed", "pip install 'sdr[train]'") from error
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {
        "video AUC": float(roc_auc_score(labels, scores)),
        "video accuracy": float(np.mean((scores >= threshold) == labels)),
        "video EER": equal_error_rate(fpr, tpr),
        "video AP": float(average_precision_score(labels, scores)),
    }


def check_scores(scores: Sequence[float], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; raises ValueError where :func:`video_metrics` does."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores and labels must be of one length, got {scores.shape} and {labels.shape}")
    if bad := np.count_nonzero(~np.isfinite(scores)):
        raise ValueError(f"scores must be finite, got {bad} NaN or Inf among {len(scores)}")
    if not np.isin(labels, (0, 1)).all() or len(np.unique(labels)) != 2:
        found = sorted({str(label) for label in labels.tolist()})
        raise ValueError(f"labels must hold both 0 and 1 and nothing else, got [{', '.join(found[:5])}]")
    return scores, labels.astype(np.int64)


def equal_error_rate(fpr: np.ndarray, tpr: np.ndarray) -> float:
    """Where the ROC curve, taken as straight between its points, meets false positives = false negatives."""
    gap = fpr - (1 - tpr)  # rises from -1 to 1
    i = int(np.argmax(gap >= 0))
    if gap[i] == 0:
        return float(fpr[i])
    share = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(fpr[i - 1] + share * (fpr[i] - fpr[i - 1]))


def best_threshold(scores: Sequence[float], labels: Sequence[int]) -> float:
    """The threshold of highest accuracy, where a score at or above it counts as fake.

    It lies in the middle between two neighbouring scores; one below or above all of them lies as close to 0.5 as that
    allows. Of several that are equally accurate the closest to 0.5 is taken, and of two as close the lower.

    Raises:
        ValueError: as :func:`video_metrics`.
    """
    scores, labels = check_scores(scores, labels)
    levels, places = np.unique(scores, return_inverse=True)
    real, fake = (np.bincount(places[labels == label], minlength=len(levels)) for label in (0, 1))
    correct = np.r_[0, np.cumsum(real)] + fake.sum() - np.r_[0, np.cumsum(fake)]  # [K + 1], of the scores' K levels
    below, above = levels[:-1], levels[1:]
    middle = below / 2 + above / 2
    middle = np.where(middle > below, middle, above)  # nothing lies between two neighbours of float64
    candidates = np.r_[min(0.5, levels[0]), middle, max(0.5, np.nextafter(levels[-1], np.inf))]
    best = candidates[correct == correct.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def intervals(
    scores: Sequence[float],
    labels: Sequence[int],
    *,
    threshold: float = 0.5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap of :func:`video_metrics`: videos are drawn again within each class, so both stay.

    Args:
        scores: higher means more likely fake.
        labels: 1 = fake, 0 = real.
        threshold: of the accuracy.
        resamples: sets of videos that are drawn.
        level: share of the resamples that lies within the bounds.
        seed: of the draws.

    Returns:
        Lower and upper bound by the metric's name.

    Raises:
        ValueError: as :func:`video_metrics`, or ``resamples``, ``level`` or ``seed`` is out of range.
    """
    scores, labels = check_scores(scores, labels)
    check(math.isfinite(threshold), "threshold", "be finite", threshold)
    drawn = resample_metrics(scores, labels, {"video accuracy": threshold}, resamples=resamples, seed=seed)
    return percentile_bounds(drawn, level)


def in_halves(run: Callable[..., Tensor], *rows: Sequence, device: torch.device | str) -> Tensor:
    """``run(*rows)``, its rows in halves where they do not fit into memory together.

    Args:
        run: gives one value for each row.
        rows: sequences of one length, the clips first.
        device: that ``run`` works on, for the message.

    Raises:
        SDRError: a single row does not fit.
    """
    try:
        return run(*rows)
    except RuntimeError as error:  # on the CPU, running out of memory has no type of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        if len(rows[0]) == 1:
            raise SDRError("memory", f"one clip does not fit into the memory of {device}") from None
    half = len(rows[0]) // 2  # outside of the handler, which keeps what the failed run had allocated
    parts = [[row[:half] for row in rows], [row[half:] for row in rows]]
    return torch.cat([in_halves(run, *part, device=device) for part in parts])


@torch.no_grad()  # not inference_mode: FSDP would keep its tensors for later updates
def clip_scores(
    forward: Callable[[Tensor], Tensor],
    cache: ClipCache,
    indices: Sequence[int] | Tensor | None = None,
    *,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Scores of the clips of a cache, [n] float64 in [0, 1] on the CPU.

    Args:
        forward: uint8 clips, [B, 3, T, S, S] on ``device``, to logits, [B].
        cache: the clips.
        indices: of the n clips to score; None takes all.
        batch_size: clips in a call of ``forward``, halved where memory runs out.
        device: to put the clips on.
        progress: called with the clips done and all.

    Raises:
        SDRError: a clip cannot be read, gives no finite logit or does not fit into memory.
    """
    check_count("batch_size", batch_size)
    indices = torch.arange(len(cache)) if indices is None else torch.as_tensor(indices)
    parts = [part.tolist() for part in indices.split(batch_size)] if len(indices) else []
    scores = [torch.empty(0, dtype=torch.float64)]
    done = 0
    with closing(read_ahead(cache, parts)) as batches:
        for part, clips in zip(parts, batches, strict=True):
            logits = in_halves(lambda clips: forward(clips.to(device)).cpu().double(), clips, device=device)
            for i, finite in zip(part, logits.isfinite().tolist(), strict=True):
                if not finite:
                    raise SDRError("weights", f"the model gives no finite score for {cache.name(i)}")
            scores.append(logits.sigmoid())
            done += len(part)
            progress(done, len(indices))
    return torch.cat(scores)


def read_ahead(cache: ClipCache, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The clips of each part, uint8 [B, 3, T, S, S]; the next are read while one is worked on."""

    def read(part: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([cache.read(i) for i in part])).permute(0, 4, 1, 2, 3)

    with ThreadPoolExecutor(1) as pool:
        reading = [pool.submit(read, part) for part in parts[:1]]
        for part in parts[1:]:
            reading.append(pool.submit(read, part))
            yield reading.pop(0).result()
        for last in reading:
            yield last.result()


def video_scores(scores: Tensor, cache: ClipCache) -> np.ndarray:
    """The mean of each video's clip scores, [len(cache.records)] float64; ``scores`` are those of all clips."""
    videos = cache.videos.numpy()
    return np.bincount(videos, scores.double().numpy()) / np.bincount(videos)


def require_shape(cache: ClipCache, config: FTCNConfig) -> None:
    """Raise SDRError where the cache's clips are not of the model's size."""
    T, S = cache.shape[:2]
    if config.num_frames != T or config.image_size != S:
        wanted = f"--num_frames {config.num_frames} --size {config.image_size}"
        raise SDRError(
            cache.folder, f"holds clips of {T} x {S} x {S}", f"the model takes those of sdr prepare {wanted}"
        )


def require_classes(what: str | Path, labels: Sequence[int], place: str = "", *, use: str = "an evaluation") -> None:
    """Raise SDRError where the videos are all real or all fake."""
    if len(found := set(map(int, labels))) == 1:
        kind = ("real", "fake")[found.pop()]
        raise SDRError(what, f"has only {kind} videos{place}", f"{use} needs real and fake ones")


class ScoredVideos(NamedTuple):
    """One dataset's videos, their scores [n] float64, labels [n] int64 and methods, ``real`` for the real ones."""

    dataset: str
    videos: tuple[str, ...]
    scores: np.ndarray
    labels: np.ndarray
    methods: tuple[str, ...]


class Group(NamedTuple):
    """Metrics of all videos of a dataset, or of one method's fakes and all the real videos, with their intervals."""

    dataset: str
    method: str
    real: int
    fake: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def dataset_name(cache: ClipCache) -> str:
    """The cache's layout, or where that is a table of anybody's videos, the name of its folder."""
    layout = cache.settings.get("layout", "csv")
    return cache.folder.resolve().name if layout == "csv" else str(layout)


def score_videos(
    model: FTCN | SDRModel,
    cache: ClipCache,
    *,
    dataset: str | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoredVideos:
    """The score of each video of a cache: the mean over its clips, the same clip for every branch.

    Args:
        model: in evaluation mode, on ``device``.
        cache: clips of the model's size.
        dataset: name; None is :func:`dataset_name`'s.
        batch_size: clips in a forward pass, halved where memory runs out.
        device: of the model.
        progress: called with the clips done and all.

    Raises:
        SDRError: as :func:`require_shape` and :func:`clip_scores`.
        ValueError: the model is in training.
    """
    check(not model.training, "model", "be in evaluation mode", "one in training")
    require_shape(cache, model.config)

    def forward(clips: Tensor) -> Tensor:
        return model(clips).logits

    clips = clip_scores(forward, cache, batch_size=batch_size, device=device, progress=progress)
    return ScoredVideos(
        dataset_name(cache) if dataset is None else dataset,
        tuple(str(record.path) for record in cache.records),
        video_scores(clips, cache),
        np.array([record.label for record in cache.records]),
        tuple(record.method if record.label else "real" for record in cache.records),
    )


def evaluate_groups(
    scored: ScoredVideos, *, validation_threshold: float | None = None, resamples: int = 1000, seed: int = 0
) -> list[Group]:
    """Metrics of one dataset: of the method ``all``, then of each fake method against all real videos.

    Args:
        scored: the videos.
        validation_threshold: adds the accuracy at it, where it is known.
        resamples: of the 95 % intervals.
        seed: of the intervals.

    Raises:
        SDRError: the dataset has a single class.
        ValueError: a score is not finite, or an option is out of range.
    """
    require_classes(scored.dataset, scored.labels)
    thresholds = {"video accuracy": 0.5}
    if validation_threshold is not None:
        thresholds[VALIDATION_ACCURACY] = validation_threshold
    methods, fake = np.array(scored.methods), scored.labels == 1
    chosen = {"all": np.ones(len(fake), bool)} | {m: ~fake | (methods == m) for m in sorted(set(methods[fake]))}
    groups = []
    for method, rows in chosen.items():
        scores, labels = scored.scores[rows], scored.labels[rows]
        found = {name: video_metrics(scores, labels, threshold=t) for name, t in thresholds.items()}
        drawn = resample_metrics(scores, labels, thresholds, resamples=resamples, seed=seed)
        metrics = found["video accuracy"] | {name: found[name]["video accuracy"] for name in thresholds}
        metrics = {name: metrics[name] for name in drawn}
        counts = np.bincount(labels, minlength=2).tolist()
        groups.append(Group(scored.dataset, str(method), *counts, metrics, percentile_bounds(drawn)))
    return groups
