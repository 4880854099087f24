"""TPA by DALI: the views of the definition in float64, in order, with nothing swallowed and nothing left behind."""

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import sdr.dali
from sdr import TPAConfig
from sdr.config import TPA_METHODS
from sdr.dali import dali_views, import_dali, method_arguments
from sdr.errors import SDRError
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, ViewMaps, draw_maps, normalise
from sdr_kernels.clip_views import clip_views_reference

B, T, SIZE = 3, 8, (80, 112)
# Largest errors in levels of 0..255. float32 is good to 1.5e-5 at 255, and a pixel passes through about ten roundings;
# a crop's box is known to 8e-6 of a pixel at 112 (float32 again, a few roundings), over which an edge rises 255 levels.
ROUNDING, BOX = 2e-4, 1e-2
BOUNDS = {"color_jitter": ROUNDING, "cutout": ROUNDING, "flip": ROUNDING, "crop": BOX}


def natural_clips(number=B, size=SIZE, seed=0):
    """Moving waves, an edge and noise: uint8, [B, T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    t, y, x = np.ogrid[:T, : size[0], : size[1]]
    clips = []
    for _ in range(number):
        waves = [np.sin((x * a + y * b) / 20 + t / 4 + c) for a, b, c in rng.uniform(-1, 3, (3, 3))]
        edge = 60 * (x + 2 * t > size[1] / 2)[..., None]
        clips.append(110 + 50 * np.stack(waves, -1) + edge + rng.normal(0, 6, (T, *size, 3)))
    return np.array(clips).clip(0, 255).astype(np.uint8)


def draw(config, number=B, *, size=SIZE, first=0, num_views=4):
    return draw_maps(
        config,
        seed=1,
        epoch=2,
        samples=range(first, first + number),
        num_views=num_views,
        num_frames=T,
        size=size,
    )


def views_of(batches, config, **options):
    return dali_views(batches, config, **{"num_views": 4, "batch_size": B, "num_frames": T} | options)


def truth(clips, maps, fill="mean"):
    """The definition in float64, [B, V, 3, T, H, W]."""
    clips = torch.from_numpy(clips).movedim(-1, 1)
    maps = map(torch.from_numpy, maps)
    return clip_views_reference(clips, *maps, IMAGENET_MEAN, IMAGENET_STD, fill, torch.float64)


def levels(views, expected):
    """Largest absolute difference of each view in levels of 0..255, [V]."""
    std = 255 * torch.tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1, 1)
    return ((views - expected) * std).abs().amax((0, 2, 3, 4, 5)).tolist()


def assert_close(views, expected):
    for method, error in zip(TPA_METHODS, levels(views, expected), strict=True):
        assert error <= BOUNDS[method], method


@pytest.mark.parametrize("size", [SIZE, (96, 96), (33, 20)], ids=str)
def test_four_methods_equal_the_definition(size):
    clips, config = natural_clips(size=size), TPAConfig()
    maps = draw(config, size=size)
    (views,) = views_of([(clips, maps)], config)
    assert views.shape == (B, 4, 3, T, *size)
    assert views.dtype == torch.float32
    assert views.movedim(2, -1).is_contiguous()
    assert_close(views, truth(clips, maps))


def test_methods_drawn_per_frame():
    """Every method changes from frame to frame, as the definition says, and the memory's order stays."""
    config = TPAConfig(per_frame=TPA_METHODS, flip_probability=0.5)
    clips = np.repeat(natural_clips()[:, :1], T, 1)
    maps = draw(config)
    (views,) = views_of([(clips, maps)], config)
    assert views.movedim(2, -1).is_contiguous()
    assert_close(views, truth(clips, maps))
    moves = (views != views[:, :, :, :1]).flatten(2).any(2)
    assert moves.all()


def test_one_method_drawn_per_frame_leaves_the_others_constant():
    config = TPAConfig(per_frame=["crop"])
    clips = np.repeat(natural_clips()[:, :1], T, 1)
    (views,) = views_of([(clips, draw(config))], config)
    assert torch.equal(views[:, :3], views[:, :3, :, :1].expand_as(views[:, :3]))
    assert (views[:, 3, :, 1:] != views[:, 3, :, :-1]).any()
    (three,) = views_of([(clips, draw(config, num_views=3))], config, num_views=3)
    assert torch.equal(three, views[:, :3])


