"""info_nce against float64, another library's, closed forms and edges, over processes, and what it must refuse."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_matches_reference
from torch._dynamo.testing import CompileCounter

from sdr_kernels import _tiles, info_nce
from sdr_kernels._cpu import info_nce as cpu_info_nce
from sdr_kernels.info_nce import info_nce_reference

SHAPES = [(1, 3), (2, 5), (7, 16), (33, 2), (64, 40), (65, 129), (130, 33), (5, 257)]  # N, D: on and off the tiles
IMPLS = ["cpu", "triton"]

# numpy, which computes interpreted kernels, warns of what a GPU passes on in silence
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow).* encountered:RuntimeWarning")


@pytest.fixture(params=IMPLS)
def impl(request, device):
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("the CPU's own implementation takes CPU tensors")
    return request.param


def make_inputs(N, D, dtype, device, classes=2):
    features = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    return features, torch.randint(classes, (N,), device=device)


def assert_right(impl, features, labels, temperature=0.07, anchors="all"):
    options = {"temperature": temperature, "anchors": anchors}
    ours = partial(info_nce, impl=impl, **options)
    assert_matches_reference(ours, partial(info_nce_reference, **options), [features, labels])


@pytest.mark.promise(row="accurate")
@pytest.mark.parametrize("anchors", ["all", "real"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, temperature, anchors, impl, dtype, device):
    assert_right(impl, *make_inputs(*shape, dtype, device), temperature, anchors)


def test_many_classes(impl, dtype, device):
    assert_right(impl, *make_inputs(90, 24, dtype, device, classes=7))


@pytest.mark.parametrize("labels_dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(labels_dtype, impl, device):
    features, labels = make_inputs(20, 6, torch.float32, device)
    expected = info_nce(features, labels, anchors="real", impl=impl)
    assert torch.equal(info_nce(features, labels.to(labels_dtype), anchors="real", impl=impl), expected)


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def sliced(x):
    return x.repeat_interleave(2, 0)[::2]


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("layout", [misaligned, sliced, lambda x: x.mT.contiguous().mT])
def test_any_layout(layout, impl, dtype, device):
    features, labels = make_inputs(18, 20, dtype, device)
    assert_right(impl, layout(features.detach()).requires_grad_(), layout(labels[None])[0])


def edges():
    near = torch.ones(6, 4) + 1e-3 * torch.randn(6, 4)
    mixed = torch.randn(6, 4)
    mixed[2] = 0
    return {
        "identical": (torch.ones(6, 4), [0, 0, 1, 1, 0, 1]),
        "nearly identical": (near, [0, 0, 1, 1, 0, 1]),
        "opposite": (torch.tensor([[1.0], [-1.0], [1.0]]), [0, 0, 1]),
        "zero vectors": (torch.zeros(4, 3), [0, 0, 1, 1]),
        "one zero vector": (mixed, [0, 0, 1, 1, 0, 1]),
        "a single class": (torch.randn(5, 3), [1] * 5),
        "no positives": (torch.randn(2, 3), [0, 1]),
        "one row": (torch.randn(1, 3), [1]),
        "one anchor without a positive": (torch.randn(5, 3), [0, 0, 1, 0, 0]),
        "large": (torch.randn(6, 4) * 3e4, [0, 0, 1, 1, 0, 1]),
    }


@pytest.mark.parametrize("temperature", [0.01, 0.07])
@pytest.mark.parametrize("anchors", ["all", "real"])
@pytest.mark.parametrize("edge", edges())
def test_edges_are_finite_and_right(edge, anchors, temperature, impl, dtype, device):
    features, labels = edges()[edge]
    features, labels = features.to(device, dtype).requires_grad_(), torch.tensor(labels, device=device)
    loss = info_nce(features, labels, temperature=temperature, anchors=anchors, impl=impl)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[features.detach().norm(dim=1) == 0].any()
    if temperature == 0.07:
        assert_right(impl, features, labels, temperature, anchors)
    else:  # one rounding of a cosine near 1 decides which of two right answers is the nearer
        exact = info_nce_reference(features.double(), labels, temperature, anchors)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=2e-5)


def test_no_rows(impl, device):
    for name in (impl, "reference"):
        features = torch.zeros(0, 3, device=device).requires_grad_()
        loss = info_nce(features, torch.zeros(0, dtype=torch.long, device=device), impl=name)
        loss.backward()
        assert loss.item() == 0
        assert features.grad.shape == (0, 3)


def test_identical_rows_of_one_class_give_the_logarithm_of_the_rest(impl, device):
    rows, labels = torch.ones(40, 3, device=device), torch.zeros(40, dtype=torch.long, device=device)
    for name in (impl, "reference"):
        assert info_nce(rows, labels, impl=name).item() == pytest.approx(torch.tensor(39.0).log().item(), rel=1e-6)


def test_equals_another_librarys(impl, device):
    features, labels = make_inputs(48, 32, torch.float32, device)
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    expected = losses.SupConLoss(temperature=0.07)(features, labels)
    loss = info_nce(features, labels, impl=impl)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(x, features)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_float64_on_a_cpu():
    features, labels = make_inputs(20, 6, torch.float64, "cpu")
    values = [info_nce(features, labels, impl=impl) for impl in ("cpu", "reference")]
    torch.testing.assert_close(*values, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, features)[0] for v in values), rtol=1e-11, atol=1e-14)


def test_gradient_of_a_gradient_is_refused(impl, device):
    """Not left out in silence, where the gradient of the loss is a constant."""
    features, labels = make_inputs(6, 3, torch.float32, device)
    with pytest.raises(RuntimeError, match=r"a kernel's gradient has no derivative .*impl='reference' has it"):
        torch.autograd.grad(info_nce(features, labels, impl=impl), features, create_graph=True)


def test_reference_gradients():
    features, labels = make_inputs(6, 3, torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda x: info_nce(x, labels, impl="reference"), features)
    assert torch.autograd.gradgradcheck(lambda x: info_nce(x, labels, impl="reference"), features)


def test_tiles_of_rows_and_columns(monkeypatch):
    """The CPU's upper half, in tiles that do not divide the rows."""
    monkeypatch.setattr(cpu_info_nce, "TILE", 16)
    for dtype in (torch.float32, torch.bfloat16):
        assert_right("cpu", *make_inputs(75, 8, dtype, "cpu", classes=3))


