"""sdr.fast.SDRModel against sdr.SDRModel: same weights, same output, whatever happens to the weights in between."""

import copy
import logging
import pickle
import threading
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from compare import ulp
from models import CONFIGS, random_model, random_views
from torch import nn

import sdr
from sdr import SDRLoss
from sdr.fast import SDRModel, accelerate
from sdr.packing import PackedModel
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD
from sdr_kernels import _ops


@torch.no_grad()
def assert_equals_reference(fast, model, views, dtype=torch.float32) -> None:
    """Every output errs against the float64 reference at most twice what the reference errs in ``dtype``, and four ulp.

    In root mean square, since a logit is one number and the largest of a few errors is chance.
    """
    wide = views.double()
    if views.dtype == torch.uint8:
        mean, std = (torch.tensor(x, device=wide.device).double() for x in (IMAGENET_MEAN, IMAGENET_STD))
        wide = (wide / 255 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    exact = copy.deepcopy(model).double()(wide)
    plain = copy.deepcopy(model).to(dtype)(views if views.dtype == torch.uint8 else views.to(dtype))
    for name, value, ours, truth in zip(exact._fields, fast(views), plain, exact, strict=True):
        assert value.shape == truth.shape, name
        assert value.dtype == ours.dtype, name
        if truth.numel():
            error, allowed = ((x.double() - truth).square().mean().sqrt() for x in (value, ours))
            limit = 2 * allowed + 4 * ulp(truth.square().mean().sqrt(), dtype)
            assert error <= limit, f"{name}: error {error:.3e}, limit {limit:.3e}"


@pytest.fixture
def use_kernels(monkeypatch):
    """Let "auto" choose Triton for CPU tensors under the interpreter, as it does for CUDA tensors."""
    choose = _ops.select_impl

    def select(impl, x, **options):
        return choose("triton" if impl == "auto" and _ops.interpreted() else impl, x, **options)

    for op in ("temporal_stem", "temporal_bottleneck", "spatial_mean", "norm_linear", "token_attention"):
        monkeypatch.setattr(import_module(f"sdr_kernels.{op}"), "select_impl", select)


@pytest.mark.parametrize("per_branch", [True, False], ids=["view a branch", "one clip"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_reference(name, per_branch, device):
    model = random_model(CONFIGS[name], device)
    views = random_views(model.config, per_branch=per_branch, device=device)
    assert_equals_reference(SDRModel.from_reference(model), model, views)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "ftcn_released", "shared", "sum of three"])
def test_kernels_equal_reference(name, device, use_kernels):
    config = replace(CONFIGS[name], num_frames=2, num_branches=2)
    model = random_model(config, device)
    assert_equals_reference(SDRModel.from_reference(model), model, random_views(config, batch=3, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    model = random_model(CONFIGS["ftcn_released"], device)
    fast = SDRModel.from_reference(model).to(dtype)
    assert_equals_reference(fast, copy.deepcopy(model).to(dtype), random_views(model.config, device=device), dtype)


def test_autocast_runs_in_its_dtype(device):
    model = random_model(CONFIGS["ftcn_released"], device)
    views = random_views(model.config, device=device)

    def run(x):
        with torch.autocast(device.type, torch.bfloat16):
            return fast(x)

    fast = SDRModel.from_reference(model)
    assert_equals_reference(run, model, views, torch.bfloat16)
    with torch.inference_mode():
        assert fast(views).tokens.dtype == torch.float32


def test_uint8_is_normalised_like_the_reference(device):
    model = random_model(CONFIGS["ftcn_released"], device)
    shape = (8, 3, model.config.num_frames, model.config.image_size, model.config.image_size)
    assert_equals_reference(SDRModel.from_reference(model), model, torch.randint(0, 256, shape).byte().to(device))


@pytest.mark.parametrize("width", [32, 64], ids=["projected", "as wide as the branch"])
def test_accelerate_ftcn(width, device):
    config = replace(CONFIGS["ftcn_released"].branch(), width=4, embed_dim=width)
    model = sdr.FTCN(config).eval().to(device)
    views = random_views(CONFIGS["ftcn_released"], per_branch=False, device=device)
    with torch.inference_mode():
        torch.testing.assert_close(accelerate(model)(views).logits, model(views).logits)


def test_accelerate_keeps_a_fast_model():
    fast = SDRModel(CONFIGS["tiny"])
    assert accelerate(fast) is fast


def test_no_clips(device):
    model = SDRModel(CONFIGS["tiny"]).eval().to(device)
    with torch.inference_mode():
        output = model(random_views(model.config, batch=0, device=device))
    assert [tuple(value.shape) for value in output] == [(0,), (0, 2, 64), (0, 4, 64), (0, 2), (0, 4, 2)]


def test_state_dict_goes_both_ways():
    reference = random_model(CONFIGS["paper"])
    fast = SDRModel(CONFIGS["paper"])
    assert list(fast.state_dict()) == list(reference.state_dict())
    fast.load_state_dict(reference.state_dict())
    back = sdr.SDRModel(CONFIGS["paper"])
    back.load_state_dict(fast.state_dict())
    for (name, tensor), *others in zip(*(m.state_dict().items() for m in (reference, fast, back)), strict=True):
        assert [other == name and torch.equal(value, tensor) for other, value in others] == [True, True], name


def test_from_reference_copies():
    reference = random_model(CONFIGS["tiny"])
    fast = SDRModel.from_reference(reference.double())
    assert not fast.training
    assert fast.trfi.joint_head.weight.dtype == torch.float64
    with torch.no_grad():
        fast.trfi.joint_head.weight.zero_()
    assert reference.trfi.joint_head.weight.abs().sum() > 0


def bn_of(model):
    return model.branches[1].res3[0].b_bn


def replace_parameter(model, other):
    norm = bn_of(model)
    norm.weight = nn.Parameter(-norm.weight)


CHANGES = {
    "a parameter": lambda model, other: bn_of(model).weight.mul_(-1),
    "a buffer": lambda model, other: bn_of(model).running_var.mul_(3),
    "another parameter": replace_parameter,
    "another module": lambda model, other: setattr(model.branches[1], "res3", other.branches[1].res3),
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "load_state_dict(assign)": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "branches (assign)": lambda model, other: model.branches.load_state_dict(other.branches.state_dict(), assign=True),
    "to(dtype) and back": lambda model, other: model.to(torch.bfloat16).to(torch.float32),
    "a branch's to(dtype) and back": lambda model, other: model.branches.to(torch.bfloat16).to(torch.float32),
    "through .data, then refresh": lambda model, other: (bn_of(model).weight.data.mul_(-1), model.refresh()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_follow_a_change(change, device):
    model = random_model(CONFIGS["tiny"], device)
    fast = SDRModel.from_reference(model)
    views = random_views(model.config, batch=4, device=device)  # few enough for a CUDA graph
    with torch.no_grad():
        before = fast(views).tokens
        CHANGES[change](fast, random_model(CONFIGS["tiny"], device))
        assert not torch.equal(fast(views).tokens, before)
    model.load_state_dict(fast.state_dict())
    assert_equals_reference(fast, model, views)


def test_functional_call_uses_its_own_weights(device):
    model, other = (random_model(CONFIGS["tiny"], device) for _ in range(2))
    fast = SDRModel.from_reference(model)
    views = random_views(model.config, batch=4, device=device)
    with torch.inference_mode():
        fast(views)
        replaced = torch.func.functional_call(fast, other.state_dict(), (views,)).tokens
        torch.testing.assert_close(replaced, other(views).tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast(views).tokens, model(views).tokens, rtol=1e-4, atol=1e-4)


def test_a_part_in_training_runs_the_reference(device):
    model = random_model(CONFIGS["tiny"], device)
    fast = SDRModel.from_reference(model)
    views = random_views(model.config, batch=4, device=device)
    with torch.inference_mode():
        fast(views)
        for m in (fast, model):
            m.branches[0].train()
        assert torch.equal(fast(views).tokens, model(views).tokens)


def test_packed_weights_follow_training():
    fast = SDRModel.from_reference(random_model(CONFIGS["tiny"])).train()
    views, labels = random_views(fast.config), torch.tensor([0, 1] * 4)
    optimiser = torch.optim.Adam(fast.parameters(), 0.01)
    for _ in range(2):
        fast.eval()
        with torch.inference_mode():
            fast(views)
        fast.train()
        SDRLoss()(fast(views), labels).total.backward()
        optimiser.step()
    with torch.inference_mode():
        fast.eval()(views)
    with torch.no_grad():
        fast.train()(views)  # moves the running statistics alone
    model = sdr.SDRModel(fast.config).eval()
    model.load_state_dict(fast.state_dict())
    assert_equals_reference(fast.eval(), model, views)


def test_training_on_a_cpu_is_the_reference(caplog):
    model = random_model(CONFIGS["tiny"])
    fast = SDRModel.from_reference(model)
    views, labels = random_views(model.config), torch.tensor([0, 1] * 4)
    torch.manual_seed(1)
    SDRLoss()(model.train()(views), labels).total.backward()
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO, "sdr.fast"):
        for _ in range(2):
            fast.zero_grad()
            torch.manual_seed(1)
            SDRLoss()(fast.train()(views), labels).total.backward()
    assert [record.message for record in caplog.records] == [
        "plain PyTorch runs the branches: on a CPU they take less time in training, and impl='cpu' less memory"
    ]
    for (name, ours), theirs in zip(fast.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_gradient_in_evaluation_is_the_reference_and_said_once(caplog):
    model = random_model(CONFIGS["tiny"])
    fast = SDRModel.from_reference(model)
    views = random_views(model.config, batch=1).requires_grad_()
    gradients = [torch.autograd.grad(m(views).logits.sum(), views)[0] for m in (model, fast, fast)]
    assert torch.equal(gradients[0], gradients[1])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "use torch.inference_mode()" in caplog.text


def test_looking_sideways_is_the_reference_and_said_once(caplog):
    model = random_model(replace(CONFIGS["tiny"], spatial_kernel=3))
    fast = SDRModel.from_reference(model)
    views = random_views(model.config, batch=2)
    with caplog.at_level(logging.INFO, "sdr.fast"), torch.inference_mode():
        for _ in range(2):
            assert torch.equal(fast(views).logits, model(views).logits)
    assert [record.message for record in caplog.records] == [
        "plain PyTorch runs the branches: the kernels are for spatial_kernel 1"
    ]
    with pytest.raises(ValueError, match="spatial_kernel must be 1 for the kernels, got 3"):
        PackedModel(model, torch.float32)


def test_accelerate_a_plain_resnet():
    model = sdr.FTCN(replace(CONFIGS["tiny"], spatial_kernel=3).branch()).eval()
    views = random_views(CONFIGS["tiny"], per_branch=False)
    with torch.inference_mode():
        torch.testing.assert_close(accelerate(model)(views).logits, model(views).logits)


def test_copies_and_pickles_start_afresh():
    fast = SDRModel.from_reference(random_model(CONFIGS["tiny"]))
    views = random_views(fast.config)
    with torch.inference_mode():
        expected = fast(views).tokens
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(other(views).tokens, expected)  # BLAS rounds by the weights' alignment
            assert other._runtime is not fast._runtime


def test_output_can_be_used_outside_inference_mode():
    fast = SDRModel.from_reference(random_model(CONFIGS["tiny"]))
    with torch.no_grad():
        features = fast(random_views(fast.config)).features
    head = nn.Linear(features.shape[-1], 1)
    head(features).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_two_threads_give_the_result_of_one():
    model = random_model(CONFIGS["paper"])
    fast = SDRModel.from_reference(model)
    views = random_views(model.config, batch=2)
    with torch.inference_mode():
        expected = fast(views)
        torch.set_num_threads(2)
        results = [fast(views) for _ in range(3)]
    assert torch.get_num_threads() == 2
    for result in results:
        for value, one in zip(result, expected, strict=True):
            torch.testing.assert_close(value, one)


def test_threads_share_a_model(device):
    fast = SDRModel.from_reference(random_model(CONFIGS["tiny"], device))
    inputs = [random_views(fast.config, batch=1 + i % 2, device=device) for i in range(8)]
    with torch.inference_mode():
        expected = [fast(views).tokens for views in inputs]
    fast.refresh()
    results = [None] * 8

    def run(i):
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(5):
                results[i] = fast(inputs[i]).tokens
        if stream is not None:
            stream.synchronize()

    if device.type == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth)


def test_inputs_are_not_modified(device):
    fast = SDRModel.from_reference(random_model(CONFIGS["tiny"], device))
    views = random_views(fast.config, device=device)
    before = views.clone()
    with torch.inference_mode():
        fast(views)
    assert torch.equal(views, before)


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        (torch.zeros(1, 3, 3, 4, 16, 16), ValueError, "views must have 4 views, got"),
        (torch.zeros(1, 4, 3, 0, 16, 16), ValueError, "clip must end in"),
        (torch.zeros(3, 4, 16, 16), ValueError, "5 axes"),
        (torch.zeros(1, 3, 4, 16, 16, dtype=torch.int32), TypeError, "clip must be uint8 or floating"),
    ],
)
def test_rejects_what_the_reference_rejects(views, error, message):
    fast = SDRModel(CONFIGS["tiny"]).eval()
    with pytest.raises(error, match=message), torch.inference_mode():
        fast(views)


def test_shapes_without_data():
    with torch.device("meta"), torch.inference_mode():
        fast = SDRModel(CONFIGS["tiny"]).eval()
        assert fast(torch.empty(2, 4, 3, 4, 16, 16)).logits.shape == (2,)
