"""Metrics against their definitions, ties included."""

from itertools import product

import numpy as np
import pytest

from sdr.evaluate import video_metrics


def auc_by_pairs(scores, labels):
    """The definition: the share of (fake, real) pairs in the right order, a tie counting one half."""
    fake = [s for s, y in zip(scores, labels, strict=True) if y == 1]
    real = [s for s, y in zip(scores, labels, strict=True) if y == 0]
    return np.mean([1.0 if f > r else 0.5 if f == r else 0.0 for f, r in product(fake, real)])


@pytest.mark.parametrize("levels", [2, 5, 10**6], ids=["many ties", "some ties", "none"])
def test_auc_is_the_share_of_ordered_pairs(levels):
    rng = np.random.default_rng(levels)
    for _ in range(20):
        labels = rng.permutation([0] * 13 + [1] * 21)
        scores = (rng.integers(0, levels, 34) + labels * levels * 0.2) / (1.2 * levels)
        assert abs(video_metrics(scores, labels)["video AUC"] - auc_by_pairs(scores, labels)) < 1e-12


def test_all_scores_equal_is_one_half():
    assert video_metrics([0.3] * 4, [0, 1, 0, 1])["video AUC"] == 0.5


def test_accuracy_counts_the_threshold_itself_as_fake():
    assert video_metrics([0.5, 0.4, 0.6, 0.5], [1, 0, 0, 0])["video accuracy"] == 0.5
    assert video_metrics([0.5, 0.4, 0.6, 0.5], [1, 0, 0, 0], threshold=0.7)["video accuracy"] == 0.75


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


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [([0.1], [1], "must hold both 0 and 1"), ([0.1, 0.2], [0, 2], "must hold both"), ([0.1], [0, 1], "one length")],
)
def test_rejects(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        video_metrics(scores, labels)
