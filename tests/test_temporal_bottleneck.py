"""temporal_bottleneck against float64, the model's own blocks, closed forms, and what it must refuse."""

from functools import partial

import pytest
import torch
from compare import LAYOUTS, assert_matches_reference
from torch.utils._python_dispatch import TorchDispatchMode

from sdr.ftcn import Bottleneck
from sdr.packing import pack_blocks
from sdr_kernels import FoldedConv, temporal_bottleneck

# B, V, C_in, inner, C_out, k, T, H, W, and which of branch1, pool, time_pool
SHAPES = [
    (1, 1, 4, 1, 4, 1, 1, 1, 1, ""),
    (2, 3, 32, 8, 32, 3, 5, 3, 5, ""),
    (1, 2, 16, 16, 48, 5, 4, 7, 5, "branch1"),
    (1, 8, 24, 8, 32, 3, 2, 5, 4, "branch1 pool"),
    (1, 1, 64, 16, 64, 3, 64, 1, 3, "time_pool"),
    (2, 1, 16, 33, 40, 3, 7, 3, 2, "branch1 time_pool"),
    (1, 2, 20, 40, 24, 1, 3, 5, 7, "branch1 pool time_pool"),
    (1, 1, 96, 72, 96, 3, 3, 7, 9, ""),
    (1, 1, 40, 136, 70, 3, 2, 9, 6, "branch1 pool"),
    (0, 2, 8, 8, 8, 3, 4, 2, 2, ""),
]


def make_inputs(shape, dtype, device):
    """x and the flat (weight, scale, shift) of a, b, c and perhaps branch1; every gamma sign occurs."""
    B, V, C_in, inner, C_out, k, T, H, W, flags = shape
    inputs = [torch.randn(B, V, C_in, T, H, W, device=device).to(dtype)]
    layers = [(inner, C_in, k), (inner, inner, 1), (C_out, inner, 1)] + [(C_out, C_in, 1)] * ("branch1" in flags)
    for rows, columns, kernel in layers:
        weight = torch.randn(V, rows, columns, kernel, device=device) / (columns * kernel) ** 0.5
        inputs += [weight.to(dtype), torch.randn(V, rows, device=device), torch.randn(V, rows, device=device) / 2]
    return inputs


def run(flags, x, *layers, **options):
    convs = [layers[i : i + 3] for i in range(0, len(layers), 3)]
    return temporal_bottleneck(x, *convs, pool=" pool" in flags, time_pool="time_pool" in flags, **options)


def assert_right(shape, inputs):
    kernel, reference = (partial(run, shape[-1], impl=impl) for impl in ("triton", "reference"))
    assert_matches_reference(kernel, reference, inputs)


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    assert_right(shape, make_inputs(shape, dtype, device))


BRANCH1_POOL = (2, 2, 20, 8, 24, 3, 2, 5, 4, "branch1 pool")


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout, dtype, device):
    x, *layers = make_inputs(BRANCH1_POOL, dtype, device)
    layers = [tensor.repeat_interleave(2, 0)[::2] for tensor in layers]
    assert_right(BRANCH1_POOL, [LAYOUTS[layout](x), *layers])


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize("flags", ["", "branch1 pool", "branch1 time_pool"])
@pytest.mark.parametrize("inner", [8, 40], ids=["chained", "through scratch"])
def test_nan_and_infinity_stay_where_they_belong(inner, flags, dtype, device):
    shape = (1, 2, 24, inner, 24, 3, 6, 4, 4, flags)
    x, *layers = make_inputs(shape, dtype, device)
    x[0, 0, 3, 1, 1, 1] = float("nan")
    x[0, 1, 0, 4, 0, 2] = float("inf")
    assert_right(shape, [x, *layers])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_infinity_beside_padding_stays_infinite(impl, device):
    unit = (torch.ones(1, 1, 1, 1, device=device), torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device))
    x = torch.tensor([1.0, float("inf")], device=device).view(1, 1, 1, 1, 1, 2)
    assert temporal_bottleneck(x, unit, unit, unit, impl=impl).flatten().tolist() == [2, float("inf")]


