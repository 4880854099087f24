"""temporal_stem against float64, FTCN's own stem, closed forms, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import assert_matches_reference

from sdr.ftcn import Stem
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, normalise
from sdr_kernels import temporal_stem
from sdr_kernels.temporal_stem import temporal_stem_reference

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
# B, V, C, k, T, H, W, a clip per branch: on and off the block sizes, odd and even
SHAPES = [
    (1, 1, 1, 1, 1, 2, 2, False),
    (2, 4, 8, 5, 2, 9, 7, False),
    (2, 2, 8, 5, 2, 6, 11, True),
    (1, 3, 33, 3, 4, 4, 3, False),
    (1, 8, 20, 3, 1, 15, 5, False),
    (1, 8, 3, 5, 1, 8, 4, True),
    (1, 1, 130, 1, 2, 5, 2, True),
    (1, 2, 16, 5, 3, 34, 37, False),
    (0, 2, 8, 5, 4, 8, 8, True),
]
SMALL = (2, 2, 5, 3, 2, 7, 6)

each_input = pytest.mark.parametrize("uint8", [False, True], ids=["floating", "uint8"])
each_clip = pytest.mark.parametrize("per_branch", [False, True], ids=["one clip", "clip per branch"])


@pytest.fixture(params=["cpu", "triton"])
def impl(request):
    return request.param


@pytest.fixture
def device(impl, device):
    """Where ``impl`` runs: of the two, only Triton's is for GPUs."""
    return torch.device("cpu") if impl == "cpu" else device


def make_inputs(shape, dtype, device, *, uint8=False):
    """A clip, weights, and scales of both signs of which one is 0."""
    B, V, C, k, T, H, W, per_branch = shape
    size = (B, V, 3, T, H, W) if per_branch else (B, 3, T, H, W)
    x = torch.randint(0, 256, size, dtype=torch.uint8) if uint8 else torch.randn(size).to(dtype)
    weight = (torch.randn(V, C, 3, k) / (3 * k) ** 0.5).to(dtype)
    scale, shift = torch.randn(V, C), torch.randn(V, C)
    scale[-1, -1] = 0
    return [tensor.to(device) for tensor in (x, weight, scale, shift)]


def assert_right(inputs, impl):
    options = {"normalise": IMAGENET if inputs[0].dtype == torch.uint8 else None}
    assert_matches_reference(
        partial(temporal_stem, impl=impl, **options), partial(temporal_stem_reference, **options), inputs
    )


@pytest.mark.promise(row="accurate")
@each_input
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, uint8, dtype, impl, device):
    assert_right(make_inputs(shape, dtype, device, uint8=uint8), impl)


def test_long_clip(impl, device):
    assert_right(make_inputs((1, 2, 4, 5, 64, 4, 4, False), torch.float32, device, uint8=True), impl)


def channels_innermost(x):
    return x.movedim(-4, -1).contiguous().movedim(-1, -4)