def test_autocast_does_not_reach_in(impl, device):
    features, labels = make_inputs(20, 40, torch.float32, device)
    for name in (impl, "reference"):
        with torch.autocast(device.type, torch.bfloat16):
            inside = info_nce(features, labels, impl=name)
        gradient = torch.autograd.grad(inside, features)[0]
        outside = info_nce(features, labels, impl=name)
        assert torch.equal(inside, outside)
        assert torch.equal(gradient, torch.autograd.grad(outside, features)[0])


def test_scaled_loss_scales_the_gradient(impl, dtype, device):
    features, labels = make_inputs(10, 4, dtype, device)
    one, many = (torch.autograd.grad(s * info_nce(features, labels, impl=impl), features)[0] for s in (1, 1024))
    assert torch.equal(many, 1024 * one)


@pytest.mark.promise(row="repeatable")
def test_repeats_are_bit_equal(impl, dtype, device):
    features, labels = make_inputs(70, 20, dtype, device)
    losses = [info_nce(features, labels, impl=impl) for _ in range(3)]
    gradients = [torch.autograd.grad(loss, features)[0] for loss in losses]
    assert all(torch.equal(x, losses[0]) for x in losses)
    assert all(torch.equal(x, gradients[0]) for x in gradients)


@pytest.mark.promise(row="odd inputs")
@pytest.mark.parametrize("row", [0, 17])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_is_not_hidden(value, row, impl, dtype, device):
    features, labels = make_inputs(20, 4, dtype, device)
    features = features.detach()
    features[row, 1] = value
    assert info_nce(features, labels, impl=impl).isnan()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # numpy's
def test_rows_that_are_no_anchors_do_not_count(impl, device):
    """Whatever they hold: without a positive or an anchor the loss is 0."""
    features = torch.randn(3, 4, device=device)
    features[0, 1] = float("nan")
    for labels, anchors in ([0, 1, 2], "all"), ([1, 1, 1], "real"):
        for each in (impl, "reference"):
            assert info_nce(features, torch.tensor(labels, device=device), anchors=anchors, impl=each) == 0


@pytest.mark.promise(row="registered right")
def test_registration(impl, dtype, device):
    features, labels = make_inputs(9, 5, dtype, device)
    features = features.detach()
    forward, backward = torch.ops.sdr_kernels.info_nce_fwd.default, torch.ops.sdr_kernels.info_nce_bwd.default
    torch.library.opcheck(forward, (features, labels, 0.07, True, impl))
    _, rows = forward(features, labels, 0.07, True, impl)
    torch.library.opcheck(backward, (features, labels, rows, torch.ones((), device=device), 0.07, impl))