class Copies(TorchDispatchMode):
    """Counts copies of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 2, 32, 8, 32, 3, 2, 2, 2, ""), BRANCH1_POOL], ids=str)
def test_nothing_is_copied_where_memory_is_in_order(shape, device):
    x, *layers = make_inputs(shape, torch.float32, device)
    x = LAYOUTS["channels last"](x)
    layers = [t.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1) if t.ndim == 4 else t for t in layers]
    with Copies() as copies:
        run(shape[-1], x, *layers, impl="triton")
    assert copies.count == 0


def model_block(pool, C_in, inner, seed):
    """An FTCN bottleneck in evaluation, with random statistics and gammas of both signs."""
    torch.manual_seed(seed)
    block = Bottleneck(C_in, inner, kernel=3, pool=pool).eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return block


@torch.no_grad()
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("pool", "time_pool", "C_in"), [(False, False, 32), (False, True, 32), (True, False, 16)])
def test_equals_the_models_block(pool, time_pool, C_in, impl, device):
    blocks = [model_block(pool, C_in, 8, seed) for seed in range(2)]
    packed = pack_blocks(blocks, torch.float32, time_pool=time_pool)
    convs = [FoldedConv(*(t if t is None else t.to(device) for t in conv)) for conv in packed[:4] if conv is not None]
    x = torch.randn(2, 2, C_in, 4, 6, 5)
    expected = torch.stack([block(x[:, v]) for v, block in enumerate(blocks)], 1)
    if time_pool:
        expected = torch.nn.functional.max_pool3d(expected.flatten(0, 1), (2, 1, 1)).unflatten(0, (2, 2))
    out = temporal_bottleneck(x.to(device), *convs, pool=pool, time_pool=time_pool, impl=impl)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_pools_between_bn_and_relu(impl, device):
    one = torch.ones(1, 1, 1, 1, device=device)
    x = torch.tensor([[1.0, 2.0], [4.0, 5.0]], device=device).view(1, 1, 1, 1, 2, 2)
    unit = (one, torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device))
    b = (one, -torch.ones(1, 1, device=device), torch.full((1, 1), 3.0, device=device))
    nothing = (one, torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device))
    # 3 - {1, 2, 4, 5} = {2, 1, -1, -2}: the largest is 2; a pool before BN would give 3 - 5, then 0
    assert temporal_bottleneck(x, unit, b, unit, nothing, pool=True, impl=impl).item() == 2


@pytest.mark.promise(row="repeatable")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[7]], ids=str)
def test_repeats_bit_for_bit(shape, dtype, device):
    inputs = make_inputs(shape, dtype, device)
    first, *others = (run(shape[-1], *inputs, impl="triton") for _ in range(3))
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.promise(row="registered right")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[9]], ids=str)
def test_registration(shape, device):
    inputs = make_inputs(shape, torch.float32, device)
    inputs += [None] * (13 - len(inputs))
    pools = (" pool" in shape[-1], "time_pool" in shape[-1])
    torch.library.opcheck(torch.ops.sdr_kernels.temporal_bottleneck_fwd, (*inputs, *pools, "triton"))


@pytest.mark.promise(row="registered right")
def test_compiles_whole(device):
    inputs = make_inputs(BRANCH1_POOL, torch.float32, device)
    compiled = torch.compile(partial(run, "branch1 pool", impl="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), run("branch1 pool", *inputs, impl="triton"))


def test_a_gradient_takes_the_reference():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(BRANCH1_POOL, torch.float32, "cpu")]
    gradients = [
        torch.autograd.grad(run("branch1 pool", *inputs, impl=impl).sum(), inputs) for impl in ("auto", "reference")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it has no gradients, and an input asks for one"):
        run("branch1 pool", *inputs, impl="triton")


def test_reference_is_differentiable():
    shape = (1, 2, 4, 2, 6, 3, 4, 4, 4, "branch1 pool time_pool")
    inputs = [tensor.double().requires_grad_() for tensor in make_inputs(shape, torch.float32, "cpu")]
    assert torch.autograd.gradcheck(partial(run, shape[-1]), inputs, fast_mode=True)


X, S = torch.zeros(1, 2, 8, 4, 5, 5), torch.zeros(2, 2)
A = (torch.zeros(2, 2, 8, 3), S, S)
B = (torch.zeros(2, 2, 2, 1), S, S)
C = (torch.zeros(2, 8, 2, 1), torch.zeros(2, 8), torch.zeros(2, 8))
WIDE = [tuple(torch.zeros(2, *size) for size in sizes) for sizes in (
    ((600, 8, 1), (600,), (600,)), ((600, 600, 1), (600,), (600,)), ((8, 600, 1), (8,), (8,)))]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[B, V, C, T, H, W\].*got \[2, 8, 4, 5, 5\]"),
        ({"x": X[:, :, :, :0]}, ValueError, r"all but B at least 1, got \[1, 2, 8, 0, 5, 5\]"),
        ({"x": X.int()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"x": X[:, :1]}, ValueError, r"a's weight must be .* = \[1, C_out, 8, k\] to fit x, got \[2, 2, 8, 3\]"),
        ({"a": (A[0][..., :2], S, S)}, ValueError, r"a's weight must have .* k in 1, 3, 5, got \[2, 2, 8, 2\]"),
        ({"b": (A[0][:, :, :2], S, S)}, ValueError, r"b's weight must have k = 1, got \[2, 2, 2, 3\]"),
        (
            {"b": (B[0][:, :1], S, S)},
            ValueError,
            r"b's weight must be .* = \[2, 2, 2, k\] to fit x, got \[2, 1, 2, 1\]",
        ),
        ({"c": (C[0], S, C[2])}, ValueError, r"c's scale must be \[V, C_out\] = \[2, 8\], got \[2, 2\]"),
        ({"a": (A[0].half(), S, S)}, TypeError, "a's weight must have x's dtype, torch.float32, got torch.float16"),
        ({"a": (A[0], S.double(), S)}, TypeError, "a's scale must be torch.float32 for x of torch.float32"),
        ({"c": (C[0].to("meta"), *C[1:])}, ValueError, "c's weight must have x's device, cpu, got meta"),
        ({"b": (B[0], S)}, ValueError, r"b must be \(weight, scale, shift\), got 2 values"),
        ({"c": B}, ValueError, "branch1 must be given .* got 8, 2, pool=False"),
        ({"pool": True}, ValueError, "branch1 must be given with a pool"),
        (
            {"x": X[..., :1], "branch1": (torch.zeros(2, 8, 8, 1), *C[1:]), "pool": True},
            ValueError,
            "H and W of at least 2",
        ),
        ({"x": X[:, :, :, :1], "time_pool": True}, ValueError, "T of at least 2 for a pool over time"),
        (
            dict(zip("abc", WIDE, strict=True)) | {"impl": "triton"},
            RuntimeError,
            "a must have at most 512 inner channels, got 600",
        ),
        ({"impl": "hip"}, ValueError, "impl must be one of auto, reference, cpu, triton, cuda, got 'hip'"),
        ({"x": X.half()}, TypeError, "a's weight must have x's dtype"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        temporal_bottleneck(**{"x": X, "a": A, "b": B, "c": C} | arguments)
