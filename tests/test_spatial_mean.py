"""spatial_mean against float64, closed forms, its layout in memory, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import assert_matches_reference

from sdr_kernels import spatial_mean
from sdr_kernels.spatial_mean import spatial_mean_reference

# B, V, C, T, H, W: on and off every block size
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 33, 5, 3, 7),
    (1, 2, 64, 2, 8, 4),
    (1, 8, 65, 1, 7, 7),
    (3, 1, 130, 2, 1, 33),
    (0, 2, 8, 4, 2, 2),
]
TRITON = partial(spatial_mean, impl="triton")


def assert_right(x):
    assert_matches_reference(TRITON, spatial_mean_reference, [x])


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    assert_right(torch.randn(shape, device=device).to(dtype))


def channels_innermost(x):
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def misaligned(x):
    """The same values, one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def sliced(x):
    """The same values with gaps on every axis."""
    wide = x.new_full([2 * size for size in x.shape], 99)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


LAYOUTS = [channels_innermost, misaligned, lambda x: misaligned(x.movedim(2, -1)).movedim(-1, 2), sliced]


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["innermost", "misaligned", "innermost misaligned", "sliced"])
def test_any_layout(layout, dtype, device):
    assert_right(layout(torch.randn(2, 2, 17, 3, 5, 3, device=device).to(dtype)))


def test_branches_of_a_time_step_lie_side_by_side(device):
    tokens = TRITON(torch.randn(2, 3, 5, 4, 3, 2, device=device))
    joint = tokens.transpose(1, 2).flatten(2)
    assert joint.data_ptr() == tokens.data_ptr()
    torch.testing.assert_close(joint[1, 2, 5:10], tokens[1, 1, 2], rtol=0, atol=0)


def test_closed_form(device):
    """Position p of channel c, frame t, branch v holds p + 10 t + 100 v + 1000 c: the mean is that of p."""
    B, V, C, T, H, W = 1, 2, 3, 4, 5, 7
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in (V, C, T)]
    v, c, t = torch.meshgrid(*axes, indexing="ij")
    offset = 10 * t + 100 * v + 1000 * c  # [V, C, T]
    positions = torch.arange(H * W, dtype=torch.float32, device=device).view(H, W)
    x = (offset[..., None, None] + positions).expand(B, -1, -1, -1, -1, -1)
    expected = (offset + 17).transpose(1, 2)[None]
    torch.testing.assert_close(TRITON(x), expected, rtol=1e-6, atol=0)


def test_sums_beyond_the_range_of_half(device):
    x = torch.full((1, 1, 2, 1, 7, 7), 60000.0, device=device).half()
    torch.testing.assert_close(TRITON(x), x[..., 0, 0].transpose(-2, -1), rtol=0, atol=0)


def test_large_mean_and_small_differences(device):
    assert_right(1e4 + torch.randn(1, 2, 16, 2, 9, 9, device=device))


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_frame_and_channel(value, dtype, device):
    x = torch.randn(1, 2, 20, 3, 6, 6, device=device).to(dtype)
    x[0, 1, 7, 2, 5, 3] = value
    assert_right(x)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradients_come_from_the_reference_alone(impl, device):
    x = torch.randn(1, 2, 3, 2, 2, 2, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(spatial_mean(x).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 0.25), rtol=0, atol=0)
    if impl == "triton":
        with pytest.raises(RuntimeError, match="no gradients"):
            TRITON(x)
    with torch.no_grad():
        torch.testing.assert_close(spatial_mean(x, impl=impl), spatial_mean_reference(x), rtol=1e-6, atol=1e-6)


@pytest.mark.promise(row="registered right")
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_registration(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    torch.library.opcheck(torch.ops.sdr_kernels.spatial_mean_fwd.default, (x, "triton"))


@pytest.mark.promise(row="registered right")
def test_compiles_whole(device):
    x = torch.randn(2, 2, 5, 3, 2, 3, device=device)
    compiled = torch.compile(TRITON, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), TRITON(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4, 4), (1, 0, 3, 1, 1, 1), (1, 1, 3, 1, 1, 0)], ids=str)
def test_rejects_shape(shape):
    with pytest.raises(ValueError, match=r"x must be \[B, V, C, T, H, W\].*got \["):
        spatial_mean(torch.zeros(shape))


def test_rejects_dtype(device):
    with pytest.raises(TypeError, match=r"x must be float32.*got torch.int32"):
        spatial_mean(torch.zeros(1, 1, 1, 1, 1, 1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="x must not be float64"):
        TRITON(torch.zeros(1, 1, 1, 1, 1, 1, dtype=torch.float64, device=device))


def test_rejects_unknown_impl():
    with pytest.raises(ValueError, match=r"impl must be one of .*got 'hip'"):
        spatial_mean(torch.zeros(1, 1, 1, 1, 1, 1), impl="hip")
