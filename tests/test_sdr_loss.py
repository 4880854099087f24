"""sdr_loss against float64, its own parts, edges and processes, and what it must refuse."""

from functools import partial
from itertools import product

import pytest
import torch
from compare import assert_matches_reference
from torch._dynamo.testing import CompileCounter

from sdr_kernels import LossOptions, info_nce, leave_one_out_kl, sdr_loss
from sdr_kernels.sdr_loss import sdr_loss_reference

# B, V, D: one row, one view, the paper's batch, as many rows as fit, more, and widths on and off the tiles
SHAPES = [(1, 1, 5), (1, 4, 3), (5, 1, 16), (4, 4, 70), (16, 4, 129), (9, 7, 20), (64, 1, 8), (33, 4, 6)]
OPTIONS = [
    LossOptions(anchors=a, detach_joint=d, direction=k, objective=o)
    for a, d, k, o in product(
        ("all", "real"), (True, False), ("joint_to_loo", "loo_to_joint"), ("shared", "complementary")
    )
]

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow).* encountered:RuntimeWarning")


def make_inputs(shape, dtype, device, K=2):
    B, V, D = shape
    W = V if V > 1 else 0
    x, z, joint, loo = (
        (2 * torch.randn(s, device=device)).to(dtype).requires_grad_() for s in ((B, V, D), (B,), (B, K), (B, W, K))
    )
    return x, torch.randint(2, (B,), device=device), z, joint, loo


def assert_right(inputs, options=LossOptions()):  # noqa: B008 - it is immutable
    ours = partial(sdr_loss, options=options, impl="triton")
    assert_matches_reference(ours, partial(sdr_loss_reference, options=options), inputs)


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    assert_right(make_inputs(shape, dtype, device))


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_reading(options, views, dtype, device):
    assert_right(make_inputs((6, views, 10), dtype, device), options)


def test_temperatures(dtype, device):
    assert_right(make_inputs((6, 3, 10), dtype, device), LossOptions(temperature=0.5, mi_temperature=3.0))


def test_more_classes(dtype, device):
    assert_right(make_inputs((6, 3, 10), dtype, device, K=5))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_parts_are_the_other_ops(impl, device):
    x, labels, z, joint, loo = make_inputs((8, 4, 12), torch.float32, device)
    ce, mi, contrastive, aux = sdr_loss(x, labels, z, joint, loo, impl=impl)
    torch.testing.assert_close(ce, torch.nn.functional.binary_cross_entropy_with_logits(z, labels.float()))
    torch.testing.assert_close(mi, leave_one_out_kl(joint, loo, impl=impl))
    torch.testing.assert_close(contrastive, info_nce(x.flatten(0, 1), labels.repeat_interleave(4)))
    heads = torch.cat([joint[:, None], loo], 1).flatten(0, 1)
    torch.testing.assert_close(aux, torch.nn.functional.cross_entropy(heads, labels.repeat_interleave(5)))


def test_dtypes_may_differ(device):
    x, labels, z, joint, loo = make_inputs((4, 2, 6), torch.float32, device)
    inputs = [x.detach().half().requires_grad_(), labels, z, joint, loo]
    parts = sdr_loss(*inputs, impl="triton")
    gradients = torch.autograd.grad(parts.sum(), [t for t in inputs if t.requires_grad])
    assert [g.dtype for g in gradients] == [torch.float16] + [torch.float32] * 3
    torch.testing.assert_close(parts, sdr_loss_reference(*inputs))


@pytest.mark.parametrize("labels_dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_type(labels_dtype, device):
    x, labels, *rest = make_inputs((5, 2, 6), torch.float32, device)
    values = [sdr_loss(x, y, *rest, impl="triton") for y in (labels, labels.to(labels_dtype))]
    assert torch.equal(*values)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 20.0, 1e4])
