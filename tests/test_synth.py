"""Synthetic videos: layout, splits, bytes, and that one frame of a fake is distributed like one of a real video."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from sdr import portraits, synth
from sdr.datasets import SYNTH_METHODS
from sdr.errors import SDRError
from sdr.synth import VARYING, Perturbation, draw_perturbation, synthesize

SMALL = {"identities": 8, "frames": 4, "size": 96}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "videos"
    synthesize(out, **SMALL)
    return out


def read_csv(folder: Path) -> list[dict]:
    with open(folder / "videos.csv", newline="") as file:
        return list(csv.DictReader(file))


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def videos(folder: Path) -> list[str]:
    """Names of the videos, masks left out."""
    return [n for n in all_files(folder) if n.endswith(".mp4") and "/masks/" not in n]


def decode(data: bytes, form: str = "rgb24") -> np.ndarray:
    """[T, H, W, 3] uint8, or [T, H, W] grey"""
    import av

    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format=form) for frame in container.decode(video=0)])


def ks_distance(sample: np.ndarray, cdf) -> float:
    """Kolmogorov-Smirnov distance of a sample from a distribution function."""
    x = np.sort(sample)
    n = len(x)
    F = cdf(x)
    return float(max((np.arange(1, n + 1) / n - F).max(), (F - np.arange(n) / n).max()))


# --- files ---


def test_layout_is_faceforensics(written):
    pairs = [
        pair
        for split in ("train", "val", "test")
        for pair in json.loads((written / f"splits/{split}.json").read_text())
    ]
    ids = [i for pair in pairs for i in pair]
    assert sorted(ids) == [f"{i:03d}" for i in range(10)]  # carphone gives three of the ten
    names = {f"original_sequences/youtube/c{c}/videos/{i}.mp4" for c in (23, 40) for i in ids}
    for a, b in pairs:
        for name in (f"{a}_{b}", f"{b}_{a}"):
            names |= {f"manipulated_sequences/{m}/c{c}/videos/{name}.mp4" for m in SYNTH_METHODS for c in (23, 40)}
        names |= {
            f"manipulated_sequences/{m}/masks/videos/{i}_{j}.mp4" for m in SYNTH_METHODS for i, j in ((a, b), (b, a))
        }
    assert {n for n in all_files(written) if n.endswith(".mp4")} == names
    assert {p.name for p in written.iterdir()} == {
        "original_sequences", "manipulated_sequences", "splits", "videos.csv", "synth.json",
    }  # fmt: skip


def test_no_identity_is_in_two_splits_or_swapped_with_itself(written):
    rows = read_csv(written)
    homes: dict[str, set] = {}
    for row in rows:
        homes.setdefault(row["identity"], set()).add(row["split"])
    assert len(homes) == SMALL["identities"]
    assert all(len(splits) == 1 for splits in homes.values())
    assert {split for splits in homes.values() for split in splits} == {"train", "val", "test"}
    face = {Path(row["path"]).stem: row["identity"] for row in rows if row["label"] == "0"}
    for row in rows:
        if row["label"] == "1":
            a, b = Path(row["path"]).stem.split("_")
            assert face[a] == row["identity"] != face[b]


def test_csv_lists_every_video_once(written):
    rows = read_csv(written)
    assert sorted(row["path"] for row in rows) == sorted(videos(written))
    for row in rows:
        fake = row["path"].startswith("manipulated_sequences/")
        assert row["label"] == str(int(fake))
        assert row["method"] == (row["path"].split("/")[1] if fake else "real")
    pairs = {s: json.loads((written / f"splits/{s}.json").read_text()) for s in ("train", "val", "test")}
    for row in rows:
        assert Path(row["path"]).stem.split("_")[0] in [i for pair in pairs[row["split"]] for i in pair]


def test_summary_and_progress_count_files(tmp_path):
    calls = []
    summary = synthesize(
        tmp_path / "v", **SMALL | {"frames": 1}, crf=(30,), methods=("GainFlicker",),
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert (summary.real, summary.fake) == (10, 10)
    assert [len(summary.splits[s]) for s in ("train", "val", "test")] == [6, 2, 2]
    assert calls == [(2 * i, 20) for i in range(1, 11)]
    assert len(videos(tmp_path / "v")) == 20


def test_videos_are_what_was_asked_for(written):
    import av

    for path in (
        "original_sequences/youtube/c40/videos/009.mp4",
        "manipulated_sequences/FullJitter/c23/videos/009_008.mp4",
    ):
        with av.open(str(written / path)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, stream.average_rate) == (96, 96, 25)
            assert stream.codec_context.name == "h264"
            assert sum(1 for _ in container.decode(stream)) == 4


def test_same_seed_same_bytes_another_seed_others(written, tmp_path):
    synthesize(tmp_path / "again", **SMALL, workers=1)
    assert all_files(tmp_path / "again") == all_files(written)
    synthesize(tmp_path / "other", **SMALL, seed=1)
    ours, other = all_files(written), all_files(tmp_path / "other")
    assert all(ours[n] != other[n] for n in set(ours) & set(other) if n.endswith("_008.mp4"))


def test_methods_left_out_change_no_other_file(written, tmp_path):
    synthesize(tmp_path / "v", **SMALL, methods=("FullJitter",), crf=(40,))
    name = "manipulated_sequences/FullJitter/c40/videos/000_003.mp4"
    assert (tmp_path / "v" / name).read_bytes() == (written / name).read_bytes()


def test_written_again_into_its_own_folder(written):
    before = all_files(written)
    victim = written / "original_sequences/youtube/c23/videos/004.mp4"
    victim.write_bytes(b"half a video")
    synthesize(written, **SMALL)
    assert all_files(written) == before


def test_rejects_foreign_folder(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(SDRError, match="not empty and was not written by"):
        synthesize(tmp_path, **SMALL)
    assert all_files(tmp_path) == {"holiday.mp4": b"mine"}


def test_rejects_folder_of_other_settings(written):
    with pytest.raises(SDRError, match="other settings"):
        synthesize(written, **SMALL, seed=7)


def test_rejects_file_as_folder(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(SDRError, match="out: cannot be made"):
        synthesize(tmp_path / "out", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": 9}, "identities must be even"),
        ({"identities": 6}, "identities must be even and in 8"),
        ({"identities": 1000}, "got 1000"),
        ({"frames": 0}, "frames must be in 1..120, got 0"),
        ({"frames": 121}, "frames must be in"),
        ({"size": 97}, "size must be even"),
        ({"fps": 0}, "fps must be in 1..120, got 0"),
        ({"crf": ()}, "crf must be"),
        ({"crf": (23, 23)}, "crf must be different"),
        ({"crf": (52,)}, "crf must be"),
        ({"methods": ("Deepfakes",)}, "methods must be"),
        ({"layout": "kodf"}, "layout must be one of ffpp, celebdf, dfdc, deepfakebench, got 'kodf'"),
        ({"layout": "dfdc", "crf": (23, 40)}, "crf must be one value, dfdc has no folders of compression"),
        ({"layout": "deepfakebench", "crf": ()}, "crf must be different values"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
    ids=str,
)
def test_rejects_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "v", **SMALL | change)
    assert not (tmp_path / "v").exists()


def within(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Where some pixel no further than that, across or down, is not 0; [T, H, W] bool."""
    steps = range(-pixels, pixels + 1)
    return np.any([np.roll(mask, (y, x), (1, 2)) for y in steps for x in steps], axis=0)