@pytest.mark.parametrize("per_frame", [[], ["crop"]], ids=str)
def test_no_augmentation_is_normalisation(per_frame):
    clips, config = natural_clips(), TPAConfig(methods=("none", "crop"), per_frame=per_frame)
    (views,) = views_of([(clips, draw(config, num_views=3))], config, num_views=3)
    expected = normalise(torch.from_numpy(clips).permute(0, 4, 1, 2, 3))
    torch.testing.assert_close(views[:, 0], expected, rtol=0, atol=1e-5)
    assert torch.equal(views[:, 2], views[:, 0])


def test_equal_frames_stay_equal_bit_for_bit():
    clips, config = np.repeat(natural_clips()[:, :1], T, 1), TPAConfig()
    (views,) = views_of([(clips, draw(config))], config)
    assert torch.equal(views, views[:, :, :, :1].expand_as(views))


@pytest.mark.parametrize("num_views", [1, 6])
def test_views_cycle_through_the_methods(num_views):
    clips, config = natural_clips(), TPAConfig(methods=("crop", "crop", "flip", "cutout"))
    maps = draw(config, num_views=num_views)
    (views,) = views_of([(clips, maps)], config, num_views=num_views)
    assert max(levels(views, truth(clips, maps))) <= BOX


def test_small_crops_and_strong_colours():
    config = TPAConfig(methods=("crop", "color_jitter"), crop_area=(0.001, 0.01), brightness=1, contrast=1, hue=0.5)
    clips, maps = natural_clips(), draw(config, num_views=2)
    (views,) = views_of([(clips, maps)], config, num_views=2)
    expected = truth(clips, maps)
    assert max(levels(views, expected)) <= BOX
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):  # the clamp is reached
        assert expected[:, 1, channel].min() == pytest.approx(-mean / std)


def test_black_hole():
    clips, config = natural_clips(), TPAConfig(methods=("cutout",), cutout_fill="black")
    maps = draw(config, num_views=1)
    (views,) = views_of([(clips, maps)], config, num_views=1)
    assert max(levels(views, truth(clips, maps, "black"))) <= ROUNDING
    assert min(levels(views, truth(clips, maps, "mean"))) > 100


def test_holes_that_are_empty_or_pass_the_frame():
    clips, config = natural_clips(1), TPAConfig(methods=("cutout",))
    for hole in ((5, 5, 0, 9), (9, 2, 3, 7), (3, 9, 7, 2), (-4, 300, -9, 200), (100, 300, 5, 70), (200, 300, 5, 9)):
        maps = draw(config, 1, num_views=1)._replace(hole=np.array(hole, np.int32).reshape(1, 1, 1, 4))
        (views,) = views_of([(clips, maps)], config, num_views=1)
        assert max(levels(views, truth(clips, maps))) <= ROUNDING, hole
        anchor, shape = method_arguments("cutout", ViewMaps(*(array[:, 0, 0] for array in maps)), SIZE)
        assert (shape >= 0).all(), "a GPU is not asked to write outside"
        assert ((anchor >= 0) & (anchor + shape <= SIZE)).all(), hole


