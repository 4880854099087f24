"""clip_views against float64, its definition pixel by pixel, TPA's methods, its bounds, and what it must refuse."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_matches_reference

from sdr import TPAConfig
from sdr.config import TPA_METHODS
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, draw_maps
from sdr_kernels import clip_views
from sdr_kernels.clip_views import MAX_SIDE, clip_views_reference, empty_views

IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
TRITON = partial(clip_views, **IMAGENET, impl="triton")
# B, V, a map per frame, T, H, W: on and off the block sizes
SHAPES = [
    (1, 1, False, 1, 1, 1),
    (2, 4, False, 3, 9, 7),
    (2, 3, True, 4, 33, 5),
    (1, 2, True, 2, 5, 67),
    (1, 5, False, 1, 34, 32),
    (1, 6, True, 1, 2, 3),
    (0, 2, True, 2, 4, 4),
]
SMALL = (2, 3, True, 2, 7, 6)


def random_clips(shape, device):
    B, _, _, T, H, W = shape
    return torch.randint(0, 256, (B, 3, T, H, W), dtype=torch.uint8).to(device)


def random_maps(shape, device):
    """Every step at once in every view; samplings of whole pixels, beyond the frame and from a flip among others."""
    B, V, per_frame, T, H, W = shape
    size = (B, V, T if per_frame else 1)
    sampling = torch.stack([torch.randn(*size, 2), torch.rand(*size, 2) * torch.tensor([W, H])], -1)  # [..., axis, 2]
    whole = (torch.rand(sampling.shape) < 0.3) | (torch.rand(*size, 1, 1) < 0.3)
    sampling = torch.where(whole, sampling.round(), sampling).flatten(-2)
    color = torch.randn(*size, 3, 4) / 2
    hole = torch.stack([torch.randint(-2, side + 3, size) for side in (W, W, H, H)], -1).int()
    return [tensor.to(device) for tensor in (sampling, color, hole)]


def make_inputs(shape, device):
    return [random_clips(shape, device), *random_maps(shape, device)]


def neutral_maps(B, V, F, device):
    sampling = torch.tensor([1.0, 0, 1, 0], device=device).expand(B, V, F, 4).contiguous()
    color = torch.eye(3, 4, device=device).expand(B, V, F, 3, 4).contiguous()
    return [sampling, color, torch.zeros(B, V, F, 4, dtype=torch.int32, device=device)]


def assert_right(inputs, dtype, fill="mean"):
    """The reference in this dtype is the measure, in float64 the truth."""

    def reference(clips, sampling, color, hole):
        wide = torch.float64 if sampling.dtype == torch.float64 else dtype
        return clip_views_reference(clips, sampling, color, hole, **IMAGENET, fill=fill, dtype=wide)

    assert_matches_reference(partial(TRITON, dtype=dtype, fill=fill), reference, inputs)


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("fill", ["mean", "black"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, fill, dtype, device):
    assert_right(make_inputs(shape, device), dtype, fill)


@pytest.mark.parametrize("per_frame", [False, True], ids=["constant", "per frame"])
@pytest.mark.parametrize("method", TPA_METHODS)
def test_methods_of_tpa(method, per_frame, dtype, device):
    config = TPAConfig(methods=(method,), per_frame=frozenset({method} if per_frame else ()), flip_probability=0.5)
    clips = random_clips((2, 0, per_frame, 3, 19, 35), device)
    drawn = draw_maps(config, seed=1, epoch=2, samples=[3, 4], num_views=2, num_frames=3, size=(19, 35))
    assert drawn.sampling.shape[2] == (3 if per_frame else 1)
    assert_right([clips, *(torch.from_numpy(array).to(device) for array in drawn)], dtype, config.cutout_fill)


def pixel_by_pixel(clips, sampling, color, hole, fill):
    """The definition, in Python's floats."""
    B, _, T, H, W = clips.shape
    clips, sampling, color, hole = (tensor.tolist() for tensor in (clips, sampling, color, hole))
    V, F = len(sampling[0]), len(sampling[0][0])
    out = np.empty((B, V, 3, T, H, W))
    for b, v, t, y, x in np.ndindex(B, V, T, H, W):
        frame = t if F > 1 else 0
        scale_x, offset_x, scale_y, offset_y = sampling[b][v][frame]
        at_x, at_y = (min(max(a, 0), n - 1) for a, n in ((scale_x * x + offset_x, W), (scale_y * y + offset_y, H)))
        rgb = [0.0, 0.0, 0.0]
        for c, row, column in np.ndindex(3, H, W):  # a tent of a pixel's width around each source pixel
            weight = max(0, 1 - abs(at_x - column)) * max(0, 1 - abs(at_y - row))
            rgb[c] += weight * clips[b][c][t][row][column] / 255
        left, right, top, bottom = hole[b][v][frame]
        inside = left <= x < right and top <= y < bottom
        for c in range(3):
            *row, constant = color[b][v][frame][c]
            value = min(max(sum(m * p for m, p in zip(row, rgb, strict=True)) + constant, 0), 1)
            value = 0 if inside and fill == "black" else value
            out[b, v, c, t, y, x] = (value - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
            if inside and fill == "mean":
                out[b, v, c, t, y, x] = 0
    return torch.from_numpy(out)


@pytest.mark.parametrize("fill", ["mean", "black"])
@pytest.mark.parametrize("per_frame", [False, True], ids=["constant", "per frame"])
def test_reference_is_its_definition(per_frame, fill):
    inputs = make_inputs((2, 3, per_frame, 2, 5, 4), "cpu")
    got = clip_views(*inputs, **IMAGENET, fill=fill, dtype=torch.float64)
    torch.testing.assert_close(got, pixel_by_pixel(*inputs, fill), rtol=1e-12, atol=1e-12)


def channels_innermost(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def width_outermost(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def misaligned(x):
    """The same values, one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def sliced(x):
    """The same values with gaps on every axis."""
    wide = x.new_full([2 * size for size in x.shape], 99)
    return wide[(slice(1, None, 2),) * x.ndim].copy_(x)


def one_frame(x):
    """The first frame for all, of which memory holds one."""
    return x[:, :, :1].contiguous().expand(x.shape)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", [channels_innermost, width_outermost, misaligned, sliced, one_frame])
def test_any_layout_of_clips(layout, dtype, device):
    clips, *maps = make_inputs(SMALL, device)
    assert_right([layout(clips), *maps], dtype)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", [width_outermost, misaligned, sliced])
def test_any_layout_of_maps(layout, device):
    clips, *maps = make_inputs(SMALL, device)
    assert_right([clips, *map(layout, maps)], torch.float32)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_innermost])
def test_channels_are_innermost(layout, impl, device):
    clips, *maps = make_inputs(SMALL, device)
    views = clip_views(layout(clips), *maps, **IMAGENET, impl=impl)
    assert views.shape == (2, 3, 3, 2, 7, 6)
    assert views.movedim(2, -1).is_contiguous()


def test_whole_pixels_are_exact(device):
    """Nothing is done to the first view, the second is mirrored and moved by two rows: no pixel is mixed."""
    clips = random_clips((1, 2, False, 2, 40, 37), device)
    sampling, color, hole = neutral_maps(1, 2, 1, device)
    sampling[0, 1, 0] = torch.tensor([-1.0, 36, 1, 2])
    views = clip_views(clips, sampling, color, hole, mean=[0] * 3, std=[1] * 3, impl="triton") * 255
    expected = clips[0].float()
    torch.testing.assert_close(views[0, 0], expected, rtol=2e-7, atol=0)
    moved = expected.flip(-1)[:, :, [*range(2, 40), 39, 39]]
    torch.testing.assert_close(views[0, 1], moved, rtol=2e-7, atol=0)


def test_half_a_pixel_is_the_mean_of_two(device):
    """Moved by half a pixel in one axis at a time, the other whole."""
    clips = random_clips((1, 2, False, 1, 6, 5), device)
    sampling, color, hole = neutral_maps(1, 2, 1, device)
    sampling[0, 0, 0, 1] = sampling[0, 1, 0, 3] = 0.5
    views = clip_views(clips, sampling, color, hole, mean=[0] * 3, std=[1] * 3, impl="triton")[0] * 255
    frames = clips[0].float()
    right, below = (torch.cat([frames, frames.narrow(axis, -1, 1)], axis) for axis in (3, 2))
    torch.testing.assert_close(views[0], (right[..., 1:] + right[..., :-1]) / 2, rtol=2e-7, atol=0)
    torch.testing.assert_close(views[1], (below[:, :, 1:] + below[:, :, :-1]) / 2, rtol=2e-7, atol=0)


def test_ramp_keeps_its_slope_up_to_the_border(device):
    ramp = torch.arange(48, dtype=torch.uint8, device=device).mul(5).expand(1, 3, 2, 3, 48)
    sampling, color, hole = neutral_maps(1, 1, 1, device)
    sampling[0, 0, 0] = torch.tensor([0.75, 20.25, 1, 0])
    views = clip_views(ramp, sampling, color, hole, mean=[0] * 3, std=[1] * 3, impl="triton") * 255
    expected = (5 * (0.75 * torch.arange(48.0, device=device) + 20.25)).clamp(max=5 * 47)
    torch.testing.assert_close(views, expected.expand(views.shape), rtol=1e-6, atol=0)


def test_hole_lies_over_everything(device):
    clips, sampling, color, hole = make_inputs((1, 2, False, 2, 5, 6), device)
    sampling[0, 0], color[0, 0, 0, 0, 0] = math.nan, math.nan
    hole[...] = torch.tensor([-(2**31), 2**31 - 1, -(2**31), 2**31 - 1], dtype=torch.int32)
    assert (TRITON(clips, sampling, color, hole) == 0).all()
    black = TRITON(clips, sampling, color, hole, fill="black")
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(black, (-mean / std).expand(black.shape), rtol=1e-6, atol=0)


# of NumPy in Triton's interpreter
RUNTIME = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered in:RuntimeWarning")
    for what in ("invalid value", "overflow", "divide by zero")
]


def quiet(test):
    for mark in RUNTIME:
        test = mark(test)
    return test


@quiet
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sampling_that_is_not_finite_gives_nan(value, index, device):
    inputs = make_inputs((1, 2, True, 2, 5, 6), device)
    inputs[1][0, 1, 1, index], inputs[3][...] = value, 0
    assert_right(inputs, torch.float32)
    nan = TRITON(*inputs).isnan()
    assert nan[0, 1, :, 1].all()
    assert not nan[0, 0].any()
    assert not nan[0, 1, :, 0].any()


@quiet
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_color_that_is_not_finite_stays_where_float64_has_it(value, device):
    inputs = make_inputs((1, 2, False, 2, 5, 6), device)
    inputs[0][0, 0, 0, 2, 3] = 0  # 0 * Inf
    inputs[1][...] = torch.tensor([1.0, 0, 1, 0])
    inputs[2][0, 1, 0, 1, 0] = value
    inputs[2][0, 0, 0, 2, 3] = value
    assert_right(inputs, torch.float32)


HOSTILE = [0.0, -0.0, 1e-45, -1e-3, 0.999, 5.0, -7.5, 3e9, -3e9, 2.0**63, -(2.0**63), 3e38, -3e38, math.nan, math.inf]


@quiet
def test_any_sampling_reads_the_frame_and_writes_the_views(device, monkeypatch):
    """Beyond the border lies what no view can show, and the views' memory has margins that no store may touch."""
    B, V, T, H, W = 1, len(HOSTILE), 1, 5, 35
    around = torch.full((B, 3, T, H + 2, W + 2), 255, dtype=torch.uint8, device=device)
    clips = around[..., 1:-1, 1:-1].fill_(51)
    maps = neutral_maps(B, V, 1, device)
    memory = []

    def guarded(clips, sampling, dtype):
        out = empty_views(clips, sampling, dtype)
        memory.append(torch.full((out.numel() + 2048,), 77.0, dtype=dtype, device=device))
        return memory[-1][1024:-1024].view(B, V, T, H, W, 3).movedim(-1, 2)

    monkeypatch.setattr("sdr_kernels._triton.clip_views.empty_views", guarded)
    for index in range(4):
        maps[0][...] = torch.tensor([1.0, 0, 1, 0])
        maps[0][0, :, 0, index] = torch.tensor(HOSTILE)
        views = clip_views(clips, *maps, mean=[0] * 3, std=[1] * 3, impl="triton")
        finite = views[:, :-2]
        torch.testing.assert_close(finite, torch.full_like(finite, 0.2), rtol=2e-7, atol=0)
        assert views[:, -2:].isnan().all()
        assert (memory[-1][:1024] == 77).all()
        assert (memory[-1][-1024:] == 77).all()


# memory between two pages that may not be touched: one access beyond it ends the process
GUARDED = """
import ctypes, mmap
import numpy as np
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
start, libc = ctypes.addressof(ctypes.c_char.from_buffer(memory)), ctypes.CDLL(None)
for guard in (start, start + 2 * page):
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
whole = np.frombuffer(memory, dtype=np.uint8)
"""
# clips that begin and that end with that memory
SAMPLED = """
import torch
from sdr_kernels import clip_views
np.seterr(all="ignore")
T, H, W = 2, 7, 33
hostile = torch.tensor([5, -7.5, 3e9, -3e9, 3e38, -3e38, float("nan"), float("inf")])
sampling = torch.tensor([1.0, 0, 1, 0]).repeat(1, 4 * len(hostile), 1, 1)
for index in range(4):
    sampling[0, index :: 4, 0, index] = hostile
color, hole = torch.eye(3, 4).expand(1, 4 * len(hostile), 1, 3, 4), torch.zeros(1, 4 * len(hostile), 1, 4)
for first, layout in ((page, (1, 3, T, H, W)), (2 * page - 3 * T * H * W, (1, T, H, W, 3))):
    clip = torch.from_numpy(whole[first : first + 3 * T * H * W]).view(layout)
    clip = clip if layout[1] == 3 else clip.movedim(-1, 1)
    clip_views(clip, sampling, color, hole.int(), mean=[0] * 3, std=[1] * 3, impl="triton")
"""


def run_guarded(code):
    command = [sys.executable, "-c", GUARDED + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)


@pytest.mark.promise(row="in bounds")
@pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are a CPU's; compute-sanitizer watches a GPU")
def test_no_sampling_reads_beyond_the_clip():
    done = run_guarded(SAMPLED)
    assert done.returncode == 0, done.stderr
    assert [run_guarded(f"whole[{index}]").returncode for index in ("page", "page - 1", "2 * page")] == [0, -11, -11]


@pytest.mark.promise(row="repeatable")
def test_repeatable(dtype, device):
    inputs = make_inputs((2, 2, True, 1, 33, 35), device)
    first = TRITON(*inputs, dtype=dtype)
    assert all(torch.equal(first, TRITON(*inputs, dtype=dtype)) for _ in range(3))


@pytest.mark.promise(row="registered right")
def test_registration(dtype, device):
    statistics = [list(values) for values in IMAGENET.values()]
    arguments = (*make_inputs(SMALL, device), *statistics, True, dtype, "triton")
    torch.library.opcheck(torch.ops.sdr_kernels.clip_views_fwd.default, arguments)


@pytest.mark.promise(row="registered right")
def test_compiles_whole(dtype, device):
    inputs = make_inputs(SMALL, device)
    run = partial(TRITON, dtype=dtype)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs), rtol=0, atol=0)


class Views(torch.nn.Module):
    def forward(self, clips, sampling, color, hole):
        return TRITON(clips, sampling, color, hole, dtype=torch.float16)


@pytest.mark.promise(row="registered right")
@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict, device):
    inputs = make_inputs(SMALL, device)
    B = torch.export.Dim("B", min=2)
    exported = torch.export.export(Views(), tuple(inputs), dynamic_shapes=({0: B},) * 4, strict=strict)
    more = make_inputs((3, *SMALL[1:]), device)
    assert torch.equal(exported.module()(*more), TRITON(*more, dtype=torch.float16))