def test_masks_are_where_a_forgery_differs(tmp_path):
    """With crf 0 the luma is coded without loss: away from its mask a fake is its real video, but for rounding."""
    settings = SMALL | {"frames": 6, "fps": 2}  # in 3 seconds a head moves
    synthesize(tmp_path, **settings, methods=("FullJitter",), crf=(0,))
    moved = 0
    for name in (n for n in videos(tmp_path) if n.startswith("manipulated")):
        real = f"original_sequences/youtube/c0/videos/{Path(name).stem.split('_')[0]}.mp4"
        mask = decode((tmp_path / name.replace("/c0/", "/masks/")).read_bytes(), "gray")
        luma = [decode((tmp_path / n).read_bytes(), "gray").astype(int) for n in (real, name)]
        change = np.abs(luma[0] - luma[1])
        assert mask.shape == change.shape == (6, 96, 96)
        near = within(mask, 3)  # a cubic filter rings, and the codec drops what is faint
        assert change[~near].max() <= 1
        assert change[mask > 250].mean() > 2
        assert 0.02 < (mask > 250).mean() < near.mean() < 0.5
        moved += change[1:][:, ~near[0]].max() > 1
    assert moved > 3  # a mask that stood still would not do


def test_masks_are_one_file_for_all_compressions(written):
    masks = [n for n in all_files(written) if "/masks/" in n]
    assert len(masks) == 10 * len(SYNTH_METHODS)
    assert len({all_files(written)[n] for n in masks}) == 10