def test_logits_of_any_size_are_finite(magnitude, label, device):
    B = 4
    x = torch.ones(B, 2, 3, device=device).requires_grad_()
    z, joint = (torch.randn(s, device=device).sign() * magnitude for s in ((B,), (B, 2)))
    loo = (torch.randn(B, 2, 2, device=device).sign() * magnitude).requires_grad_()
    labels = torch.full((B,), label, device=device)
    assert_right([x, labels, z.requires_grad_(), joint.requires_grad_(), loo], LossOptions(detach_joint=False))


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_an_infinite_logit_gives_what_torch_gives(value, label, device):
    logits = torch.tensor([0.3, value, -1.2], device=device)
    labels = torch.full((3,), label, device=device)
    heads = torch.zeros(3, 2, device=device), torch.zeros(3, 1, 2, device=device)
    ours, exact = (
        sdr_loss(torch.ones(3, 1, 4, device=device), labels, logits, *heads, impl=i) for i in ("triton", "reference")
    )
    assert torch.equal(ours[0].nan_to_num(1.0, 2.0, 3.0), exact[0].nan_to_num(1.0, 2.0, 3.0))


@pytest.mark.promise(row="odd inputs")
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's, of numpy
@pytest.mark.parametrize("D", [4, 63])  # of one program, and of several
def test_the_gradient_of_an_infinite_feature_that_meets_no_other_is_nan(D, device):
    features = torch.ones(1, 1, D, device=device).index_fill_(-1, torch.tensor(2, device=device), float("inf"))
    logits, *heads = (torch.zeros(shape, device=device) for shape in ((1,), (1, 2), (1, 1, 2)))
    parts = sdr_loss(features.requires_grad_(), logits.long(), logits, *heads, impl="triton")
    assert torch.autograd.grad(parts.sum(), features)[0].isnan().all()


@pytest.mark.parametrize("edge", ["zero vectors", "identical", "one zero vector"])
def test_features_without_a_direction(edge, dtype, device):
    x, labels, *rest = make_inputs((4, 3, 6), dtype, device)
    x = {"zero vectors": 0 * x, "identical": torch.ones_like(x), "one zero vector": x}[edge].detach()
    if edge == "one zero vector":
        x[1, 2] = 0
    assert_right([x.requires_grad_(), labels, *rest])
    assert torch.autograd.grad(sdr_loss(x, labels, *rest, impl="triton")[2], x)[0].isfinite().all()


@pytest.mark.promise(row="odd inputs")
def test_strided_inputs(dtype, device):
    x, labels, z, joint, loo = (t.detach() for t in make_inputs((8, 3, 12), dtype, device))
    strided = [x[::2, :, ::2], z[::2], joint[::2], loo.transpose(0, 1).contiguous().transpose(0, 1)[::2]]
    x, z, joint, loo = (t.requires_grad_() for t in strided)
    assert_right([x, labels[::2], z, joint, loo])


def test_unit_gradients_are_scaled_by_part(device):
    """What backward does with the gradients of weight 1, against autograd through the reference."""
    inputs = make_inputs((6, 4, 10), torch.float32, device)
    weights = torch.tensor([0.3, -2.0, 5.0, 0.0], device=device)
    leaves = [t for t in inputs if t.requires_grad]
    options = LossOptions(detach_joint=False)
    ours, reference = (
        torch.autograd.grad((f(*inputs, options) * weights).sum(), leaves)
        for f in (partial(sdr_loss, impl="triton"), sdr_loss_reference)
    )
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autocast_does_not_reach_in(impl, device):
    inputs = make_inputs((6, 4, 10), torch.float32, device)
    leaves = [t for t in inputs if t.requires_grad]
    outside = sdr_loss(*inputs, impl=impl)
    expected = torch.autograd.grad(outside.sum(), leaves, allow_unused=True)
    with torch.autocast(device.type, torch.bfloat16):
        inside = sdr_loss(*inputs, impl=impl)
    gradients = torch.autograd.grad(inside.sum(), leaves, allow_unused=True)
    assert torch.equal(inside, outside)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_gradient_of_a_gradient_is_refused(device):
    x, labels, *rest = make_inputs((4, 3, 6), torch.float32, device)
    with pytest.raises(RuntimeError, match="a kernel's gradient has no derivative"):
        torch.autograd.grad(sdr_loss(x, labels, *rest, impl="triton").sum(), x, create_graph=True)


