"""Clips to scores, videos and groups of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from clip_caches import S, T, make_cache

from sdr import FTCN, SDRError
from sdr.clip_cache import ClipCache
from sdr.config import tiny
from sdr.evaluate import (
    ScoredVideos,
    clip_scores,
    dataset_name,
    evaluate_groups,
    intervals,
    score_videos,
    video_metrics,
    video_scores,
)
from sdr.model import SDRModel

CONFIG = replace(tiny(), num_frames=T, image_size=S)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ClipCache:
    """7 videos of 3 clips each."""
    return ClipCache(make_cache(tmp_path_factory.mktemp("scores") / "somewhere", real=3, fake=4, clips=3))


def brightness(clips: torch.Tensor) -> torch.Tensor:
    """A model of a clip's mean, [B, 3, T, S, S] to logits of about -3..3."""
    return (clips.double().mean((1, 2, 3, 4)) - 130) / 10


def loop(cache: ClipCache, indices) -> np.ndarray:
    """The same clip by clip, in NumPy."""
    return np.array([1 / (1 + math.exp(-(cache.read(i).astype(np.float64).mean() - 130) / 10)) for i in indices])


@pytest.mark.parametrize("batch_size", [1, 4, 21, 100])
def test_clip_scores_are_those_of_a_loop_whatever_the_batch(cache, batch_size):
    done = []
    found = clip_scores(
        brightness, cache, batch_size=batch_size, device="cpu", progress=lambda *counts: done.append(counts)
    )
    assert found.dtype == torch.float64
    assert np.allclose(found.numpy(), loop(cache, range(21)), rtol=0, atol=1e-12)
    assert done == [(min(n + batch_size, 21), 21) for n in range(0, 21, batch_size)]


@pytest.mark.parametrize("indices", [[5, 2, 2, 20], torch.tensor([5, 2, 2, 20]), np.array([5, 2, 2, 20]), range(4)])
def test_clip_scores_of_some_come_in_their_order(cache, indices):
    found = clip_scores(brightness, cache, indices, batch_size=3, device="cpu")
    assert np.allclose(found.numpy(), loop(cache, [int(i) for i in indices]), rtol=0, atol=1e-12)


def test_clip_scores_of_none(cache):
    assert clip_scores(brightness, cache, [], batch_size=3, device="cpu").shape == (0,)


def test_the_model_is_given_uint8_clips_and_no_gradient(cache):
    seen = []

    def forward(clips):
        seen.append((clips.dtype, tuple(clips.shape), torch.is_grad_enabled()))
        return brightness(clips)

    clip_scores(forward, cache, [0, 1, 2], batch_size=2, device="cpu")
    assert seen == [(torch.uint8, (2, 3, T, S, S), False), (torch.uint8, (1, 3, T, S, S), False)]


def test_clear_scores_stay_apart(cache):
    """A float32 sigmoid makes both 1.0, and two videos a tie that the model did not see."""
    found = clip_scores(lambda clips: torch.tensor([20.0, 21.0]), cache, [0, 1], batch_size=2, device="cpu")
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-20)), 1 / (1 + math.exp(-21))], rel=0, abs=1e-16)
    assert found[0] < found[1] < 1


def test_one_batch_is_read_ahead_and_no_more(cache, monkeypatch):
    read, counts = [], []
    monkeypatch.setattr(ClipCache, "read", lambda self, i: read.append(i) or np.zeros((T, S, S, 3), np.uint8))

    def forward(clips):
        counts.append(len(read))
        return brightness(clips)

    clip_scores(forward, cache, batch_size=3, device="cpu")
    assert read == list(range(21))
    assert all(done <= 3 * (n + 2) for n, done in enumerate(counts))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.promise(row="memory")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "CPU"])
def test_out_of_memory_halves_the_batch(cache, error):
    sizes = []

    def forward(clips):
        sizes.append(len(clips))
        if len(clips) > 3:
            raise error
        return brightness(clips)

    found = clip_scores(forward, cache, range(10), batch_size=10, device="cpu")
    assert np.allclose(found.numpy(), loop(cache, range(10)), rtol=0, atol=1e-12)
    assert sizes == [10, 5, 2, 3, 5, 2, 3]


@pytest.mark.promise(row="memory")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "CPU"])
def test_a_clip_that_does_not_fit_is_one_line(cache, error):
    def forward(clips):
        raise error

    with pytest.raises(SDRError, match="memory: one clip does not fit into the memory of cpu"):
        clip_scores(forward, cache, batch_size=4, device="cpu")