def width_outermost(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def misaligned(x):
    """The same values, one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def sliced(x):
    """The same values with gaps on every axis."""
    wide = x.new_full([2 * size for size in x.shape], 99)
    return wide[(slice(1, None, 2),) * x.ndim].copy_(x)


@pytest.mark.promise(row="odd inputs")
@each_input
@each_clip
@pytest.mark.parametrize("layout", [channels_innermost, width_outermost, misaligned, sliced])
def test_any_layout_of_clips(layout, per_branch, uint8, impl, device):
    x, *weights = make_inputs((*SMALL, per_branch), torch.float32, device, uint8=uint8)
    assert_right([layout(x), *weights], impl)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", [width_outermost, misaligned, sliced])
def test_any_layout_of_weights(layout, impl, device):
    x, *weights = make_inputs((*SMALL, False), torch.float32, device)
    assert_right([x, *(layout(tensor) for tensor in weights)], impl)


def test_one_clip_is_the_same_clip_for_every_branch(impl, device):
    x, *weights = make_inputs((1, 3, 8, 5, 2, 8, 6, False), torch.float32, device, uint8=True)
    run = partial(temporal_stem, normalise=IMAGENET, impl=impl)
    torch.testing.assert_close(run(x, *weights), run(x[:, None].expand(-1, 3, -1, -1, -1, -1), *weights))


@pytest.mark.parametrize("route", ["reference", "kernel"])
@each_input
@pytest.mark.parametrize(("H", "W"), [(16, 16), (9, 11), (2, 3)])
def test_equals_the_models_stem(H, W, uint8, route, impl, device):
    stems = [Stem(6, 5).eval().to(device) for _ in range(2)]
    norms = [stem.bn for stem in stems]
    for bn in norms:
        for tensor in (bn.weight.data, bn.bias.data, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 1.5)
    x = torch.randint(0, 256, (1, 3, 3, H, W), dtype=torch.uint8, device=device)
    x = x if uint8 else normalise(x)
    with torch.no_grad():
        scale = torch.stack([bn.weight / (bn.running_var + bn.eps).sqrt() for bn in norms])
        shift = torch.stack([bn.bias for bn in norms]) - scale * torch.stack([bn.running_mean for bn in norms])
        weight = torch.stack([stem.conv.weight[..., 0, 0] for stem in stems])
        expected = torch.stack([stem(normalise(x)) for stem in stems], dim=1)
        options = {"normalise": IMAGENET if uint8 else None, "impl": impl if route == "kernel" else "reference"}
        got = temporal_stem(x, weight, scale, shift, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_closed_form(impl, device):
    """A ramp in space that doubles in the second frame; its sum over three frames, zero outside of the clip."""
    ramp = torch.arange(64.0).view(8, 8)
    x = torch.stack([ramp, 2 * ramp]).expand(1, 3, -1, -1, -1).to(device)  # [1, 3, 2, 8, 8]
    weight = torch.zeros(1, 2, 3, 3, device=device)
    weight[:, :, 1] = 1  # of the second colour alone
    scale, shift = torch.tensor([[1.0, -1.0]], device=device), torch.tensor([[0.5, 100.0]], device=device)
    largest = torch.tensor([[27.0, 31.0], [59.0, 63.0]])  # of each window, clipped to the frame
    smallest = torch.tensor([[0.0, 2.0], [16.0, 18.0]])
    expected = torch.stack([3 * largest + 0.5, (100 - 3 * smallest).clamp(min=0)])  # [2, 2, 2]
    got = temporal_stem(x, weight, scale, shift, impl=impl)[0, 0].cpu()  # [2, 2, 2, 2], both frames see both
    torch.testing.assert_close(got, expected[:, None].expand(-1, 2, -1, -1), rtol=0, atol=0)


def test_time_is_padded_after_normalisation(impl, device):
    """Pixels of the mean are 0 once normalised, as is the padding, so every frame of such a clip is the shift."""
    x = torch.full((1, 3, 3, 4, 4), 51, dtype=torch.uint8, device=device)
    weight, shift = torch.rand(1, 4, 3, 5, device=device), torch.rand(1, 4, device=device)
    out = temporal_stem(
        x, weight, torch.ones_like(shift), shift, normalise=([0.2] * 3, [0.1, 0.3, 0.5]), impl=impl
    )  # 0.2 of 255 is 51
    torch.testing.assert_close(out, shift.view(1, 1, 4, 1, 1, 1).expand(out.shape), rtol=0, atol=1e-5)


def test_small_weights_of_uint8_stay_right_in_half_precision(impl, device):
    """Divided by 255 and by the deviation they would lie below what float16 holds."""
    x, weight, scale, shift = make_inputs((1, 1, 8, 5, 3, 6, 6, False), torch.float16, device, uint8=True)
    assert_right([x, weight / 2048, scale * 2048, shift], impl)


@pytest.mark.promise(row="odd inputs")
# of NumPy in Triton's interpreter, where Inf meets a weight of 0
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_where_float64_has_them(value, dtype, impl, device):
    x, weight, scale, shift = make_inputs((1, 2, 4, 3, 3, 16, 18, False), dtype, device)
    x[0, 1, 2, 5, 7] = value
    x[0, 0, 0, 15, 17] = value
    assert_right([x, weight, scale, shift], impl)


@each_input
@pytest.mark.parametrize("index", [1, 2, 3], ids=["weight", "scale", "shift"])
def test_nan_of_a_channel_stays_in_it(index, uint8, impl, device):
    inputs = make_inputs((1, 1, 4, 1, 2, 6, 6, False), torch.float32, device, uint8=uint8)
    inputs[index][0, 1] = float("nan")
    nan = temporal_stem(*inputs, normalise=IMAGENET if uint8 else None, impl=impl).isnan()
    assert nan[:, :, 1].all()
    assert not nan[:, :, [0, 2, 3]].any()


def test_channels_are_innermost(impl, device):
    out = temporal_stem(*make_inputs((*SMALL, False), torch.float32, device), impl=impl)
    assert out.movedim(2, -1).is_contiguous()


@pytest.mark.promise(row="registered right")
@each_input
@each_clip
def test_registration(per_branch, uint8, impl, device):
    inputs = make_inputs((1, 2, 4, 3, 1, 5, 6, per_branch), torch.float32, device, uint8=uint8)
    statistics = [list(values) for values in IMAGENET] if uint8 else [None, None]
    torch.library.opcheck(torch.ops.sdr_kernels.temporal_stem_fwd.default, (*inputs, *statistics, impl))


@pytest.mark.promise(row="registered right")
def test_compiles_whole(impl, device):
    inputs = make_inputs((*SMALL, False), torch.float32, device, uint8=True)
    run = partial(temporal_stem, normalise=IMAGENET, impl=impl)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs), rtol=0, atol=0)


def test_auto_takes_the_kernel_of_the_device():
    inputs = make_inputs((*SMALL, False), torch.float32, "cpu")
    assert torch.equal(temporal_stem(*inputs), temporal_stem(*inputs, impl="cpu"))


@each_input
def test_auto_is_differentiable(uint8):
    inputs = make_inputs((*SMALL, True), torch.float32, "cpu", uint8=uint8)
    inputs[2][-1, -1] = 0.5  # at 0 the maximum has a corner
    inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor.is_floating_point()]
    run = partial(temporal_stem, normalise=IMAGENET if uint8 else None)
    assert torch.autograd.gradcheck(lambda *_: run(*inputs), leaves, fast_mode=True)


def test_auto_takes_the_reference_for_gradients():
    inputs = make_inputs((*SMALL, False), torch.float32, "cpu")
    inputs[1].requires_grad_()
    out = temporal_stem(*inputs)
    assert torch.equal(out, temporal_stem(*inputs, impl="reference"))
    assert out.requires_grad


def test_rejects_a_gradient_of_a_kernel(impl, device):
    x, weight, scale, shift = make_inputs((*SMALL, False), torch.float32, device)
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run: it has no gradients"):
        temporal_stem(x, weight.requires_grad_(), scale, shift, impl=impl)
    with torch.no_grad():
        assert temporal_stem(x, weight, scale, shift, impl=impl).isfinite().all()


def rejects(error, match, *, uint8=False, per_branch=False, normalise=None, **changes):
    names = ("x", "weight", "scale", "shift")
    inputs = make_inputs((*SMALL, per_branch), torch.float32, "cpu", uint8=uint8)
    inputs = {
        name: changes.get(name, lambda tensor: tensor)(tensor) for name, tensor in zip(names, inputs, strict=True)
    }
    with pytest.raises(error, match=match):
        temporal_stem(**inputs, normalise=normalise)


@pytest.mark.parametrize("index", [(0,), (slice(None), None, None)], ids=["4", "7"])
def test_rejects_ranks(index):
    rejects(ValueError, r"x must be \[B, 3, T, H, W\] or .*, got \[", x=lambda x: x[index])


def test_rejects_four_colours():
    rejects(ValueError, r"x must be .*, got \[2, 4, 2, 7, 6\]", x=lambda x: x.new_zeros(2, 4, 2, 7, 6))


def test_rejects_no_frames():
    rejects(ValueError, r"T at least 1 .* got \[2, 3, 0, 7, 6\]", x=lambda x: x[:, :, :0])


@pytest.mark.parametrize("axis", [-1, -2])
def test_rejects_a_side_below_2(axis):
    rejects(ValueError, r"H and W at least 2, got \[2, 3, 2, ", x=lambda x: x.narrow(axis, 0, 1))


def test_rejects_other_branches():
    rejects(ValueError, r"weight's 2 branches, got \[2, 1, 3,", per_branch=True, x=lambda x: x[:, :1])


@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (2, 5, 1, 3), (2, 0, 3, 3), (2, 5, 3)], ids=str)
def test_rejects_weights(shape):
    rejects(ValueError, r"weight must be \[V, C, 3, k\] .* got \[2, ", weight=lambda weight: weight.new_zeros(shape))


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_rejects_shapes_of_the_norm(name):
    rejects(ValueError, rf"{name} must be \[V, C\] = \[2, 5\], got \[5\]", **{name: lambda tensor: tensor[0]})


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_rejects_dtypes_of_the_norm(name):
    rejects(TypeError, rf"{name} must be torch.float32 .* got torch.float16", **{name: torch.Tensor.half})


def test_rejects_dtypes():
    rejects(TypeError, "x must be uint8 or of weight's dtype, torch.float32, got torch.float16", x=torch.Tensor.half)
    rejects(TypeError, "weight must be float32, .* got torch.int64", x=torch.Tensor.long, weight=torch.Tensor.long)


@pytest.mark.parametrize("name", ["weight", "scale", "shift"])
def test_rejects_other_devices(name):
    rejects(ValueError, f"{name} must have x's device, cpu, got meta", **{name: lambda tensor: tensor.to("meta")})


def test_rejects_uint8_without_normalisation():
    rejects(ValueError, "normalise must be given for uint8 .* got None for x of torch.uint8", uint8=True)


def test_rejects_normalisation_of_floats():
    rejects(ValueError, "normalise must be given for uint8 and only for it, got .* torch.float32", normalise=IMAGENET)


@pytest.mark.parametrize("values", [((0.5,) * 3, (0.5,) * 2), ((0.5,) * 3, (0.5, 0, 0.5)), ((0.5,) * 3,)], ids=str)
def test_rejects_normalisations(values):
    rejects(ValueError, "normalise must be three means .* got", uint8=True, normalise=values)


def test_rejects_float64_in_a_kernel(impl, device):
    inputs = [tensor.double() for tensor in make_inputs((*SMALL, False), torch.float32, device)]
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run"):
        temporal_stem(*inputs, impl=impl)