# --- other layouts ---


@pytest.fixture(scope="module", params=["celebdf", "dfdc", "deepfakebench"])
def other(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / request.param
    synthesize(out, layout=request.param, **SMALL)
    return out


def test_every_layout_holds_the_same_videos(written, other):
    faceforensics = read_csv(written)
    contents = {(written / r["path"]).read_bytes() for r in faceforensics if "/c23/" in r["path"]}
    rows = read_csv(other)
    assert len(rows) == len(contents) == 50
    if other.name == "deepfakebench":
        from PIL import Image

        row = next(r for r in rows if r["path"].endswith("/008_009") and r["method"] == "GainFlicker")
        names = sorted(p.name for p in (other / row["path"]).iterdir())
        assert names == ["000.png", "001.png", "002.png", "003.png"]
        frames = np.stack([np.asarray(Image.open(other / row["path"] / name)) for name in names]).astype(float)
        coded = decode((written / "manipulated_sequences/GainFlicker/c23/videos/008_009.mp4").read_bytes())
        noise = ((frames - coded) ** 2).mean()
        assert 0.1 < noise < 60  # another video's differs by thousands
    else:
        assert {(other / row["path"]).read_bytes() for row in rows} == contents
    expected = sorted((r["identity"], r["label"]) for r in faceforensics if "/c23/" in r["path"])
    assert sorted((row["identity"], row["label"]) for row in rows) == expected


def test_same_settings_same_bytes_in_every_layout(other, tmp_path):
    synthesize(tmp_path / "again", layout=other.name, **SMALL, workers=1)
    assert all_files(tmp_path / "again") == all_files(other)
    with pytest.raises(SDRError, match="other settings"):
        synthesize(other, layout="ffpp", **SMALL)


def test_celebdf_names_and_list(tmp_path):
    summary = synthesize(tmp_path, layout="celebdf", **SMALL, methods=("BlendFlicker", "ShiftJitter"))
    assert (summary.real, summary.fake) == (10, 20)
    assert [len(summary.splits[s]) for s in ("train", "val", "test")] == [8, 0, 2]
    rows = read_csv(tmp_path)
    names = {row["path"]: row for row in rows}
    folders = {path.split("/")[0] for path in names}
    assert folders == {"Celeb-real", "YouTube-real", "Celeb-synthesis"}
    assert {p.name for p in tmp_path.iterdir()} == folders | {"List_of_testing_videos.txt", "videos.csv", "synth.json"}
    persons = {}
    for path, row in names.items():
        if not path.startswith("YouTube-real/"):
            assert re.fullmatch(r"Celeb-real/id\d+_\d{4}\.mp4|Celeb-synthesis/id\d+_id\d+_\d{4}\.mp4", path)
            persons.setdefault(Path(path).stem.split("_")[0], set()).add(row["identity"])
    assert all(len(identities) == 1 for identities in persons.values())
    takes = {p: sorted(n[-8:-4] for n in names if n.startswith(f"Celeb-real/{p}_")) for p in persons}
    assert takes["id0"] == ["0000", "0004", "0008"]  # carphone's; each take has room for four forgeries
    assert {n[-8:-4] for n in names if n.startswith("Celeb-synthesis/id0_")} == {
        "0000",
        "0002",
        "0004",
        "0006",
        "0008",
        "0010",
    }
    lines = (tmp_path / "List_of_testing_videos.txt").read_text().splitlines()
    assert sorted(lines) == sorted(f"{1 - int(r['label'])} {r['path']}" for r in rows if r["split"] == "test")
    assert len(lines) == 6


def test_dfdc_parts_and_originals(tmp_path):
    synthesize(tmp_path, layout="dfdc", **SMALL)
    parts = ["dfdc_train_part_0", "dfdc_train_part_1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*parts, "synth.json", "videos.csv"]
    rows = {row["path"]: row for row in read_csv(tmp_path)}
    assert len({Path(path).name for path in rows}) == len(rows) == 50
    assert all(re.fullmatch(r"dfdc_train_part_[01]/[a-z]{10}\.mp4", path) for path in rows)
    seen = 0
    for part in parts:
        entries = json.loads((tmp_path / part / "metadata.json").read_text())
        for name, entry in entries.items():
            row = rows[f"{part}/{name}"]
            assert entry["label"] == ("FAKE" if row["label"] == "1" else "REAL")
            assert entry["split"] == row["split"]
            assert ("original" in entry) == (row["label"] == "1")
            if "original" in entry:
                assert entries[entry["original"]]["label"] == "REAL"
                assert rows[f"{part}/{entry['original']}"]["identity"] == row["identity"]
        seen += len(entries)
    assert seen == 50


def test_crf_is_asked_for_once(tmp_path):
    synthesize(tmp_path / "v", layout="dfdc", **SMALL | {"frames": 1}, crf=(40,), methods=("GainFlicker",))
    assert json.loads((tmp_path / "v/synth.json").read_text())["crf"] == [40]
    synthesize(tmp_path / "w", layout="dfdc", **SMALL | {"frames": 1}, methods=("GainFlicker",))
    assert json.loads((tmp_path / "w/synth.json").read_text())["crf"] == [23]
    assert all(all_files(tmp_path / "v")[n] != all_files(tmp_path / "w")[n] for n in videos(tmp_path / "v"))


# --- matched marginals ---


@pytest.mark.parametrize("method", [None, *SYNTH_METHODS], ids=str)
def test_parameters_vary_only_where_the_forgery_says(method):
    parameters = draw_perturbation(method, 50, np.random.default_rng(0))
    varying = VARYING[method] if method else ()
    for name, values in parameters._asdict().items():
        assert values.shape == (50,)
        assert len(np.unique(values)) == (50 if name in varying else 1), name


def test_every_parameter_varies_in_some_forgery_and_each_forgery_has_its_own():
    assert set(SYNTH_METHODS) == set(VARYING)
    assert len(set(VARYING.values())) == len(SYNTH_METHODS)
    assert {name for names in VARYING.values() for name in names} == set(Perturbation._fields)


@pytest.mark.parametrize("method", [None, *SYNTH_METHODS], ids=str)
@pytest.mark.parametrize("frame", [0, 17])
def test_one_frame_has_the_same_distribution_whatever_the_label(method, frame):
    n = 4000
    draws = [draw_perturbation(method, 20, np.random.default_rng([n, i])) for i in range(n)]
    shift, gain, blend = (np.array([getattr(d, name)[frame] for d in draws]) for name in Perturbation._fields)
    low, high = synth.BLEND
    limit = 2.2 / math.sqrt(n)  # P(KS > 2.2 / sqrt n) < 1.3e-4 for the true distribution
    assert ks_distance(shift, lambda v: v / (2 * np.pi)) < limit
    assert ks_distance(gain, lambda v: v / (2 * np.pi)) < limit
    assert ks_distance(blend, lambda v: (v - low) / (high - low)) < limit
    # independent of each other: correlations of unit-variance uniforms are within 4 standard errors of 0
    u = np.stack([shift / (2 * np.pi), gain / (2 * np.pi), (blend - low) / (high - low)])
    correlation = np.corrcoef(u)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 4 / math.sqrt(n)


def test_frames_of_a_forgery_are_drawn_independently():
    direction = draw_perturbation("ShiftJitter", 4000, np.random.default_rng(5)).shift
    lagged = np.corrcoef(np.cos(direction[:-1]), np.cos(direction[1:]))[0, 1]
    assert abs(lagged) < 4 / math.sqrt(4000)


def test_rejects_unknown_method():
    with pytest.raises(ValueError, match="method must be None or one of"):
        draw_perturbation("Deepfakes", 4, np.random.default_rng(0))


def test_codec_treats_a_frame_alike_in_any_company():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8).repeat(3, 0).repeat(3, 1)
    noise = [rng.integers(0, 255, frame.shape, dtype=np.uint8) for _ in range(5)]
    for crf in (23, 40):
        alone = decode(synth.encode([frame], fps=25, crf=crf))[0]
        still = decode(synth.encode([frame] * 6, fps=25, crf=crf))
        moving = decode(synth.encode([*noise, frame], fps=25, crf=crf))
        assert (still == alone).all()
        assert (moving[-1] == alone).all()


# --- the perturbation against closed forms ---


def plane_wave(cycles_x: int, cycles_y: int, shift=(0.0, 0.0)) -> np.ndarray:
    """A wave that fits the patch, displaced by ``shift`` pixels, [PATCH, PATCH] float64."""
    at = np.arange(portraits.PATCH) + 0.5
    x, y = at[None, :] - shift[0], at[:, None] - shift[1]
    return 50 * np.cos(2 * np.pi * (cycles_x * x + cycles_y * y) / portraits.PATCH + 0.3)


def detail_gain(cycles_x: int, cycles_y: int) -> float:
    """How much of a plane wave counts as detail: 1 - exp(-(DETAIL / wavelength)^2)."""
    return 1 - math.exp(-((synth.DETAIL * math.hypot(cycles_x, cycles_y) / portraits.PATCH) ** 2))


def constant(shift=0.0, gain=0.0, blend=0.0, frames=1) -> Perturbation:
    return Perturbation(*(np.full(frames, v) for v in (shift, gain, blend)))


def test_shift_moves_the_detail_by_the_radius(monkeypatch):
    monkeypatch.setattr(synth, "GAIN", 0.0)
    direction = np.array([0.0, 1.0, 2.5])
    base, donor = 120 + plane_wave(15, 3), plane_wave(2, 17)
    delta = synth.perturb(np.stack([base] * 3), donor, Perturbation(direction, np.zeros(3), np.zeros(3)))
    for change, angle in zip(delta, direction, strict=True):
        by = (synth.SHIFT_RADIUS * math.cos(angle), synth.SHIFT_RADIUS * math.sin(angle))
        expected = synth.inner_mask() * detail_gain(15, 3) * (plane_wave(15, 3, by) - plane_wave(15, 3))
        np.testing.assert_allclose(change, expected, atol=1e-3)


def test_gain_adds_a_ripple_of_the_mean(monkeypatch):
    monkeypatch.setattr(synth, "SHIFT_RADIUS", 0.0)
    base = 120 + plane_wave(15, 3)
    weight = synth.inner_mask().astype(np.float64)
    mean = (weight * base).sum() / weight.sum()
    at = np.arange(portraits.PATCH) + 0.5 - portraits.PATCH / 2
    ripple = np.cos(2 * np.pi * (0.8 * at[None, :] + 0.6 * at[:, None]) / synth.RIPPLE + 1.2)
    delta = synth.perturb(base[None], plane_wave(2, 17), constant(gain=1.2))[0]
    np.testing.assert_allclose(delta, weight * synth.GAIN * mean * ripple, atol=1e-3)


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.4])
def test_blend_turns_the_detail_and_keeps_its_energy(monkeypatch, angle):
    monkeypatch.setattr(synth, "GAIN", 0.0)
    monkeypatch.setattr(synth, "SHIFT_RADIUS", 0.0)
    everywhere = np.ones((portraits.PATCH, portraits.PATCH))  # over the whole patch, different waves are orthogonal
    monkeypatch.setattr(synth, "inner_mask", lambda: everywhere)
    base, donor = 120 + plane_wave(15, 3), 90 + 0.2 * plane_wave(2, 17) + 0.3 * plane_wave(15, 3)
    delta = synth.perturb(base[None], donor, constant(blend=angle))[0]
    expected = math.cos(angle) * plane_wave(15, 3) + math.sin(angle) * plane_wave(2, 17) - plane_wave(15, 3)
    np.testing.assert_allclose(delta, detail_gain(15, 3) * expected, atol=1e-3)
    assert delta.mean() == pytest.approx(0, abs=1e-4)


