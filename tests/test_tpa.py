"""TPA: drawn once per clip, a pure function of its key, and each method against its definition."""

import colorsys

import numpy as np
import pytest
import torch

from sdr import TPAConfig
from sdr.config import TPA_METHODS
from sdr.tpa import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewParameters,
    augment,
    draw_maps,
    draw_view,
    normalise,
    pixels_between,
    view_maps,
)
from sdr_kernels import clip_views

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
T, SIZE = 6, 20


def draw(method, *, per_frame=(), sample=3, seed=1, epoch=2, view=0, **fields):
    config = TPAConfig(methods=(method,), per_frame=frozenset(per_frame), **fields)
    return draw_view(config, seed=seed, epoch=epoch, sample=sample, view=view, num_frames=T)


def still_clip(seed=0):
    frame = torch.randint(0, 256, (3, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return frame.expand(3, T, SIZE, SIZE)


def parameters(flip=False, crop=(0, 0, 1, 1), color=None, cutout=(0, 0, 0, 0)):
    color = np.eye(3, 4) if color is None else color
    return ViewParameters(
        np.full(T, flip),
        np.tile(np.float64(crop), (T, 1)),
        np.tile(color, (T, 1, 1)),
        np.tile(np.float64(cutout), (T, 1)),
    )


def apply_view(clip, drawn, fill="mean"):
    """One view of one clip, [3, T, H, W], through the maps that every path takes."""
    maps = view_maps(drawn, tuple(clip.shape[-2:]))
    dtypes = torch.float32, torch.float32, torch.int32
    maps = [torch.from_numpy(array).to(dtype)[None, None] for array, dtype in zip(maps, dtypes, strict=True)]
    return clip_views(clip[None], *maps, mean=IMAGENET_MEAN, std=IMAGENET_STD, fill=fill)[0, 0]


def denormalise(view):
    """float64 RGB in 0..1, [3, T, H, W]."""
    return view.double().numpy() * STD[:, None, None, None] + MEAN[:, None, None, None]


@pytest.mark.parametrize("method", TPA_METHODS)
def test_constant_over_frames(method):
    """A clip of equal frames stays one: bit for bit."""
    for sample in range(5):
        view = apply_view(still_clip(), draw(method, sample=sample))
        assert (view == view[:, :1]).all()
        assert not torch.equal(view, normalise(still_clip()))


@pytest.mark.parametrize("method", TPA_METHODS)
def test_per_frame_on_request(method):
    view = apply_view(still_clip(), draw(method, per_frame=[method], flip_probability=0.5))
    assert not (view == view[:, :1]).all()
    other = next(m for m in TPA_METHODS if m != method)
    constant = apply_view(still_clip(), draw(method, per_frame=[other]))
    assert (constant == constant[:, :1]).all()


def test_draw_is_a_function_of_its_key():
    base = draw("crop").crop
    assert np.array_equal(base, draw("crop").crop)
    for change in ({"seed": 9}, {"epoch": 9}, {"sample": 9}, {"view": 9}):
        assert not np.array_equal(base, draw("crop", **change).crop)


def test_draw_does_not_depend_on_the_batch():
    clips = torch.stack([still_clip(i) for i in range(3)])
    together = augment(clips, TPAConfig(), seed=5, epoch=1, samples=[7, 8, 9], num_views=4)
    alone = augment(clips[2:], TPAConfig(), seed=5, epoch=1, samples=[9], num_views=4)
    assert torch.equal(together[2:], alone)
    assert together.shape == (3, 4, 3, T, SIZE, SIZE)


def test_maps_are_those_of_the_draws():
    config = TPAConfig(per_frame=frozenset({"crop"}))
    key = {"seed": 5, "epoch": 1, "num_views": 5}
    maps = draw_maps(config, **key, samples=[7, 9], num_frames=T, size=(12, SIZE))
    assert [array.shape for array in maps] == [(2, 5, T, 4), (2, 5, T, 3, 4), (2, 5, T, 4)]
    assert [array.dtype for array in maps] == [np.float32, np.float32, np.int32]
    for b, sample in enumerate([7, 9]):
        for view in range(5):
            drawn = draw_view(config, seed=5, epoch=1, sample=sample, view=view, num_frames=T)
            for array, expected in zip(maps, view_maps(drawn, (12, SIZE)), strict=True):
                assert np.array_equal(array[b, view], expected.astype(array.dtype))


def test_maps_have_one_frame_unless_a_method_is_drawn_per_frame():
    for per_frame, num_views, frames in (((), 4, 1), (("crop",), 4, T), (("crop",), 3, 1), (("flip",), 3, T)):
        config = TPAConfig(per_frame=frozenset(per_frame))
        maps = draw_maps(config, seed=0, epoch=0, samples=[1], num_views=num_views, num_frames=T, size=(8, 8))
        assert [array.shape[2] for array in maps] == [frames] * 3
        whole = augment(still_clip()[None], config, seed=0, epoch=0, samples=[1], num_views=num_views)
        for view in range(num_views):
            drawn = draw_view(config, seed=0, epoch=0, sample=1, view=view, num_frames=T)
            assert torch.equal(whole[0, view], apply_view(still_clip(), drawn))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_augment_in_another_dtype(dtype):
    clips = torch.randint(0, 256, (2, 3, T, 12, SIZE), dtype=torch.uint8)
    key = {"seed": 5, "epoch": 1, "samples": [7, 9], "num_views": 4}
    views, expected = augment(clips, TPAConfig(), **key, dtype=dtype), augment(clips, TPAConfig(), **key)
    assert views.dtype == dtype
    narrow = torch.promote_types(dtype, torch.float32) == torch.float32
    # in float64 a crop's position no longer rounds: 1e-6 of a pixel, where neighbours differ by 4 at most
    torch.testing.assert_close(views, expected.to(dtype), rtol=0, atol=0 if narrow else 2e-5)
    assert views.movedim(2, -1).is_contiguous()


def test_views_cycle_through_the_methods():
    config = TPAConfig()
    for view, moved in enumerate(["color", "cutout", "flip", "crop", "color", "cutout"]):
        drawn = draw_view(config, seed=0, epoch=0, sample=0, view=view, num_frames=T)
        neutral = parameters()
        changed = [
            n
            for n in ("flip", "crop", "color", "cutout")
            if not np.array_equal(*(getattr(p, n) for p in (drawn, neutral)))
        ]
        assert changed == [moved]


def test_normalisation_is_imagenets():
    view = apply_view(still_clip(), parameters()).double().numpy()
    expected = (still_clip().double().numpy() / 255 - MEAN[:, None, None, None]) / STD[:, None, None, None]
    assert np.abs(view - expected).max() < 1e-6


def test_flip_mirrors_left_and_right():
    view = apply_view(still_clip(), parameters(flip=True))
    assert torch.equal(view, normalise(still_clip()).flip(-1))
    draws = [draw("flip", sample=i, flip_probability=0.5).flip[0] for i in range(2000)]
    assert abs(np.mean(draws) - 0.5) < 3 * 0.5 / np.sqrt(2000)


def test_crop_is_bilinear_between_pixel_centres():
    """A ramp is a line: bilinear sampling of a crop gives the line's value at each output pixel's centre."""
    ramp = torch.arange(SIZE, dtype=torch.uint8).mul(10).expand(3, T, SIZE, SIZE)
    left, top, width, height = 0.2, 0.1, 0.6, 0.5
    view = denormalise(apply_view(ramp, parameters(crop=(left, top, width, height)))) * 255
    x = (left + (np.arange(SIZE) + 0.5) / SIZE * width) * SIZE - 0.5
    assert np.abs(view - 10 * x).max() < 1e-3


def test_crop_is_of_the_flipped_frame():
    clip = torch.randint(0, 256, (3, T, 12, SIZE), dtype=torch.uint8)
    box = (0.1, 0.05, 0.7, 0.6)
    expected = apply_view(clip.flip(-1), parameters(crop=box))
    torch.testing.assert_close(apply_view(clip, parameters(flip=True, crop=box)), expected, rtol=0, atol=5e-5)


def test_crop_boxes_keep_area_and_ratio():
    boxes = np.array([draw("crop", sample=i).crop[0] for i in range(500)])
    left, top, width, height = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-12).all()
    assert (top + height <= 1 + 1e-12).all()
    area, ratio = width * height, width / height
    assert area.min() >= 0.7
    assert area.max() <= 1
    assert ratio.min() >= 0.9
    assert ratio.max() <= 1 / 0.9
    assert abs(area.mean() - 0.85) < 3 * 0.3 / np.sqrt(12 * 500)  # uniform in 0.7..1


def test_cutout_covers_its_box_and_nothing_else():
    view = apply_view(still_clip(), parameters(cutout=(0.25, 0.5, 0.5, 0.25)))
    hole = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    hole[10:15, 5:15] = True
    assert (view[..., hole] == 0).all()
    assert torch.equal(view[..., ~hole], normalise(still_clip())[..., ~hole])
    black = apply_view(still_clip(), parameters(cutout=(0.25, 0.5, 0.5, 0.25)), fill="black")
    assert np.abs(denormalise(black)[..., hole.numpy()]).max() < 1e-6


def test_the_hole_holds_the_pixels_whose_centres_it_covers():
    generator = np.random.default_rng(0)
    start = np.concatenate([generator.uniform(0, 1, 400), np.arange(100) / 50, np.arange(100) / 100])
    length = np.concatenate([generator.uniform(0, 0.5, 400), np.arange(200) % 7 / 50])
    for size in (1, 25, 50, 64):
        first, last = pixels_between(start, length, size)
        centres = (np.arange(size) + 0.5) / size
        inside = (centres >= start[:, None]) & (centres < (start + length)[:, None])
        index = np.arange(size)
        assert np.array_equal(inside, (index >= first[:, None]) & (index < last[:, None]))


def test_cutout_area_is_within_its_range():
    boxes = np.array([draw("cutout", sample=i).cutout[0] for i in range(500)])
    area, ratio = boxes[:, 2] * boxes[:, 3], boxes[:, 2] / boxes[:, 3]
    assert area.min() >= 0.02
    assert area.max() <= 0.33
    assert ratio.min() >= 0.3
    assert ratio.max() <= 3.3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"brightness": 0.4}, lambda x, f: np.clip(f * x, 0, 1)),
        ({"contrast": 0.4}, lambda x, f: np.clip(0.5 + f * (x - 0.5), 0, 1)),
        (
            {"saturation": 0.4},
            lambda x, f: np.clip(f * x + (1 - f) * np.tensordot([0.299, 0.587, 0.114], x, 1)[None], 0, 1),
        ),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_color_jitter_parts(fields, expected):
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | fields
    x = still_clip().double().numpy() / 255
    factors = []
    for sample in range(20):
        drawn = draw("color_jitter", sample=sample, **still)
        factor = drawn.color[0, 0, 0] - drawn.color[0, 1, 0]  # the diagonal less what saturation adds everywhere
        factors.append(factor)
        assert 0.6 <= factor <= 1.4
        assert np.abs(denormalise(apply_view(still_clip(), drawn)) - expected(x, factor)).max() < 1e-5
    assert np.std(factors) > 0.1