@pytest.mark.promise(row="registered right")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
def test_compiles_whole(impl, device):
    features, labels = make_inputs(9, 5, torch.float32, device)
    function = partial(info_nce, impl=impl)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    losses = function(features, labels), compiled(features, labels)
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, features)[0] for loss in losses))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
def test_batches_of_any_size_share_a_compilation():
    counter = CompileCounter()
    compiled = torch.compile(info_nce, fullgraph=True, backend=counter)
    for N in range(5, 12):
        compiled(*make_inputs(N, 3, torch.float32, "cpu"))
    assert counter.frame_count <= 2


@pytest.mark.promise(row="registered right")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_a_dynamic_size(strict):
    class Loss(torch.nn.Module):
        def forward(self, features, labels):
            return info_nce(features, labels)

    features, labels = (x.detach() for x in make_inputs(9, 3, torch.float32, "cpu"))
    N = torch.export.Dim("N", min=2)
    exported = torch.export.export(Loss(), (features, labels), dynamic_shapes=({0: N}, {0: N}), strict=strict)
    features, labels = (x.detach() for x in make_inputs(23, 3, torch.float32, "cpu"))
    torch.testing.assert_close(exported.module()(features, labels), info_nce(features, labels))


def test_float32_walks_take_one_tile():
    """Or an inner product would round otherwise in the backward than in the sum that it is divided by."""
    for arch in ("sm_80", "sm_90"):
        forward, backward = (_tiles.tiles_of(f"info_nce_{walk} float32", arch) for walk in ("fwd", "bwd"))
        for walks in zip(forward, backward, strict=True):
            assert len({tuple(walk[axis] for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K")) for walk in walks}) == 1


def gather(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    features, labels = (x[rank] for x in halves())
    features = features.clone().requires_grad_()
    loss = info_nce(features, labels.to(torch.int16), group=dist.group.WORLD)
    loss.backward()
    results[rank] = loss.item(), features.grad.tolist()
    dist.destroy_process_group()


def halves():
    g = torch.Generator().manual_seed(3)
    features = torch.randn(8, 5, generator=g)
    return features.chunk(2), torch.tensor([0, 1, 1, 0, 1, 0, 1, 1]).chunk(2)


def test_processes_join_their_rows(tmp_path):
    features, labels = (torch.cat(x) for x in halves())
    features.requires_grad_()
    loss = info_nce(features, labels)
    loss.backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(gather, (tmp_path / "rendezvous", results), nprocs=2)
        values, gradients = zip(*(results[rank] for rank in range(2)), strict=True)
    assert values == pytest.approx([loss.item()] * 2, rel=1e-6)
    # two losses ask of every row: DDP's mean over the ranks makes them one
    torch.testing.assert_close(torch.tensor(gradients).flatten(0, 1), 2 * features.grad)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (3, 0)], ids=str)
def test_rejects_features(shape):
    with pytest.raises(ValueError, match=r"features must be .*got \["):
        info_nce(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))


def test_rejects_labels():
    with pytest.raises(ValueError, match=r"labels must be \[3\] to fit features, got \[2\]"):
        info_nce(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float32"):
        info_nce(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="labels must be on features' device, cpu, got meta"):
        info_nce(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("temperature", [0, -1.0, 1e-39, float("nan"), float("inf")])
def test_rejects_temperature(temperature):
    with pytest.raises(ValueError, match=r"^temperature must be at least 1e-06 and finite, got"):
        info_nce(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), temperature=temperature)


def test_rejects_options():
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^anchors must be one of all, real, got 'fake'"):
        info_nce(torch.zeros(3, 2), labels, anchors="fake")
    with pytest.raises(TypeError, match=r"^temperature must be a number, got '0\.1'"):
        info_nce(torch.zeros(3, 2), labels, temperature="0.1")


def test_rejects_dtype(device):
    labels = torch.zeros(3, dtype=torch.long, device=device)
    with pytest.raises(TypeError, match=r"features must be float32.*got torch.int64"):
        info_nce(labels[:, None], labels)
    with pytest.raises(RuntimeError, match="features must not be float64"):
        info_nce(torch.zeros(3, 2, dtype=torch.float64, device=device), labels, impl="triton")
