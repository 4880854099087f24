"""The bootstrap against metrics of lists that were really drawn, and against scipy's."""

import time
from functools import cache

import numpy as np
import pytest
from scipy.stats import bootstrap

from sdr import bootstrap as own
from sdr.evaluate import intervals, video_metrics

NAMES = ["video AUC", "video accuracy", "video EER", "video AP"]


def some_videos(levels: int, reals: int = 40, fakes: int = 55) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(levels)
    labels = rng.permutation([0] * reals + [1] * fakes)
    return np.floor(np.clip(rng.normal(0.45 + 0.15 * labels, 0.2), 0, 0.999) * levels) / levels, labels


@pytest.mark.parametrize("chunk", [1, 400, 2**20])
@pytest.mark.parametrize("levels", [1, 3, 20, 10**6])
def test_each_resample_is_the_metric_of_the_drawn_videos(levels, chunk, monkeypatch):
    monkeypatch.setattr(own, "CHUNK", chunk)
    scores, labels = some_videos(levels)
    thresholds = {"video accuracy": 0.5, "other accuracy": 0.37}
    found = own.resample_metrics(scores, labels, thresholds, resamples=30, seed=7)
    assert list(found) == ["video AUC", "video accuracy", "other accuracy", "video EER", "video AP"]
    real, fake = (
        generator.choice(scores[labels == label], (30, np.count_nonzero(labels == label)))
        for label, generator in enumerate(np.random.default_rng(7).spawn(2))
    )
    for i in range(30):
        drawn, classes = np.r_[real[i], fake[i]], np.repeat([0, 1], [real.shape[1], fake.shape[1]])
        expected = video_metrics(drawn, classes)
        expected["other accuracy"] = video_metrics(drawn, classes, threshold=0.37)["video accuracy"]
        for name, value in expected.items():
            assert abs(found[name][i] - value) < 1e-12, (name, i)


def test_intervals_are_percentiles_of_the_resamples():
    scores, labels = some_videos(20)
    drawn = own.resample_metrics(scores, labels, {"video accuracy": 0.4}, resamples=300, seed=5)
    found = intervals(scores, labels, threshold=0.4, resamples=300, level=0.8, seed=5)
    assert list(found) == NAMES
    for name, bounds in found.items():
        assert np.allclose(bounds, np.percentile(drawn[name], [10, 90]), rtol=0, atol=1e-14), name


@cache
def metrics_of(real: bytes, fake: bytes) -> dict[str, float]:
    scores = [np.frombuffer(part) for part in (real, fake)]
    return video_metrics(np.concatenate(scores), np.repeat([0, 1], [len(part) for part in scores]))


@pytest.mark.parametrize("name", NAMES)
def test_bounds_agree_with_scipy(name):
    """Each bound of scipy lies among our resamples where its own scatter puts it: within 5 standard deviations."""
    scores, labels = some_videos(30)
    ours = own.resample_metrics(scores, labels, {"video accuracy": 0.5}, resamples=20000, seed=0)[name]
    samples, count = (scores[labels == 0], scores[labels == 1]), 800

    theirs = bootstrap(
        samples,
        lambda real, fake: metrics_of(real.tobytes(), fake.tobytes())[name],
        n_resamples=count,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    for share, bound in zip((0.025, 0.975), theirs, strict=True):
        scatter = 5 * np.sqrt(share * (1 - share) * (1 / count + 1 / len(ours)))
        low, high = np.quantile(ours, np.clip([share - scatter, share + scatter], 0, 1))
        assert low - 1e-12 <= bound <= high + 1e-12
    assert theirs.low < theirs.high


def test_the_metrics_of_undrawn_counts_are_those_of_the_list():
    scores, labels = some_videos(10)
    levels, places = np.unique(-scores, return_inverse=True)
    counts = [np.bincount(places[labels == label], minlength=len(levels))[None] for label in (0, 1)]
    found = own.counted_metrics(*counts, {"video accuracy": np.count_nonzero(levels <= -0.5)})
    for name, value in video_metrics(scores, labels).items():
        assert abs(found[name].item() - value) < 1e-12, name


def test_the_seed_decides():
    scores, labels = some_videos(10**6)
    assert intervals(scores, labels, resamples=100) == intervals(scores, labels, resamples=100, seed=0)
    assert intervals(scores, labels, resamples=100) != intervals(scores, labels, resamples=100, seed=1)


def test_one_video_of_each_class_is_always_drawn():
    found = intervals([0.2, 0.9], [0, 1], resamples=50)
    assert found == {"video AUC": (1, 1), "video accuracy": (1, 1), "video EER": (0, 0), "video AP": (1, 1)}


def test_ten_thousand_videos_a_thousand_times_take_seconds():
    scores, labels = some_videos(10**6, 5000, 5000)
    began = time.perf_counter()
    found = intervals(scores, labels)
    assert time.perf_counter() - began < 20
    for name, value in video_metrics(scores, labels).items():
        low, high = found[name]
        assert low < value < high
        assert high - low < 0.05


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([0.1, 0.2], {"resamples": 0}, "resamples must be at least 1"),
        ([0.1, 0.2], {"level": 1.0}, "level must lie between 0 and 1"),
        ([0.1, 0.2], {"threshold": float("nan")}, "threshold must be finite"),
        ([0.1, 0.2], {"seed": -1}, "expected non-negative"),
        ([0.1, float("nan")], {}, "scores must be finite, got 1 NaN or Inf among 2"),
        ([0.1], {}, "one length"),
    ],
)
def test_rejects(scores, options, message):
    with pytest.raises(ValueError, match=message):
        intervals(scores, [0, 1], **options)


def test_rejects_one_class():
    with pytest.raises(ValueError, match=r"labels must hold both 0 and 1 and nothing else, got \[1\]"):
        intervals([0.1, 0.2], [1, 1])
