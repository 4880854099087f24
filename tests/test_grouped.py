"""Branches trained in one grouped pass: the gradients, statistics and loss curves of the plain model."""

import copy
from dataclasses import replace

import pytest
import torch
from compare import pools_may_vary
from models import CONFIGS, random_model, random_views
from torch import nn

import sdr
from sdr import SDRLoss
from sdr.config import GroupedConfig
from sdr.fast import SDRModel
from sdr.sync_norm import SyncBatchNorm3d

SCHEMES = ["gram", "fused"]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def fast_copy(model: sdr.SDRModel, **options) -> SDRModel:
    fast = SDRModel.from_reference(model)
    fast.grouped = GroupedConfig(**options)
    return fast


def gradients(model: nn.Module, views: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of SDR's loss in every parameter that has one."""
    labels = torch.arange(len(views), device=views.device) % 2
    model.zero_grad()
    SDRLoss()(model(views), labels).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Root mean square over all parameters, each in units of its own gradient."""
    norms = [((found[n].double() - t).norm() / t.norm().clamp(min=1e-12)).item() for n, t in truth.items()]
    return (sum(norm**2 for norm in norms) / len(norms)) ** 0.5


def error_ratio(config, scheme: str, impl: str, dtype: torch.dtype, device: torch.device) -> float:
    """Error of the grouped pass's gradients against float64, in units of eager's, of one draw."""
    model = without_dropout(random_model(config, device)).to(dtype).train()
    views = random_views(config, batch=3, device=device).to(dtype)
    found = gradients(fast_copy(model, scheme=scheme, impl=impl), views)
    with pools_may_vary():
        eager = gradients(model, views)
        exact = gradients(copy.deepcopy(model).double(), views.double())
    assert found.keys() == exact.keys()
    return error(found, exact) / error(eager, exact)


def check_median(draws: int, *case) -> None:
    """The median error of an odd number of draws is at most twice eager's; none is drawn once that is certain.

    A pool that is nearly tied sends a gradient elsewhere by chance, so one draw says little.
    """
    ratios = []
    while sum(ratio <= 2 for ratio in ratios) <= draws // 2:
        assert len(ratios) < draws, ratios
        ratios.append(error_ratio(*case))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("preset", ["paper", "ftcn_released"])
def test_gradients_err_like_eager(preset, scheme, impl, dtype, device):
    config, draws = CONFIGS[preset], 5
    if impl == "triton" and device.type == "cpu":  # interpreted
        draws = 1 if (preset, dtype) == ("paper", torch.float32) else 3
        config = replace(config, num_branches=2, num_frames=2, blocks=(1, 2, 1, 1))
    check_median(draws, config, scheme, impl, dtype, device)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("structure", ["tiny", "shared", "one branch"])
def test_gradients_of_other_structures_err_like_eager(structure, scheme, dtype, device):
    """The same kernels, called otherwise: interpreted they would take minutes, and show what the presets show."""
    check_median(5, CONFIGS[structure], scheme, "triton" if device.type == "cuda" else "cpu", dtype, device)


@pytest.mark.parametrize("preset", ["tiny", "shared"])
def test_running_statistics_follow_as_pytorchs(preset, impl, device):
    model = without_dropout(random_model(CONFIGS[preset], device)).train()
    fast = fast_copy(model, impl=impl)
    for _ in range(2):
        views = random_views(model.config, batch=1, device=device)
        with torch.no_grad():
            model(views)
            fast(views)
    for (name, ours), theirs in zip(fast.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_frozen_norms_keep_their_statistics(training, impl, device):
    """Norms in evaluation are frozen, whether the model trains or not; gradients are the plain model's."""
    model = without_dropout(random_model(CONFIGS["tiny"], device)).train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    fast = fast_copy(model, impl=impl)
    before = [buffer.clone() for buffer in fast.buffers()]
    views = random_views(model.config, batch=1, device=device)
    found = gradients(fast, views)
    with pools_may_vary():
        assert error(found, gradients(model, views)) < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, fast.buffers(), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_recomputation_changes_no_number(scheme, impl, device):
    model = without_dropout(random_model(replace(CONFIGS["tiny"], num_branches=1), device)).train()
    views = random_views(model.config, batch=1, device=device)
    plain = fast_copy(model, scheme=scheme, impl=impl)
    some = fast_copy(model, scheme=scheme, impl=impl, recompute=("stem", "res3"))
    every = fast_copy(model, scheme=scheme, impl=impl)
    for branch in every.branches:
        branch.recompute = True
    expected = gradients(plain, views)
    for fast in (some, every):
        found = gradients(fast, views)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert all(torch.equal(a, b) for a, b in zip(fast.buffers(), plain.buffers(), strict=True))


def saved_bytes(model: nn.Module, views: torch.Tensor) -> int:
    kept: dict[int, torch.Tensor] = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    sizes = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(views)
    return sum(sizes)


def test_less_is_kept_for_the_backward_pass():
    model = random_model(CONFIGS["tiny"]).train()
    views = random_views(model.config)
    plain, fused, gram = (
        saved_bytes(m, views) for m in (model, *(fast_copy(model, scheme=s, impl="cpu") for s in ("fused", "gram")))
    )
    assert gram < fused < plain / 2


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # what switching oneDNN off says
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_runs_convolutions_in_its_dtype(scheme):
    """As the trainer runs bfloat16: gradients are float32 and as near to float64 as those of the plain model."""
    ratios = []
    for _ in range(3):
        model = without_dropout(random_model(CONFIGS["tiny"])).train()
        views = random_views(model.config)
        exact = gradients(copy.deepcopy(model).double(), views.double())
        # oneDNN's bfloat16 gradient of a 3-D convolution's weight reads memory that nothing has written (torch 2.13)
        with torch.autocast("cpu", torch.bfloat16), torch.backends.mkldnn.flags(enabled=False):
            eager, found = (gradients(m, views) for m in (model, fast_copy(model, scheme=scheme, impl="cpu")))
        assert {value.dtype for value in found.values()} == {torch.float32}
        ratios.append(error(found, exact) / error(eager, exact))
    assert sorted(ratios)[1] <= 2, ratios


def test_uint8_and_one_clip_for_all_branches():
    model = without_dropout(random_model(CONFIGS["tiny"])).train()
    fast = fast_copy(model, impl="cpu")
    clips = (random_views(model.config, batch=2, per_branch=False) * 50 + 128).clamp(0, 255).to(torch.uint8)
    assert error(gradients(fast, clips), gradients(model, clips)) < 1e-4


def test_accumulated_gradients_add_up():
    model = without_dropout(random_model(CONFIGS["tiny"])).train()
    fast = fast_copy(model, impl="cpu")
    parts = [random_views(model.config, batch=2) for _ in range(2)]
    alone = [{n: g.clone() for n, g in gradients(copy.deepcopy(fast), views).items()} for views in parts]
    fast.zero_grad()
    for views in parts:
        SDRLoss()(fast(views), torch.tensor([0, 1])).total.backward()
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, alone[0][name] + alone[1][name])


