"""The bootstrap of video-level metrics: videos are drawn again within each class, and counted by score, not sorted."""

from collections.abc import Mapping

import numpy as np

from sdr.config import check, check_count

CHUNK = 2**20  # drawn videos that are counted at a time


def percentile_bounds(drawn: Mapping[str, np.ndarray], level: float = 0.95) -> dict[str, tuple[float, float]]:
    """The bounds between which the middle share ``level`` of each metric's values lies."""
    check(0 < level < 1, "level", "lie between 0 and 1", level)
    shares = (0.5 - level / 2, 0.5 + level / 2)
    return {name: tuple(np.quantile(values, shares).tolist()) for name, values in drawn.items()}


def resample_metrics(
    scores: np.ndarray, labels: np.ndarray, thresholds: Mapping[str, float], *, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Metrics of videos drawn with replacement, as many of each class as there are: [resamples] float64 by name.

    Args:
        scores: [n] float64, finite; higher means more likely fake.
        labels: [n] int64, 1 = fake, 0 = real, both there.
        thresholds: the name of each accuracy and its threshold.
        resamples: sets of videos that are drawn.
        seed: the draws of the real and of the fake videos come from the two generators that
            ``np.random.default_rng(seed)`` spawns.
    """
    check_count("resamples", resamples)
    levels, places = np.unique(-scores, return_inverse=True)  # the highest score first
    kept = {name: np.count_nonzero(levels <= -threshold) for name, threshold in thresholds.items()}
    generators = np.random.default_rng(seed).spawn(2)
    parts, rows = [], max(1, CHUNK // len(scores))
    for first in range(0, resamples, rows):
        real, fake = (
            draw_counts(generator, places[labels == label], min(rows, resamples - first), len(levels))
            for label, generator in enumerate(generators)
        )
        parts.append(counted_metrics(real, fake, kept))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def draw_counts(generator: np.random.Generator, places: np.ndarray, rows: int, levels: int) -> np.ndarray:
    """How often each score is among ``len(places)`` draws, [rows, levels]; ``places`` are the scores' levels."""
    drawn = places[generator.integers(0, len(places), (rows, len(places)))]
    drawn += levels * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * levels).reshape(rows, levels)


def counted_metrics(real: np.ndarray, fake: np.ndarray, kept: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The metrics of each row of counts.

    Args:
        real: how many real videos have each score, the highest score first, [R, K]; every row has the same sum.
        fake: the same of the fakes.
        kept: by the name of an accuracy, how many of the K scores reach its threshold.
    """
    fp, tp = (np.pad(np.cumsum(counts, 1), ((0, 0), (1, 0))) for counts in (real, fake))  # [R, K + 1]
    N, P = int(fp[0, -1]), int(tp[0, -1])
    auc = (real * (tp[:, 1:] + tp[:, :-1])).sum(1) / (2 * N * P)
    accuracies = {name: (tp[:, k] + N - fp[:, k]) / (N + P) for name, k in kept.items()}
    gap = fp * P + (tp - P) * N  # N * P times false positives less false negatives, in whole numbers
    after = np.argmax(gap >= 0, 1)[:, None]
    (gap0, gap1), (fp0, fp1) = ([np.take_along_axis(x, i, 1)[:, 0] for i in (after - 1, after)] for x in (gap, fp))
    eer = (fp0 + gap0 / (gap0 - gap1) * (fp1 - fp0)) / N
    precision = tp[:, 1:] / np.maximum(tp[:, 1:] + fp[:, 1:], 1)
    return {"video AUC": auc, **accuracies, "video EER": eer, "video AP": (fake * precision).sum(1) / P}
