"""leave_one_out_kl against float64, closed forms and edges, and what it must refuse."""

from functools import partial
from itertools import product

import pytest
import torch
from compare import assert_matches_reference

from sdr_kernels import leave_one_out_kl
from sdr_kernels.leave_one_out_kl import DIRECTIONS, OBJECTIVES, leave_one_out_kl_reference

SHAPES = [(1, 1, 2), (3, 4, 2), (32, 2, 3), (33, 1, 16), (70, 8, 2), (4, 3, 1), (5, 2, 9)]  # B, V, K
READINGS = list(product((True, False), DIRECTIONS, OBJECTIVES))
NAMES = ("detach_joint", "direction", "objective")


def make_inputs(shape, dtype, device, detach=False, scale=1.0):
    B, V, K = shape
    joint, loo = (scale * torch.randn(s, device=device) for s in ((B, K), (B, V, K)))
    return joint.to(dtype).requires_grad_(not detach), loo.to(dtype).requires_grad_()


def assert_right(inputs, **options):
    ours = partial(leave_one_out_kl, impl="triton", **options)
    assert_matches_reference(ours, partial(leave_one_out_kl_reference, **options), inputs)


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, reading, dtype, device):
    assert_right(make_inputs(shape, dtype, device, reading[0]), **dict(zip(NAMES, reading, strict=True)))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_any_temperature(temperature, dtype, device):
    assert_right(make_inputs((6, 4, 2), dtype, device, detach=True), temperature=temperature)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_huge_logits_are_finite(direction, device):
    joint = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0, 0]], device=device).requires_grad_()
    loo = torch.stack([-joint.detach(), joint.detach()], 1).requires_grad_()
    assert_right([joint, loo], detach_joint=False, direction=direction)
    value = leave_one_out_kl(joint, loo, impl="triton", detach_joint=False, direction=direction)
    assert value.item() == pytest.approx(2 * 2e4 / 1.5 / 3)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equal_logits_have_no_divergence(impl, dtype, device):
    joint = torch.randn(9, 2, device=device, dtype=dtype).requires_grad_()
    value = leave_one_out_kl(joint, joint[:, None].repeat(1, 4, 1), detach_joint=False, impl=impl)
    assert value.item() == 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_view_left_out_is_zero(objective, impl, device):
    joint, loo = torch.randn(3, 2, device=device), torch.zeros(3, 0, 2, device=device)
    assert leave_one_out_kl(joint, loo, objective=objective, impl=impl).item() == 0


@pytest.mark.promise(row="odd inputs")
def test_strided_logits(dtype, device):
    joint, loo = make_inputs((48, 4, 4), dtype, device, detach=True)
    assert_right([joint[::2, ::2], loo.detach()[::2, :, ::2].requires_grad_()])


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("part", ["joint", "loo"])
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")
def test_not_a_number_is_not_hidden(part, device):
    joint, loo = (x.detach() for x in make_inputs((3, 2, 2), torch.float32, device))
    (joint if part == "joint" else loo).view(-1)[1] = float("nan")
    assert leave_one_out_kl(joint, loo, impl="triton").isnan()


def test_reference_gradients():
    inputs = make_inputs((3, 2, 2), torch.float64, "cpu")
    for reading in READINGS[len(READINGS) // 2 :]:
        options = dict(zip(NAMES, reading, strict=True))
        assert torch.autograd.gradcheck(partial(leave_one_out_kl, impl="reference", **options), inputs)


@pytest.mark.promise(row="registered right")
def test_registration(dtype, device):
    joint, loo = (x.detach() for x in make_inputs((3, 2, 2), dtype, device))
    op = torch.ops.sdr_kernels.leave_one_out_kl_fwd.default
    torch.library.opcheck(op, (joint, loo, 1.5, True, True, False, "triton"))


@pytest.mark.promise(row="registered right")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
def test_compiles_whole(device):
    inputs = make_inputs((3, 2, 2), torch.float32, device)
    function = partial(leave_one_out_kl, impl="triton", detach_joint=False)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*inputs), inputs) for f in (function, compiled)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("joint", "loo", "message"),
    [
        ((3,), (3, 1, 2), r"joint_logits must be \[B, K\].*got \[3\]"),
        ((0, 2), (0, 1, 2), r"joint_logits must be \[B, K\] with neither 0, got \[0, 2\]"),
        ((3, 2), (3, 2), r"loo_logits must be \[B, V, K\] = \[3, V, 2\].*got \[3, 2\]"),
        ((3, 2), (3, 1, 3), r"loo_logits must be \[B, V, K\] = \[3, V, 2\].*got \[3, 1, 3\]"),
    ],
)
def test_rejects_shape(joint, loo, message):
    with pytest.raises(ValueError, match=message):
        leave_one_out_kl(torch.zeros(joint), torch.zeros(loo))


def test_rejects_dtype_and_device():
    joint = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"loo_logits must have joint_logits' dtype, torch.float32, got"):
        leave_one_out_kl(joint, torch.zeros(3, 1, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="loo_logits must have joint_logits' device, cpu, got meta"):
        leave_one_out_kl(joint, torch.zeros(3, 1, 2, device="meta"))


def test_more_classes_are_left_to_the_reference(device):
    joint, loo = make_inputs((3, 2, 17), torch.float32, device)
    assert torch.equal(leave_one_out_kl(joint, loo), leave_one_out_kl_reference(joint, loo))
    with pytest.raises(RuntimeError, match="joint_logits must have at most 16 classes, got 17"):
        leave_one_out_kl(joint, loo, impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_never_below_zero(impl, device):
    for _ in range(100):
        joint = torch.randn(1, 3, device=device)
        loo = joint[:, None] + 1e-4 * torch.randn(1, 1, 3, device=device)
        assert leave_one_out_kl(joint, loo, impl=impl) >= 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_detached_head_has_no_gradient_at_all(impl, device):
    joint, loo = make_inputs((3, 2, 2), torch.float32, device)
    leave_one_out_kl(joint, loo, impl=impl).backward()
    assert joint.grad is None


@pytest.mark.parametrize("options", [{"temperature": 0}, {"direction": "both"}, {"objective": "none"}], ids=str)
def test_rejects_options(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        leave_one_out_kl(torch.zeros(3, 2), torch.zeros(3, 1, 2), **options)