def test_exposure_flickers_within_its_bound():
    role = portraits.Role("lfw0", 0, "train")
    frames = portraits.base_video(role, 30, 96, 25, np.random.default_rng(3)).frames
    exposure = frames[:, :10, :10].mean((1, 2, 3))  # a corner of the still wall
    assert 0.005 < (exposure / exposure.mean()).std() < 2 * portraits.FLICKER


def test_nothing_changes_outside_the_mask():
    rng = np.random.default_rng(0)
    patches, donor = 255 * rng.random((2, 3, portraits.PATCH, portraits.PATCH))
    delta = synth.perturb(patches, donor[0], draw_perturbation("FullJitter", 3, rng))
    assert (delta[:, synth.inner_mask() == 0] == 0).all()
    assert (np.abs(delta).max((1, 2)) > 5).all()


# --- geometry and faces ---


def test_similarity_maps_its_point_and_inverts():
    scale, angle = np.array([1.5, 2.0]), np.array([0.3, -1.0])
    matrices = portraits.similarity(scale, angle, (48, 40), (np.array([10.0, 20.0]), np.array([5.0, 7.0])))
    np.testing.assert_allclose(matrices @ [48, 40, 1], [[10, 5], [20, 7]], atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(matrices[:, :, :2]), scale**2)
    np.testing.assert_allclose(matrices[0, :, 0], 1.5 * np.array([np.cos(0.3), np.sin(0.3)]))
    both = portraits.invert(matrices)[1] @ np.vstack([matrices[1], [0, 0, 1]])
    np.testing.assert_allclose(both, [[1, 0, 0], [0, 1, 0]], atol=1e-9)


def test_head_motion_has_unit_variance_and_is_slow():
    motions = np.stack([portraits.wander(40, 25, np.random.default_rng(i)) for i in range(2000)])
    assert motions[:, 20].var() == pytest.approx(1, abs=0.1)
    # three sinusoids of at most 1 Hz: no step exceeds their greatest slope
    assert np.abs(np.diff(motions, axis=1)).max() <= 3 * math.sqrt(2 / 3) * 2 * math.pi / 25


@pytest.mark.slow
def test_a_face_is_found_in_nearly_every_frame(tmp_path):
    from sdr.detectors import load_detector

    synthesize(tmp_path / "v", identities=20, frames=3, methods=("ShiftJitter", "FullJitter"))
    detector = load_detector("centerface")
    found = [
        len(detector(frame).scores) > 0
        for n in videos(tmp_path / "v")
        for frame in decode((tmp_path / "v" / n).read_bytes())
    ]
    assert len(found) == 22 * 3 * 2 * 3
    assert np.mean(found) >= 0.95