def train(model: SDRModel, steps: int, *, switch: dict[int, GroupedConfig] | None = None) -> list[float]:
    """Losses of Adam on clips whose label is in how they change over time."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    device = next(model.parameters()).device
    config, losses = model.config, []
    for step in range(steps):
        if switch and step in switch:
            model.grouped = switch[step]
        labels = torch.arange(4) % 2
        shape = (4, config.num_branches, 3, config.num_frames, config.image_size, config.image_size)
        still = torch.randn(*shape[:3], 1, *shape[4:], generator=generator).expand(shape)
        flicker = torch.randn(shape, generator=generator) * labels.view(-1, 1, 1, 1, 1, 1)
        loss = SDRLoss()(model((still + 0.5 * flicker).to(device)), labels.to(device)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.promise(row="equal in training")
def test_switching_implementations_in_the_middle_changes_rounding_alone():
    model = without_dropout(random_model(CONFIGS["tiny"])).train()
    cpu, plain = GroupedConfig(impl="cpu"), GroupedConfig(impl="reference")
    expected = train(fast_copy(model, impl="reference"), 12)
    switched = train(fast_copy(model, impl="reference"), 12, switch={3: cpu, 6: plain, 9: cpu})
    assert switched[:3] == expected[:3]
    assert switched == pytest.approx(expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
def test_compiles_whole():
    model = without_dropout(random_model(CONFIGS["tiny"])).train()
    fast = fast_copy(model, impl="cpu")
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="aot_eager")
    views = random_views(model.config, batch=2)
    found = gradients(compiled, views)
    assert (
        error({name.removeprefix("_orig_mod."): value for name, value in found.items()}, gradients(fast, views)) < 1e-5
    )
    assert all(torch.equal(a, b) for a, b in zip(compiled.buffers(), fast.buffers(), strict=True))


def test_double_backward_is_refused():
    fast = fast_copy(random_model(CONFIGS["tiny"]).train(), impl="cpu")
    loss = fast(random_views(fast.config, batch=2)).logits.sum()
    with pytest.raises(RuntimeError, match="a kernel's gradient has no derivative"):
        torch.autograd.grad(loss, fast.branches[0].stem.conv.weight, create_graph=True)


class OtherNorm(nn.BatchNorm3d):
    pass


def one_in_evaluation(model: nn.Module) -> None:
    model.branches[0].stem.bn.eval()


def another_momentum(model: nn.Module) -> None:
    model.branches[1].res2[0].a_bn.momentum = 0.2


def another_norm(model: nn.Module) -> None:
    model.branches[1].res2[0].a_bn = OtherNorm(8)


def no_statistics(model: nn.Module) -> None:
    for branch in model.branches:
        branch.res2[0].a_bn = nn.BatchNorm3d(8, track_running_stats=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_in_evaluation, "some batch norms are in training and some are not"),
        (another_momentum, "batch norms have several eps or momenta"),
        (another_norm, "batch norms are BatchNorm3d, OtherNorm"),
        (no_statistics, "a batch norm has no gamma and beta, or no running statistics"),
    ],
)
def test_norms_that_no_kernel_has(change, reason):
    """A named implementation raises; "reference" is the plain model, and so is "auto" (on a CPU, at any rate)."""
    model = without_dropout(random_model(CONFIGS["tiny"])).train()
    change(model)
    views = random_views(model.config, batch=2)
    with pytest.raises(RuntimeError, match=rf"grouped\.impl='cpu' cannot run: {reason}"):
        fast_copy(model, impl="cpu")(views)
    expected = gradients(model, views)
    for impl in ("reference", "auto"):
        found = gradients(fast_copy(model, impl=impl), views)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_gradient_of_the_views_is_the_references():
    model = random_model(CONFIGS["tiny"])
    views = random_views(model.config, batch=1).requires_grad_()
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: the kernels have no gradient for the views"):
        fast_copy(model, impl="cpu")(views)


def test_an_empty_batch_in_evaluation(impl, device):
    model = random_model(CONFIGS["tiny"], device)
    views = random_views(model.config, batch=2, device=device)[:0]
    assert fast_copy(model, impl=impl)(views).logits.shape == (0,)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_backward_within_autocast_is_that_behind_it(scheme):
    model = without_dropout(random_model(CONFIGS["tiny"])).train()
    fast, views = fast_copy(model, scheme=scheme, impl="cpu"), random_views(model.config, batch=2)
    found = []
    for inside in (False, True):
        fast.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            tokens = fast.branch_tokens(views)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            tokens.float().square().sum().backward()
        found.append([p.grad.clone() for p in fast.branches.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_synchronised_norm_asks_for_processes():
    fast = SDRModel(CONFIGS["tiny"], SyncBatchNorm3d, GroupedConfig(impl="cpu")).train()
    with pytest.raises(ValueError, match=r"bn must not be 'sync' before torch\.distributed is initialised"):
        fast(random_views(fast.config, batch=2))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scheme", "eager", "scheme must be one of gram, fused"),
        ("impl", "cuda", "impl must be one of auto, reference, cpu, triton"),
        ("recompute", "res2", "recompute must be a list of parts, got 'res2'"),
        ("recompute", ("res6",), "recompute must name parts of stem, res2"),
    ],
)
def test_options_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        GroupedConfig(**{field: value})
