"""Metrics against their definitions, ties included."""

import time
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest

from sdr.evaluate import best_threshold, video_metrics


def auc_by_pairs(scores, labels):
    """The definition: the share of (fake, real) pairs in the right order, a tie counting one half."""
    fake = [s for s, y in zip(scores, labels, strict=True) if y == 1]
    real = [s for s, y in zip(scores, labels, strict=True) if y == 0]
    return np.mean([1.0 if f > r else 0.5 if f == r else 0.0 for f, r in product(fake, real)])


@pytest.mark.promise(row="metrics")
@pytest.mark.parametrize("levels", [2, 5, 10**6], ids=["many ties", "some ties", "none"])
def test_auc_is_the_share_of_ordered_pairs(levels):
    rng = np.random.default_rng(levels)
    for _ in range(20):
        labels = rng.permutation([0] * 13 + [1] * 21)
        scores = (rng.integers(0, levels, 34) + labels * levels * 0.2) / (1.2 * levels)
        assert abs(video_metrics(scores, labels)["video AUC"] - auc_by_pairs(scores, labels)) < 1e-12


@pytest.mark.promise(row="metrics")
def test_all_scores_equal_is_one_half():
    assert video_metrics([0.3] * 4, [0, 1, 0, 1])["video AUC"] == 0.5


@pytest.mark.promise(row="metrics")
def test_accuracy_counts_the_threshold_itself_as_fake():
    assert video_metrics([0.5, 0.4, 0.6, 0.5], [1, 0, 0, 0])["video accuracy"] == 0.5
    assert video_metrics([0.5, 0.4, 0.6, 0.5], [1, 0, 0, 0], threshold=0.7)["video accuracy"] == 0.75


@pytest.mark.promise(row="metrics")
@pytest.mark.parametrize(
    ("scores", "labels", "eer"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.0),
        ([0.1, 0.8, 0.2, 0.9], [0, 0, 1, 1], 0.5),
        ([0.1, 0.2, 0.7, 0.3, 0.8, 0.9], [0, 0, 0, 1, 1, 1], 1 / 3),
        ([0.5, 0.5], [0, 1], 0.5),
    ],
)
def test_eer_by_hand(scores, labels, eer):
    assert abs(video_metrics(scores, labels)["video EER"] - eer) < 1e-12


def test_average_precision_by_hand():
    # ranked: fake, real, fake: precision 1 at the first, 2/3 at the second
    assert abs(video_metrics([0.9, 0.8, 0.7], [1, 0, 1])["video AP"] - (1 + 2 / 3) / 2) < 1e-12


def exact_roc(scores, labels):
    """Points (false positives, true positives) of the ROC curve as fractions, from (0, 0) to (1, 1)."""
    fake = [s for s, y in zip(scores, labels, strict=True) if y == 1]
    real = [s for s, y in zip(scores, labels, strict=True) if y == 0]
    points = [(Fraction(0), Fraction(0))]
    for threshold in sorted(set(scores), reverse=True):
        points.append(tuple(Fraction(sum(s >= threshold for s in of), len(of)) for of in (real, fake)))
    return points


def exact_eer(points):
    for (x0, y0), (x1, y1) in pairwise(points):
        before, after = x0 + y0 - 1, x1 + y1 - 1
        if before < 0 <= after:
            return x0 + (x1 - x0) * before / (before - after)
    raise AssertionError("the curve ends above the diagonal")


def exact_ap(points, reals, fakes):
    """Precision at each step of recall."""
    return sum((y1 - y0) * y1 * fakes / (y1 * fakes + x1 * reals) for (_, y0), (x1, y1) in pairwise(points) if y1 > y0)


@pytest.mark.promise(row="metrics")
@pytest.mark.parametrize("levels", [1, 2, 7, 10**6])
def test_all_metrics_equal_exact_fractions(levels):
    rng = np.random.default_rng(levels)
    for reals, fakes in ((1, 1), (1, 9), (23, 31)):
        labels = rng.permutation([0] * reals + [1] * fakes)
        scores = rng.integers(0, levels, reals + fakes) / levels
        points = exact_roc(scores.tolist(), labels.tolist())
        correct = sum((s >= 0.5) == (y == 1) for s, y in zip(scores.tolist(), labels.tolist(), strict=True))
        exact = {
            "video AUC": sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points)),
            "video accuracy": Fraction(correct, len(scores)),
            "video EER": exact_eer(points),
            "video AP": exact_ap(points, reals, fakes),
        }
        found = video_metrics(scores, labels)
        assert found.keys() == exact.keys()
        for name, value in exact.items():
            assert abs(found[name] - float(value)) < 1e-12, name


