"""The shortcut's cue: where it is, that single pixels say nothing of it, and which networks can see it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_caches import make_cache
from torch import nn

from sdr import FTCN, SDRError, tiny
from sdr.cache_check import check_cache
from sdr.clip_cache import MANIFEST, SETTINGS, ClipCache, read_manifest
from sdr.shortcut import ARRANGEMENTS, Cue, has_cue, marginal_gap, write_marked

pytest.importorskip("pyarrow")
LEARNED = {"train": "aligned", "val": "aligned"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    splits = ("train", "val", "test")
    return make_cache(tmp_path_factory.mktemp("shortcut") / "clips", real=2, fake=2, clips=2, splits=splits)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_stripes():
    cue = Cue(strength=5, period=4)
    stripes = cue.stripes(8, cue=True)
    assert stripes.tolist() == [[level] * 8 for level in (5, 5, -5, -5) * 2]
    assert np.array_equal(cue.stripes(8, cue=False), stripes.T)
    assert Cue().stripes(4, cue=True)[:, 0].tolist() == [8, -8, 8, -8]


def test_mark_adds_the_stripes_to_every_frame_and_colour():
    clip = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    before = clip.copy()
    for present in (True, False):
        marked = Cue(strength=20).mark(clip, cue=present)
        for t, y, x, c in np.ndindex(clip.shape):
            line = y if present else x
            level = int(clip[t, y, x, c]) + (20 if line % 2 == 0 else -20)
            assert marked[t, y, x, c] == min(max(level, 0), 255)
    assert np.array_equal(clip, before)


def test_a_still_clip_stays_one():
    clip = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8), 5, axis=0)
    for present in (True, False):
        marked = Cue().mark(clip, cue=present)
        assert (marked == marked[:1]).all()


def test_who_carries_the_cue():
    carried = {a: [has_cue(label, a) for label in (0, 1)] for a in ARRANGEMENTS}
    assert carried == {"aligned": [False, True], "reversed": [True, False], "absent": [False, False]}


@pytest.mark.parametrize("test", ARRANGEMENTS)
def test_marked_cache_is_the_source_with_stripes(source, tmp_path, test):
    before, cue = content(source), Cue(strength=12)
    out = tmp_path / "out"
    assert write_marked(source, out, cue, LEARNED | {"test": test}) == 24
    assert content(source) == before
    assert check_cache(out).problems == ()
    plain, marked = ClipCache(source), ClipCache(out)
    assert [r.path for r in marked.records] == [r.path for r in plain.records]
    assert torch.equal(marked.labels, plain.labels)
    for i in range(len(plain)):
        record = plain.records[plain.videos[i]]
        fake_has_it = test if record.split == "test" else "aligned"
        present = {"aligned": record.label == 1, "reversed": record.label == 0, "absent": False}[fake_has_it]
        rows = np.array([12, -12] * 8)
        pattern = rows[:, None, None] if present else rows[None, :, None]
        assert np.array_equal(marked.read(i), (plain.read(i) + pattern).clip(0, 255))
    kept = json.loads((out / SETTINGS).read_text())["cue"]
    assert (kept["strength"], kept["arrangements"]) == (12, LEARNED | {"test": test})
    assert {json.loads(text)["cue"]["strength"] for text in read_manifest(out)["settings"]} == {12}


def test_only_the_named_splits_are_copied(source, tmp_path):
    assert write_marked(source, tmp_path / "out", Cue(), {"test": "reversed"}) == 8
    assert ClipCache(tmp_path / "out").splits == {"test"}


def test_written_once_and_finished_after_a_kill(source, tmp_path):
    out = tmp_path / "out"
    write_marked(source, out, Cue(), {"val": "aligned"})
    whole = content(out)
    inode = (out / MANIFEST).stat().st_ino
    assert write_marked(source, out, Cue(), {"val": "aligned"}) == 8
    assert (out / MANIFEST).stat().st_ino == inode
    (out / MANIFEST).unlink()
    next((out / "shards").rglob("*.tar")).unlink()
    write_marked(source, out, Cue(), {"val": "aligned"})
    assert content(out) == whole


def test_refusals(source, tmp_path):
    write_marked(source, tmp_path / "out", Cue(), {"val": "aligned"})
    with pytest.raises(SDRError, match="was written with other settings: cue was"):
        write_marked(source, tmp_path / "out", Cue(strength=9), {"val": "aligned"})
    with pytest.raises(SDRError, match="is not empty and was not written by the shortcut study"):
        write_marked(source, tmp_path, Cue(), {"val": "aligned"})
    with pytest.raises(ValueError, match="arrangements must be one of aligned, reversed, absent, got 'sideways'"):
        write_marked(source, tmp_path / "new", Cue(), {"val": "sideways"})
    with pytest.raises(SDRError, match="has no clip of the split dev"):
        write_marked(source, tmp_path / "new", Cue(), {"val": "aligned", "dev": "aligned"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0}, r"strength must be a whole number in 1\.\.127, got 0"),
        ({"strength": 2.0}, "strength must be a whole number"),
        ({"period": 3}, "period must be even, got 3"),
    ],
)
def test_rejects_wrong_cue(fields, message):
    with pytest.raises(ValueError, match=message):
        Cue(**fields)


class Clips:
    """What ``marginal_gap`` needs of a cache."""

    def __init__(self, *clips: np.ndarray) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int) -> np.ndarray:
        return self.clips[index]


def test_marginal_gap_in_closed_form():
    """Rows of 100 and 120 in turns: horizontal stripes make all 110, upright ones 90, 110, 110, 130."""
    rows = np.tile(np.array([100, 120], np.uint8)[:, None, None], (4, 8, 3))
    assert marginal_gap(Clips(rows[None]), Cue(strength=10)) == pytest.approx(0.5)
    flat = np.full((2, 8, 8, 3), 50, np.uint8)
    assert marginal_gap(Clips(flat, flat), Cue()) == 0
    assert marginal_gap(Clips(flat, rows[None]), Cue(strength=10)) == pytest.approx(0.5 / 3)  # one frame of three


def test_single_pixels_of_faces_say_nothing():
    """With stripes and with upright ones half of the pixels differ by chance, and nothing more."""
    from skimage.data import lfw_subset

    faces = (255 * lfw_subset()[:100]).astype(np.uint8)  # [100, 25, 25]
    clips = [np.repeat(face[None, :24, :24, None], 3, axis=-1) for face in faces]
    shares = np.bincount(faces.ravel(), minlength=256) / faces.size
    chance = np.sqrt(2 / np.pi) * np.sqrt(shares / np.stack(clips)[..., 0].size).sum() / 2  # E|N(0, s)| over 256 values
    halves = [np.bincount(part.ravel(), minlength=256) / part.size for part in np.split(faces, 2)]
    between_people = np.abs(np.subtract(*halves)).sum() / 2
    assert marginal_gap(Clips(*clips), Cue(strength=4)) < 1.5 * chance < between_people / 2


def randomise(model: nn.Module) -> nn.Module:
    """No dead part, gammas of both signs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.weight, 0.5, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def scores(spatial_kernel: int, *clips: np.ndarray) -> list[float]:
    config = replace(tiny().branch(), num_frames=4, image_size=16, spatial_kernel=spatial_kernel)
    torch.manual_seed(1)
    model = randomise(FTCN(config))
    with torch.no_grad():
        return [model(torch.from_numpy(clip.copy()).permute(3, 0, 1, 2)[None]).logits.item() for clip in clips]


def test_ftcn_scores_a_clip_as_its_transpose():
    clip = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    one, other = scores(1, clip, clip.transpose(0, 2, 1, 3))
    assert one == pytest.approx(other, abs=1e-5)
    one, other = scores(3, clip, clip.transpose(0, 2, 1, 3))
    assert abs(one - other) > 1e-3


def test_only_the_face_below_lets_pools_see_the_stripes():
    """On squares of 2x2 equal pixels the first pool takes the cue away; 3x3 kernels see it at once."""
    rng = np.random.default_rng(0)
    squares = rng.integers(60, 200, (4, 8, 8, 3), dtype=np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    marked = [Cue(strength=20).mark(squares, cue=present) for present in (True, False)]
    one, other = scores(1, *marked)
    assert one == pytest.approx(other, abs=1e-5)
    one, other = scores(3, *marked)
    assert abs(one - other) > 1e-3