def test_auto_takes_the_reference_on_a_cpu():
    inputs = make_inputs(SMALL, "cpu")
    assert torch.equal(clip_views(*inputs, **IMAGENET), clip_views(*inputs, **IMAGENET, impl="reference"))


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("index", [1, 2], ids=["sampling", "color"])
def test_rejects_a_gradient(index, impl, device):
    inputs = make_inputs(SMALL, device)
    inputs[index].requires_grad_()
    with pytest.raises(RuntimeError, match="clip_views cannot run: it has no gradients"):
        clip_views(*inputs, **IMAGENET, impl=impl)
    with torch.no_grad():
        assert clip_views(*inputs, **IMAGENET, impl=impl).isfinite().all()


def rejects(error, match, *, options=None, **changes):
    names = ("clips", "sampling", "color", "hole")
    inputs = dict(zip(names, make_inputs(SMALL, "cpu"), strict=True))
    inputs = {name: changes.get(name, lambda tensor: tensor)(tensor) for name, tensor in inputs.items()}
    with pytest.raises(error, match=match):
        clip_views(**inputs, **IMAGENET | (options or {}))


@pytest.mark.parametrize("shape", [(2, 3, 2, 7), (2, 4, 2, 7, 6), (2, 3, 0, 7, 6), (2, 3, 2, 7, 0)], ids=str)
def test_rejects_clips(shape):
    rejects(ValueError, r"clips must be \[B, 3, T, H, W\] .* got \[2, ", clips=lambda x: x.new_zeros(shape))