@pytest.mark.promise(row="repeatable")
def test_repeats_are_bit_equal(dtype, device):
    inputs = [t.detach() for t in make_inputs((16, 4, 70), dtype, device)]
    op = torch.ops.sdr_kernels.sdr_loss_fwd
    first, *others = (op(*inputs, *LossOptions().arguments, "triton") for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.promise(row="registered right")
def test_registration(dtype, device):
    for shape in (SHAPES[0], (3, 4, 6)):
        inputs = [t.detach() for t in make_inputs(shape, dtype, device)]
        op = torch.ops.sdr_kernels.sdr_loss_fwd.default
        torch.library.opcheck(op, (*inputs, *LossOptions().arguments, "triton"))


@pytest.mark.promise(row="registered right")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
def test_compiles_whole(device):
    x, labels, *rest = make_inputs((4, 3, 6), torch.float32, device)
    function = partial(sdr_loss, impl="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, labels, *rest).sum(), [x, *rest]) for f in (function, compiled)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
def test_batches_of_any_size_share_a_compilation():
    counter = CompileCounter()
    compiled = torch.compile(sdr_loss, fullgraph=True, backend=counter)
    for B in range(5, 12):
        compiled(*make_inputs((B, 3, 4), torch.float32, "cpu"))
    assert counter.frame_count <= 2


def test_a_step_of_training_has_the_same_numbers(device):
    """32 steps of gradient descent on all inputs: the losses of kernels and reference stay together."""

    def losses(impl):
        torch.manual_seed(0)
        x, labels, *rest = make_inputs((8, 4, 16), torch.float32, device)
        optimiser = torch.optim.Adam([x, *rest], lr=0.05)
        values = []
        for _ in range(32):
            loss = sdr_loss(x, labels, *rest, impl=impl).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        return values

    assert losses("triton") == pytest.approx(losses("reference"), rel=1e-5)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (3,), r"features must be \[B, V, D\].*got \[3\]"),
        (0, (3, 4), r"features must be \[B, V, D\].*got \[3, 4\]"),
        (0, (3, 0, 4), r"features must be \[B, V, D\] with none 0, got \[3, 0, 4\]"),
        (1, (4,), r"labels must be \[3\] to fit features, got \[4\]"),
        (2, (3, 1), r"logits must be \[B\] = \[3\] to fit features, got \[3, 1\]"),
        (3, (3, 1), r"loo_logits must be \[B, V, K\] = \[3, V, 1\]"),
        (4, (2, 2, 2), r"loo_logits must be \[B, V, K\] = \[3, V, 2\]"),
    ],
)
def test_rejects_shape(index, shape, message):
    inputs = [t.detach() for t in make_inputs((3, 2, 4), torch.float32, "cpu")]
    inputs[index] = torch.zeros(shape, dtype=inputs[index].dtype)
    with pytest.raises(ValueError, match=message):
        sdr_loss(*inputs)


def test_rejects_one_class():
    inputs = [t.detach() for t in make_inputs((3, 2, 4), torch.float32, "cpu", K=1)]
    with pytest.raises(ValueError, match=r"joint_logits must be \[B, K\] = \[3, K\], K of at least 2, got \[3, 1\]"):
        sdr_loss(*inputs)


@pytest.mark.parametrize("label", [-1, 2])
def test_rejects_labels_that_are_neither(label):
    x, labels, *rest = make_inputs((3, 2, 4), torch.float32, "cpu")
    labels[1] = label
    with pytest.raises(ValueError, match=rf"labels must be 0 \(real\) or 1 \(fake\), got {label}"):
        sdr_loss(x, labels, *rest)


def test_rejects_what_kernels_do_not_take(device):
    with pytest.raises(RuntimeError, match="must not be float64"):
        sdr_loss(*make_inputs((3, 2, 4), torch.float64, device), impl="triton")
    with pytest.raises(RuntimeError, match="at most 16 classes, got 17"):
        sdr_loss(*make_inputs((3, 2, 4), torch.float32, device, K=17), impl="triton")
    with pytest.raises(RuntimeError, match=r"at most 128 rows, B \* V, got 130"):
        sdr_loss(*make_inputs((65, 2, 4), torch.float32, device), impl="cuda")
