"""The training loader: which clips, in which order, resumed where it stopped, and failures that name their clip."""

import os
import subprocess
import sys
from collections import Counter
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from clip_caches import S, T, make_cache

from sdr import SDRError, TPAConfig
from sdr.clip_cache import ClipCache
from sdr.loading import BalancedBatches, LoaderConfig, TrainingLoader
from sdr.tpa import augment

BATCH = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ClipCache:
    return ClipCache(make_cache(tmp_path_factory.mktemp("loading") / "cache", real=3, fake=6, clips=3), split="train")


def loader(cache, *, tpa=None, seed=0, rank=0, world_size=1, num_views=4, batch_size=BATCH, **fields) -> TrainingLoader:
    key = {"num_views": num_views, "seed": seed, "rank": rank, "world_size": world_size, "batch_size": batch_size}
    return TrainingLoader(cache, LoaderConfig(**fields), tpa or TPAConfig(), **key)


def take(loader: TrainingLoader, count: int) -> list:
    with closing(iter(loader)) as batches:
        return list(islice(batches, count))


def same(first, second) -> bool:
    return all(
        torch.equal(a.views, b.views) and torch.equal(a.labels, b.labels) and a[2:] == b[2:]
        for a, b in zip(first, second, strict=True)
    )


# --- which clips -----------------------------------------------------------------------------------------------------


def batches(labels, videos=None, batch_size=8, **fields) -> BalancedBatches:
    labels = torch.tensor(labels)
    return BalancedBatches(
        labels, torch.arange(len(labels)) if videos is None else torch.tensor(videos), batch_size=batch_size, **fields
    )


def test_batches_are_balanced_and_cover_the_larger_class():
    labels = torch.tensor([0] * 5 + [1] * 20)
    order = batches(labels.tolist(), seed=3).epoch(1)
    assert len(order) == len(batches(labels.tolist())) == 5
    for batch in order:
        assert labels[batch].tolist() == [0] * 4 + [1] * 4
    counts = Counter(i for batch in order for i in batch.tolist())
    assert all(counts[i] == 1 for i in range(5, 25))
    assert all(counts[i] == 4 for i in range(5))
    assert np.array_equal(order, batches(labels.tolist(), seed=3).epoch(1))
    assert not np.array_equal(order, batches(labels.tolist(), seed=3).epoch(2))
    assert not np.array_equal(order, batches(labels.tolist(), seed=4).epoch(1))


def test_an_epoch_takes_so_many_different_clips_of_every_video():
    """Video 0 is real and has 7 clips; 1 to 4 are fake, with 3 clips each, and 5 with a single one."""
    videos = [0] * 7 + [v for v in (1, 2, 3, 4) for _ in range(3)] + [5]
    labels = [int(v > 0) for v in videos]
    order = batches(labels, videos, batch_size=6, clips_per_video=2)
    for epoch in range(4):
        fakes = [i for batch in order.epoch(epoch) for i in batch[3:].tolist()]
        assert len(set(fakes)) == len(fakes) == 9
        assert Counter(videos[i] for i in fakes) == {1: 2, 2: 2, 3: 2, 4: 2, 5: 1}
    drawn = {i for epoch in range(20) for batch in order.epoch(epoch) for i in batch.tolist()}
    assert drawn == set(range(20))  # every clip has its turn


def test_videos_in_any_order_of_their_clips():
    order = batches([1, 0, 1, 0, 1], [2, 0, 1, 0, 2], batch_size=2)
    for epoch in range(5):
        fakes = sorted(int(batch[1]) for batch in order.epoch(epoch))
        assert fakes in ([0, 2], [2, 4])


def test_processes_share_every_batch():
    whole = batches([0] * 5 + [1] * 13, seed=1)
    parts = [batches([0] * 5 + [1] * 13, seed=1, rank=r, world_size=4) for r in range(4)]
    assert {len(p) for p in parts} == {len(whole)} == {3}
    for batch, *shares in zip(whole.epoch(7), *(p.epoch(7) for p in parts), strict=True):
        assert {len(share) for share in shares} == {2}
        assert np.concatenate([s[:1] for s in shares] + [s[1:] for s in shares]).tolist() == batch.tolist()


def test_a_small_dataset_fills_its_only_batch():
    (batch,) = batches([0, 1, 1], batch_size=8).epoch(0)
    assert batch[:4].tolist() == [0] * 4
    assert sorted(batch[4:].tolist()) == [1, 1, 2, 2]


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1]], ids=str)
def test_batches_need_both_classes(labels):
    with pytest.raises(SDRError, match=r"needs both classes, got \d real and \d fake videos"):
        batches(labels)


def test_rejects_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match="batch_size must be a multiple of 6, got 8"):
        batches([0, 1], world_size=3)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1, got 2"):
        batches([0, 1], rank=2, world_size=2)


@pytest.mark.parametrize("fields", [{"readers": 0}, {"ahead": 0}, {"clips_per_video": 0}, {"augmentation": "kornia"}])
def test_rejects_wrong_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LoaderConfig(**fields)