def test_half_precisions_are_roundings_of_float32():
    clips, config = natural_clips(), TPAConfig()
    batch = clips, draw(config)
    single, half, brain = (
        next(views_of([batch], config, dtype=dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    assert (half.dtype, half.stride()) == (torch.float16, single.stride())
    spacing = torch.finfo(torch.float16).eps * 2 ** single.abs().log2().floor().clamp(min=-14)
    assert ((half - single).abs() <= spacing / 2).all()  # DALI rounds ties away from zero
    assert torch.equal(brain, single.to(torch.bfloat16))
    assert brain.stride() == single.stride()


def test_numbers_do_not_depend_on_the_batch():
    """Full, partial and single batches, in order; earlier views are not overwritten by later ones."""
    clips, config = natural_clips(7), TPAConfig()

    def batches(size):
        return [(clips[i : i + size], draw(config, len(clips[i : i + size]), first=i)) for i in range(0, 7, size)]

    alone = list(views_of(batches(1), config, batch_size=1))
    whole = list(views_of(batches(3), config, prefetch=3))
    assert [len(views) for views in whole] == [3, 3, 1]
    assert torch.equal(torch.cat(whole), torch.cat(alone))
    assert torch.equal(torch.cat(alone)[4:5], next(views_of([batches(1)[4]], config)))


def test_a_source_may_write_over_its_arrays():
    config, clips = TPAConfig(), natural_clips(2)
    maps = [draw(config, 1, first=i) for i in range(2)]

    def source():
        clip, reused = np.empty_like(clips[:1]), draw(config, 1)
        for i in range(2):
            clip[:] = clips[i]
            for array, of_batch in zip(reused, maps[i], strict=True):
                array[:] = of_batch
            yield clip, reused

    for i, views in enumerate(views_of(source(), config)):
        assert_close(views, truth(clips[i : i + 1], maps[i]))


def test_a_clip_of_any_strides():
    config, clips = TPAConfig(), natural_clips(6)[::-2, :, :, ::-1]
    maps = draw(config)
    (views,) = views_of([(clips, maps)], config)
    assert_close(views, truth(clips.copy(), maps))


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_the_source_is_advanced_by_prefetch(prefetch):
    config, pulled = TPAConfig(), []
    batch = natural_clips(1, (16, 16)), draw(config, 1, size=(16, 16))
    views = views_of((pulled.append(i) or batch for i in range(9)), config, prefetch=prefetch)
    assert pulled == []
    next(views)
    assert prefetch <= len(pulled) <= prefetch + 1
    assert len(list(views)) == 8


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("error", [SDRError("a.mp4", "is damaged"), RuntimeError("other"), KeyError(3)], ids=repr)
@pytest.mark.parametrize("before", [0, 2])
def test_the_exception_of_the_source_arrives_in_its_place(error, before, prefetch):
    config = TPAConfig()
    batch = natural_clips(1, (16, 16)), draw(config, 1, size=(16, 16))

    def source():
        for _ in range(before):
            yield batch
        raise error

    views = views_of(source(), config, prefetch=prefetch)
    for _ in range(before):
        assert len(next(views)) == 1
    with pytest.raises(type(error)) as caught:
        next(views)
    assert caught.value is error
    assert list(views) == []


def test_an_interrupt_is_not_held_back():
    config = TPAConfig()

    def source():
        yield natural_clips(1, (16, 16)), draw(config, 1, size=(16, 16))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(views_of(source(), config, prefetch=2))


BAD_BATCHES = {
    "clips must be uint8": lambda clips, maps: (clips.astype(np.float32), maps),
    "clips must be \\[1 to 3, 8, H, W, 3\\], got \\[4,": lambda clips, maps: (clips[[0, 1, 2, 2]], maps),
    "clips must be .* got \\[0,": lambda clips, maps: (clips[:0], maps),
    "clips must be .* got \\[3, 7,": lambda clips, maps: (clips[:, 1:], maps),
    "clips must be .* got \\[3\\]": lambda clips, maps: (clips[:, 0, 0, 0, 0], maps),
    "hole must be \\[3, 4, 1, 4\\]": lambda clips, maps: (clips, maps._replace(hole=maps.hole[:, :3])),
    "color must be \\[2, 4, 1, 3, 4\\]": lambda clips, maps: (clips[:2], maps._replace(sampling=maps.sampling[:2])),
    "sampling of view 0 must change nothing": lambda clips, maps: (clips, mixed(maps, "sampling", 0, 3)),
    "color of view 1 must change nothing": lambda clips, maps: (clips, mixed(maps, "color", 1, 0)),
    "sampling of view 2 must change nothing": lambda clips, maps: (clips, mixed(maps, "sampling", 2, 3)),
    "hole of view 3 must change nothing": lambda clips, maps: (clips, mixed(maps, "hole", 3, 1)),
    "sampling must read a box inside": lambda clips, maps: (clips, shifted(maps, 5)),
    "sampling must read a box inside of": lambda clips, maps: (clips, shifted(maps, float("nan"))),
}


def mixed(maps, name, view, other):
    """View ``other``'s map given to another view too."""
    array = getattr(maps, name).copy()
    array[:, view] = array[:, other]
    return maps._replace(**{name: array})


def shifted(maps, pixels):
    sampling = maps.sampling.copy()
    sampling[:, 3, :, 1] += 112 * pixels
    return maps._replace(sampling=sampling)


@pytest.mark.parametrize("rule", BAD_BATCHES)
def test_a_batch_of_another_form_is_refused(rule):
    config = TPAConfig()
    good = natural_clips(), draw(config)
    views = views_of([good, BAD_BATCHES[rule](*good)], config)
    next(views)
    with pytest.raises((ValueError, TypeError), match=rule):
        next(views)


@pytest.mark.parametrize("name", ["num_views", "batch_size", "num_frames", "prefetch", "threads"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=name):
        views_of([], TPAConfig(), **{name: 0})


def test_dtype_is_checked():
    with pytest.raises(TypeError, match="dtype must be float32"):
        views_of([], TPAConfig(), dtype=torch.float64)


def test_a_failure_inside_dali_is_one_line(monkeypatch):
    monkeypatch.setattr(sdr.dali, "method_arguments", lambda *_: [np.zeros((1, 3, 7), np.float32)])
    config = TPAConfig(methods=("color_jitter",))
    views = views_of([(natural_clips(1), draw(config, 1, num_views=1))], config, num_views=1)
    with pytest.raises(SDRError, match=r"^DALI: \S.*MT") as caught:
        next(views)
    assert "\n" not in str(caught.value)
    assert "File" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there(monkeypatch):
    with pytest.raises(SDRError, match="DALI: cannot run on cuda: torch sees no such GPU"):
        views_of([], TPAConfig(), device="cuda")
    monkeypatch.setattr(sdr.dali, "device_number", lambda _: 0)
    with pytest.raises(SDRError, match=r"DALI: cannot build the pipeline: .*CUDA is not available"):
        views_of([], TPAConfig(), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("per_frame", [(), TPA_METHODS], ids=["clip", "frame"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu(per_frame, dtype):
    config = TPAConfig(per_frame=per_frame)
    batches = [(natural_clips(seed=i), draw(config, first=i)) for i in range(4)]
    with torch.cuda.stream(torch.cuda.Stream()):
        made = [views.cpu() for views in views_of(batches, config, device="cuda", dtype=dtype)]
    rounding = 255 * max(IMAGENET_STD) * torch.finfo(dtype).eps  # half the spacing from 2 to 4, in levels
    for views, (clips, maps) in zip(made, batches, strict=True):
        assert max(levels(views, truth(clips, maps))) <= BOX + rounding
        assert views.movedim(2, -1).is_contiguous()


def hide_dali(monkeypatch, found):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", found)


def test_missing_dali_is_one_line(monkeypatch):
    hide_dali(monkeypatch, None)
    with pytest.raises(SDRError) as caught:
        views_of([], TPAConfig())
    assert str(caught.value) == (
        "DALI: is not installed (pip install 'sdr[dali-cu13]', or 'sdr[dali-cu12]' for CUDA 12)"
    )


def test_an_empty_dali_is_a_missing_one(monkeypatch):
    """What PyPI's nvidia-dali would leave: a package without a pipeline in it."""
    hide_dali(monkeypatch, ModuleType("nvidia.dali"))
    with pytest.raises(SDRError, match="DALI: is not installed"):
        import_dali()


@pytest.mark.parametrize("version", ["1.51.2", "2.2.0", "2.2.9"])
def test_old_dali_is_refused(monkeypatch, version):
    monkeypatch.setattr(import_dali(), "__version__", version)
    with pytest.raises(SDRError, match=f"DALI: {version} is too old: .*pip install"):
        import_dali()


@pytest.mark.parametrize("version", ["2.3.0", "2.10.0", "3.0.0dev"])
def test_newer_dali_is_taken(monkeypatch, version):
    monkeypatch.setattr(import_dali(), "__version__", version)
    assert import_dali().__version__ == version


SOAK = """
import gc, os
from pathlib import Path
import numpy as np
from sdr import TPAConfig
from sdr.dali import dali_views
from sdr.errors import SDRError
from sdr.tpa import draw_maps

config, size = TPAConfig(), (64, 64)
clips = np.zeros((4, 8, *size, 3), np.uint8)
maps = draw_maps(config, seed=0, epoch=0, samples=range(4), num_views=4, num_frames=8, size=size)

def source(error=None):
    for _ in range(3):
        yield clips, maps
    if error:
        raise error

def views(*arguments):
    return dali_views(source(*arguments), config, num_views=4, batch_size=4, num_frames=8)

def fail():
    try:
        list(views(SDRError("a.mp4", "is damaged")))
    except SDRError:
        return
    raise AssertionError

gc.disable()  # threads may not wait for the collector
uses = [lambda: list(views()), lambda: next(views()), lambda: views(), fail]
counts, memory = [], []
for i in range(48):
    uses[i % 4]()
    counts.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    if i % 4 == 3:
        gc.collect()
    memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
assert set(counts) == {counts[0]}, counts
print((min(memory[-12:]) - min(memory[4:16])) / 2**20)
"""


def test_nothing_is_left_behind():
    """Ended, abandoned, unused and failed views: no thread, no descriptor; 36 outputs of 6 MiB would show in memory."""
    done = subprocess.run([sys.executable, "-c", SOAK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) < 60


def test_views_outlive_the_pipeline():
    config = TPAConfig()
    batch = natural_clips(), draw(config)
    views = next(views_of([batch], config))
    kept = views.clone()
    for _ in views_of([(255 - batch[0], batch[1])] * 3, config):
        assert torch.equal(views, kept)