def test_a_million_videos_take_seconds():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 10**6)
    scores = np.round(rng.normal(0.4 + 0.1 * labels, 0.2), 4)  # with ties
    began = time.perf_counter()
    found, threshold = video_metrics(scores, labels), best_threshold(scores, labels)
    assert time.perf_counter() - began < 20
    fake, real = scores[labels == 1], np.sort(scores[labels == 0])
    below, upto = (int(np.searchsorted(real, fake, side).sum()) for side in ("left", "right"))
    assert abs(found["video AUC"] - (below + upto) / (2 * len(fake) * len(real))) < 1e-12
    assert found["video accuracy"] == ((scores >= 0.5) == labels).mean()
    fake = np.sort(fake)
    cuts = np.unique(scores)
    correct = np.searchsorted(real, cuts) + len(fake) - np.searchsorted(fake, cuts)
    assert np.count_nonzero((scores >= threshold) == labels) == correct.max()


@pytest.mark.parametrize("levels", [2, 5, 40, 10**6])
def test_best_threshold_is_as_accurate_as_any(levels):
    rng = np.random.default_rng(levels)
    for _ in range(50):
        labels = rng.permutation([0] * rng.integers(1, 12) + [1] * rng.integers(1, 12))
        scores = rng.integers(0, levels, len(labels)) / levels * rng.choice([-3, 1, 1])

        def correct(threshold, scores=scores, labels=labels):
            return np.count_nonzero((scores >= threshold) == labels)

        threshold = best_threshold(scores, labels)
        assert correct(threshold) == max(map(correct, [-np.inf, np.inf, *scores]))


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1], 0.625),  # the middle of the gap
        ([0.125, 0.25, 0.75, 0.875], [0, 1, 0, 1], 0.1875),  # 3 of 4 here and at 0.8125: as close to 0.5, so the lower
        ([0.125, 0.25, 0.5, 0.75], [0, 1, 0, 1], 0.625),  # 3 of 4 at 0.1875 too, farther from 0.5
        ([0.75, 0.75], [0, 1], 0.5),  # below all scores
        ([0.25, 0.25], [0, 1], 0.5),  # above all
        ([0.25, 0.75], [1, 0], 0.25),  # below all; above all is farther by one step of float64
        ([1.0, np.nextafter(1.0, 2)], [0, 1], np.nextafter(1.0, 2)),  # nothing between the two
        ([0.0, 5e-324], [0, 1], 5e-324),
    ],
)
def test_best_threshold_by_hand(scores, labels, threshold):
    assert best_threshold(scores, labels) == threshold


def test_metrics_take_labels_of_any_kind():
    expected = video_metrics([0.1, 0.7, 0.4], [0, 1, 1])
    assert video_metrics(np.array([0.1, 0.7, 0.4]), np.array([False, True, True])) == expected
    assert video_metrics((0.1, 0.7, 0.4), np.array([0.0, 1.0, 1.0])) == expected


@pytest.mark.parametrize("function", [video_metrics, best_threshold])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1], [1], "must hold both 0 and 1"),
        ([0.1, 0.2], [0, 0], r"must hold both 0 and 1 and nothing else, got \[0\]"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "must hold both"),
        ([0.1, 0.2, 0.3], [0, 1, float("nan")], r"must hold both 0 and 1 and nothing else, got \[0\.0, 1\.0, nan\]"),
        ([], [], "must hold both"),
        ([0.1], [0, 1], "one length"),
        ([[0.1, 0.2]], [[0, 1]], "one length"),
        ([0.1, float("nan"), 0.2], [0, 1, 1], "scores must be finite, got 1 NaN or Inf among 3"),
        ([float("-inf"), float("nan"), 0.2, np.inf], [0, 1, 1, 0], "scores must be finite, got 3 NaN or Inf among 4"),
    ],
)
def test_rejects(function, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        function(scores, labels)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_rejects_a_threshold_that_is_not_finite(threshold):
    with pytest.raises(ValueError, match="threshold must be finite"):
        video_metrics([0.1, 0.2], [0, 1], threshold=threshold)