# --- what comes ------------------------------------------------------------------------------------------------------


def test_views_are_tpas_of_the_clips_read(cache):
    for batch in take(loader(cache, seed=5), 4):
        assert batch.views.shape == (BATCH, 4, 3, T, S, S)
        assert batch.labels.tolist() == [0, 0, 1, 1]
        names = [cache.name(i) for i in range(len(cache))]
        indices = [names.index(name) for name in batch.names]
        assert cache.labels[indices].tolist() == batch.labels.tolist()
        clips = torch.stack([torch.from_numpy(cache.read(i)) for i in indices]).permute(0, 4, 1, 2, 3)
        key = {"seed": 5, "epoch": batch.epoch, "samples": cache.samples[indices].tolist(), "num_views": 4}
        assert torch.equal(batch.views, augment(clips, TPAConfig(), **key))


def test_epochs_follow_each_other(cache):
    loader_ = loader(cache)
    assert len(loader_) == 3
    assert [(b.epoch, b.index) for b in take(loader_, 7)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


@pytest.mark.promise(row="augmentation")
@pytest.mark.parametrize("fields", [{"readers": 1, "ahead": 1}, {"readers": 3, "ahead": 5}], ids=str)
def test_reading_ahead_changes_nothing(cache, fields):
    assert same(take(loader(cache), 5), take(loader(cache, **fields), 5))


@pytest.mark.promise(row="augmentation")
@pytest.mark.parametrize("batch_size", [2, 6, 12])
@pytest.mark.parametrize("readers", [1, 2])
def test_views_are_of_the_clip_whatever_the_batch(cache, batch_size, readers):
    """Of the larger class, whose clips stand once in an epoch: which they are does not depend on the batch size."""

    def fakes(**fields) -> dict:
        found = {}
        for batch in take(loader(cache, **fields), 2 * (12 // fields["batch_size"])):
            for name, label, views in zip(batch.names, batch.labels.tolist(), batch.views, strict=True):
                if label:
                    found[batch.epoch, name] = views
        return found

    found, expected = fakes(batch_size=batch_size, readers=readers), fakes(batch_size=4)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 6
    for key, views in found.items():
        assert torch.equal(views, expected[key]), key


@pytest.mark.promise(row="augmentation")
def test_a_selection_keeps_the_draws(tmp_path):
    """The key of a clip's augmentation is its place in the manifest, not in what was selected of it."""
    folder = make_cache(tmp_path / "cache", splits=("train", "val"))
    whole, val = ClipCache(folder), ClipCache(folder, split="val")
    assert val.samples.tolist() == list(range(8, 16))
    assert [whole.name(i) for i in val.samples.tolist()] == [val.name(i) for i in range(8)]
    assert whole.splits == val.splits == {"train", "val"}


@pytest.mark.parametrize("method", ["color_jitter", "cutout", "flip", "crop"])
@pytest.mark.parametrize("per_frame", [False, True], ids=["per clip", "per frame"])
def test_dali_gives_the_same_views(cache, method, per_frame):
    tpa = TPAConfig(methods=(method,), per_frame=frozenset({method} if per_frame else ()))
    reference = take(loader(cache, tpa=tpa, num_views=1), 4)
    for ours, theirs in zip(take(loader(cache, tpa=tpa, num_views=1, augmentation="dali"), 4), reference, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert ours[2:] == theirs[2:]
        assert ours.views.shape == theirs.views.shape
        assert (ours.views - theirs.views).abs().mean() <= 1.5 / 255 / 0.229


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.promise(row="augmentation")
@pytest.mark.parametrize("augmentation", ["reference", "dali"])
def test_resumes_at_the_next_batch(cache, augmentation):
    whole = take(loader(cache, augmentation=augmentation), 8)
    for given in (1, 2, 3, 5):
        first = loader(cache, augmentation=augmentation)
        assert same(take(first, given), whole[:given])
        second = loader(cache, augmentation=augmentation)
        second.load_state_dict(first.state_dict())
        assert same(take(second, 8 - given), whole[given:])


def test_a_loader_goes_on_where_its_last_loop_ended(cache):
    one = loader(cache)
    assert same(take(one, 2) + take(one, 3), take(loader(cache), 5))


@pytest.mark.promise(row="augmentation")
def test_a_resumed_run_may_have_other_processes(cache):
    first = loader(cache)
    take(first, 2)
    resumed = loader(cache, rank=1, world_size=2)
    resumed.load_state_dict(first.state_dict())
    (batch,), (whole,) = take(resumed, 1), take(first, 1)
    assert batch.names == (whole.names[1], whole.names[3])


@pytest.mark.promise(row="augmentation")
def test_state_is_the_same_in_another_process(cache):
    """A set's order differs from process to process."""
    code = """
import json, sys
from sdr import TPAConfig
from sdr.clip_cache import ClipCache
from sdr.loading import LoaderConfig, TrainingLoader
tpa = TPAConfig(per_frame=frozenset(["flip", "crop", "cutout", "color_jitter"]))
loader = TrainingLoader(ClipCache(sys.argv[1], split="train"), LoaderConfig(), tpa, batch_size=4, num_views=4)
print(json.dumps(loader.state_dict()))
"""
    states = {
        subprocess.run(
            [sys.executable, "-c", code, str(cache.folder)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(states) == 1


@pytest.mark.promise(row="state")
@pytest.mark.parametrize("place", [{"index": 3}, {"index": -1}, {"epoch": -1}], ids=str)
def test_rejects_a_place_that_is_none(cache, place):
    with pytest.raises(SDRError, match="there is no batch"):
        loader(cache).load_state_dict(loader(cache).state_dict() | place)


@pytest.mark.promise(row="state")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1}, "cannot go on where it was: seed was 0, now it is 1"),
        ({"batch_size": 2}, "batch_size was 4"),
        ({"clips_per_video": 2}, "clips_per_video was 1"),
        ({"num_views": 3}, "num_views was 4"),
        ({"augmentation": "dali"}, "augmentation was reference"),
        ({"tpa": TPAConfig(hue=0.2)}, "tpa was {"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects_a_state_of_other_settings(cache, fields, message):
    with pytest.raises(SDRError, match=message):
        loader(cache, **fields).load_state_dict(loader(cache).state_dict())


@pytest.mark.promise(row="state")
def test_rejects_a_state_of_other_clips(cache, tmp_path):
    other = ClipCache(make_cache(tmp_path / "other", real=3, fake=6, clips=3, seed=1), split="train")
    with pytest.raises(SDRError, match="cache was "):
        loader(other).load_state_dict(loader(cache).state_dict())


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.promise(row="no substitution")
@pytest.mark.parametrize("augmentation", ["reference", "dali"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "another"])
def test_a_clip_that_cannot_be_read_is_named_after_the_batches_before_it(tmp_path, damage, augmentation):
    folder = make_cache(tmp_path / "cache", real=6, fake=6)
    cache = ClipCache(folder)
    names = [batch.names for batch in take(loader(cache), 3)]
    victim = folder / "shards" / names[2][1].split()[0].replace(".mp4", ".tar")
    if damage == "missing":
        victim.unlink()
    elif damage == "cut off":
        os.truncate(victim, 1024)
    else:
        victim.write_bytes(bytes(20000))
    broken, seen = loader(cache, augmentation=augmentation), []
    with pytest.raises(SDRError, match=f"{victim.name}: .*{names[2][1]}"), closing(iter(broken)) as batches:
        seen += (batch.names for batch in islice(batches, 9))
    assert seen == names[:2]
    assert (broken.epoch, broken.index) == (0, 2)  # the batch that never came


def test_a_failure_of_dali_names_the_clips(cache, monkeypatch):
    def failing(batches, *arguments, **options):
        next(iter(batches))
        raise SDRError("DALI", "bad operator")
        yield

    monkeypatch.setattr("sdr.loading.dali_views", failing)
    names = take(loader(cache), 1)[0].names
    with pytest.raises(SDRError, match=r"DALI: bad operator \(in the batch of ") as error:
        take(loader(cache, augmentation="dali"), 1)
    assert all(name in str(error.value) for name in names)


@pytest.mark.promise(row="soak")
def test_memory_threads_and_descriptors_do_not_grow_over_20_epochs(tmp_path):
    folder = make_cache(tmp_path / "cache", real=8, fake=8, clips=2, size=64)  # 98 kB a clip
    code = f"""
import ctypes, gc, os, sys, threading
from contextlib import closing
from itertools import islice
from sdr import TPAConfig
from sdr.clip_cache import ClipCache
from sdr.loading import LoaderConfig, TrainingLoader

def usage():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept for later is no leak
    pages = int(open("/proc/self/statm").read().split()[1])
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGE_SIZE")

loader = TrainingLoader(ClipCache({str(folder)!r}), LoaderConfig(augmentation=sys.argv[1]), TPAConfig(),
                        batch_size=4, num_views=4)
before = usage()
with closing(iter(loader)) as batches:
    for number, batch in enumerate(islice(batches, 25 * len(loader)), 1):
        if number == 5 * len(loader):
            warm = usage()
    last = usage()
print(*(b - a for a, b in zip(warm, last)), usage()[1] - before[1], loader.epoch)
"""
    # a leak of clips would be 31 MB, one of views 500; DALI's own pools sway by 20 MB without a trend
    for augmentation, limit in (("reference", 4), ("dali", 64)):
        done = subprocess.run([sys.executable, "-c", code, augmentation], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        descriptors, threads, memory, left, epoch = map(int, done.stdout.split())
        assert (descriptors, threads, epoch) == (0, 0, 25)
        assert left <= 2  # threads of torch's own pool
        assert memory < limit * 2**20