def test_hue_turns_the_colour_and_keeps_the_luma():
    angles = []
    for sample in range(20):
        drawn = draw("color_jitter", sample=sample, brightness=0, contrast=0, saturation=0, hue=0.1)
        matrix = drawn.color[0, :, :3]
        assert np.allclose(matrix @ np.ones(3), 1)  # grey stays grey
        assert np.allclose([0.299, 0.587, 0.114] @ matrix, [0.299, 0.587, 0.114])
        i, q = (np.array(colorsys.rgb_to_yiq(*c)[1:]) for c in ((0.8, 0.4, 0.3), matrix @ [0.8, 0.4, 0.3]))
        turn = np.angle(complex(*q) / complex(*i)) / (2 * np.pi)
        angles.append(turn)
        assert abs(turn) <= 0.1 + 2e-3  # colorsys rounds its YIQ constants
    assert np.std(angles) > 0.03


def test_order_of_the_jitter_is_drawn():
    """Brightness and contrast do not commute: both orders occur."""
    orders = set()
    for sample in range(20):
        matrix = draw("color_jitter", sample=sample, saturation=0, hue=0).color[0]
        scale, offset = matrix[0, 0], matrix[0, 3]
        # brightness first: offset = (1 - c) / 2; contrast first: b (1 - c) / 2
        generator = np.random.Generator(np.random.Philox(key=[1, 2], counter=[0, 0, 0, sample]))
        brightness, contrast = generator.uniform(0.6, 1.4), generator.uniform(0.6, 1.4)
        assert scale == pytest.approx(brightness * contrast)
        first = np.isclose(offset, 0.5 * (1 - contrast))
        assert first or np.isclose(offset, brightness * 0.5 * (1 - contrast))
        orders.add(bool(first))
    assert orders == {True, False}