def test_other_errors_of_the_model_pass(cache):
    def forward(clips):
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        clip_scores(forward, cache, batch_size=4, device="cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_refused_with_the_clips_name(cache, bad):
    def forward(clips):
        return torch.tensor([0.0, bad, bad])

    name = r"weights: the model gives no finite score for train/001\.mp4 clip 1"
    with pytest.raises(SDRError, match=name):
        clip_scores(forward, cache, [3, 4, 5], batch_size=3, device="cpu")


@pytest.mark.promise(row="no substitution")
def test_a_damaged_clip_is_named(tmp_path):
    folder = make_cache(tmp_path / "cache")
    (folder / "shards/train/002.tar").write_bytes(b"cut off")
    with pytest.raises(SDRError, match=r"002\.tar: does not hold train/002\.mp4 clip 0"):
        clip_scores(brightness, ClipCache(folder), batch_size=2, device="cpu")


def test_rejects_a_batch_of_nothing(cache):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        clip_scores(brightness, cache, batch_size=0, device="cpu")


def test_a_videos_score_is_the_mean_of_its_clips(cache):
    scores = torch.linspace(0, 1, 21, dtype=torch.float64) ** 2
    expected = [np.mean([scores[i].item() for i in range(21) if cache.videos[i] == v]) for v in range(7)]
    assert np.allclose(video_scores(scores, cache), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", [SDRModel, FTCN])
def test_score_videos_runs_the_model_on_every_clip(cache, kind):
    model = kind(CONFIG if kind is SDRModel else CONFIG.branch()).eval()
    found = score_videos(model, cache, batch_size=5)
    with torch.inference_mode():
        clips = torch.from_numpy(np.stack([cache.read(i) for i in range(21)])).permute(0, 4, 1, 2, 3)
        expected = model(clips).logits.double().sigmoid().reshape(7, 3).mean(1)
    assert np.allclose(found.scores, expected.numpy(), rtol=0, atol=1e-6)
    assert len(set(found.scores.tolist())) == 7
    assert found.dataset == "somewhere"
    assert found.videos == tuple(f"train/{n:03d}.mp4" for n in range(7))
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found.methods == ("real",) * 3 + ("Flicker",) * 4
    assert score_videos(model, cache, dataset="other").dataset == "other"


def test_the_dataset_is_the_layout_or_for_a_table_the_folder(cache):
    assert dataset_name(cache) == "somewhere"
    other = ClipCache(cache.folder)
    other.settings["layout"] = "celebdf"
    assert dataset_name(other) == "celebdf"


def test_score_videos_refuses_training_and_clips_of_another_size(cache):
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        score_videos(SDRModel(CONFIG), cache)
    with pytest.raises(SDRError, match=rf"holds clips of {T} x {S} x {S} .*sdr prepare --num_frames 4 --size 16"):
        score_videos(SDRModel(replace(CONFIG, num_frames=4)).eval(), cache)


def two_methods() -> ScoredVideos:
    rng = np.random.default_rng(3)
    labels = np.array([0] * 9 + [1] * 14)
    methods = ("real",) * 9 + ("Swap", "Puppet") * 7
    return ScoredVideos("set", tuple(map(str, range(23))), rng.random(23) * 0.7 + labels * 0.2, labels, methods)


def test_groups_are_all_videos_then_each_method_against_all_real_ones():
    videos = two_methods()
    groups = evaluate_groups(videos, validation_threshold=0.4, resamples=50, seed=2)
    assert [group[:4] for group in groups] == [("set", "all", 9, 14), ("set", "Puppet", 9, 7), ("set", "Swap", 9, 7)]
    for group, keep in zip(groups, (("Swap", "Puppet"), ("Puppet",), ("Swap",)), strict=True):
        rows = [i for i, method in enumerate(videos.methods) if method in ("real", *keep)]
        scores, labels = videos.scores[rows], videos.labels[rows]
        at_half, at_other = (video_metrics(scores, labels, threshold=t) for t in (0.5, 0.4))
        assert group.metrics == at_half | {"video accuracy at the validation threshold": at_other["video accuracy"]}
        bounds, other = (intervals(scores, labels, threshold=t, resamples=50, seed=2) for t in (0.5, 0.4))
        assert group.intervals == bounds | {"video accuracy at the validation threshold": other["video accuracy"]}
        assert list(group.metrics) == list(group.intervals)


def test_groups_without_a_validation_threshold_have_one_accuracy():
    for group in evaluate_groups(two_methods(), resamples=5):
        assert list(group.metrics) == ["video AUC", "video accuracy", "video EER", "video AP"]


@pytest.mark.parametrize(("label", "kind"), [(0, "real"), (1, "fake")])
def test_groups_need_both_classes(label, kind):
    with pytest.raises(SDRError, match=f"^set: has only {kind} videos .an evaluation needs real and fake ones.$"):
        evaluate_groups(two_methods()._replace(labels=np.full(23, label)))


def test_groups_refuse_scores_that_are_not_finite():
    videos = two_methods()
    videos.scores[[4, 7]] = np.nan
    with pytest.raises(ValueError, match="scores must be finite, got 2 NaN or Inf among 23"):
        evaluate_groups(videos)