@pytest.mark.parametrize("axis", [-1, -2])
def test_rejects_sides_that_float32_cannot_count(axis):
    shape = [1, 3, 1, 1, 1]
    shape[axis] = MAX_SIDE + 1
    rejects(ValueError, "H and W at most 16777216, got .*16777217", clips=lambda x: x.new_zeros(1).expand(shape))


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (2, 0, 2, 4), (2, 3, 4), (2, 3, 2, 5), (1, 3, 2, 4)], ids=str)
def test_rejects_samplings(shape):
    rejects(ValueError, r"sampling must be \[B, V, F, 4\] .* got \[", sampling=lambda x: x.new_zeros(shape))


@pytest.mark.parametrize(("name", "got"), [("color", r"\[2, 3, 1, 3, 4\]"), ("hole", r"\[2, 3, 1, 4\]")])
def test_rejects_maps_of_other_shapes(name, got):
    rejects(ValueError, rf"{name} must be \[B, V, F, .*got {got}", **{name: lambda x: x[:, :, :1]})


def test_rejects_dtypes_of_inputs():
    rejects(TypeError, "clips must be torch.uint8, got torch.float32", clips=torch.Tensor.float)
    rejects(TypeError, "sampling must be torch.float32, got torch.float64", sampling=torch.Tensor.double)
    rejects(TypeError, "color must be torch.float32, got torch.float16", color=torch.Tensor.half)
    rejects(TypeError, "hole must be torch.int32, got torch.int64", hole=torch.Tensor.long)


@pytest.mark.parametrize("name", ["sampling", "color", "hole"])
def test_rejects_other_devices(name):
    rejects(ValueError, f"{name} must have clips' device, cpu, got meta", **{name: lambda x: x.to("meta")})


@pytest.mark.parametrize("options", [{"mean": (0.5, 0.5)}, {"std": (0.5, 0, 0.5)}, {"std": (0.5,) * 4}], ids=str)
def test_rejects_statistics(options):
    rejects(ValueError, "mean and std must be three numbers each, those of std above 0, got", options=options)


def test_rejects_other_fills():
    rejects(ValueError, "fill must be one of mean, black, got 'white'", options={"fill": "white"})


def test_rejects_other_dtypes(device):
    rejects(TypeError, "dtype must be float32, .* got torch.int32", options={"dtype": torch.int32})
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: dtype must not be float64"):
        TRITON(*make_inputs(SMALL, device), dtype=torch.float64)


def test_rejects_unknown_impl():
    rejects(ValueError, "impl must be one of .*got 'hip'", options={"impl": "hip"})