def test_none_is_the_normalised_clip():
    """Bit for bit, whatever other views are drawn, and no number is taken from the generator of another view."""
    clips = torch.stack([still_clip(0), still_clip(1)])
    key = {"seed": 4, "epoch": 1, "samples": [3, 8]}
    alone = augment(clips, TPAConfig(methods=("none",)), **key, num_views=2)
    expected = normalise(clips)
    assert torch.equal(alone[:, 0], expected)
    assert torch.equal(alone[:, 1], expected)
    mixed = augment(clips, TPAConfig(methods=("crop", "none", "flip"), per_frame={"crop"}), **key, num_views=3)
    assert torch.equal(mixed[:, 1], expected)
    assert torch.equal(mixed[:, 2], expected.flip(-1))
    default = augment(clips, TPAConfig(per_frame={"crop"}, methods=("crop",)), **key, num_views=1)
    assert torch.equal(mixed[:, 0], default[:, 0])


def test_input_is_not_modified():
    clip = still_clip().clone()
    before = clip.clone()
    for method in TPA_METHODS:
        apply_view(clip, draw(method))
    assert torch.equal(clip, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("blur",)}, "must be one of color_jitter"),
        ({"hue": 0.7}, "hue must lie in"),
        ({"crop_area": (0.9, 0.7)}, "crop_area must be a positive, ordered pair"),
        ({"per_frame": {"grid"}}, "per_frame must be one of"),
        ({"per_frame": {"none"}}, "per_frame must be one of color_jitter, cutout, flip, crop, got 'none'"),
    ],
)
def test_rejects_wrong_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        TPAConfig(**fields)


def test_rejects_wrong_clips():
    key = {"seed": 0, "epoch": 0, "num_views": 1}
    with pytest.raises(TypeError, match=r"clips must be torch.uint8, got torch\.float32"):
        augment(torch.zeros(1, 3, T, 8, 8), TPAConfig(), **key, samples=[0])
    with pytest.raises(ValueError, match=r"clips must be \[B, 3, T, H, W\], got \[3, 6, 20, 20\]"):
        augment(still_clip(), TPAConfig(), **key, samples=[0, 1, 2])
    with pytest.raises(ValueError, match="samples must name 1 clips, got 2"):
        augment(still_clip()[None], TPAConfig(), **key, samples=[0, 1])


def test_normalise_takes_bytes_and_leaves_floats():
    with pytest.raises(TypeError, match=r"clip must be uint8 or floating, got torch\.int64"):
        normalise(torch.zeros(3, T, 8, 8, dtype=torch.int64))
    clip = torch.randn(3, T, 8, 8)
    assert normalise(clip) is clip
