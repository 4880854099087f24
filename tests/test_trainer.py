"""One update: a function of its seed, exact under recomputation and accumulation, and without effect if not finite."""

import sys
import warnings
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from clip_caches import make_cache
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import config, model

from sdr import FTCN, LossConfig, SDRError, SDRModel, fast
from sdr.checkpoint import WeightsInfo, save_weights
from sdr.clip_cache import ClipCache
from sdr.config import GroupedConfig
from sdr.engine import make_fabric
from sdr.loading import Batch, LoaderConfig, TrainingLoader
from sdr.losses import SDRLoss
from sdr.model import SDROutput
from sdr.train_config import TrainConfig
from sdr.trainer import FIGURES, Trainer, refusals


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ClipCache:
    """24 clips of flicker, see ``clip_caches``."""
    return ClipCache(make_cache(tmp_path_factory.mktemp("train") / "cache", real=12, fake=12))


def trainer(**fields) -> Trainer:
    c = config(**fields)
    return Trainer(c, make_fabric(c, torch.device("cpu")))


def batches(data: ClipCache, count: int, *, size: int = 8, views: int = 4) -> list[Batch]:
    loader = TrainingLoader(data, LoaderConfig(), config().tpa, batch_size=size, num_views=views)
    with closing(iter(loader)) as found:
        return list(islice(found, count))


def run(trainer: Trainer, parts: list[Batch]) -> list[dict[str, float]]:
    """Figures of one update a batch."""
    rows = [trainer.step([batch], epoch=0.5).tolist() for batch in parts]
    return [dict(zip(FIGURES, row, strict=True)) for row in rows]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything an update may change, but generators."""
    tensors, _ = trainer.state()
    return {name: value.clone() for name, value in tensors.items() if not name.startswith("generator.")}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_same_seed_gives_the_same_numbers_bit_for_bit(data):
    parts = batches(data, 4)
    found = []
    for seed in (0, 0, 1):
        one = trainer(seed=seed)  # made here: dropout draws from the one generator that it seeds
        found.append((run(one, parts), state(one)))
    assert found[0][0] == found[1][0] != found[2][0]
    assert_same(found[0][1], found[1][1])


@pytest.mark.promise(row="state")
@pytest.mark.parametrize("fields", [{}, {"ema": 0.9}, {"precision": "fp16"}, {"architecture": "ftcn"}], ids=str)
def test_goes_on_from_its_state_bit_for_bit(data, fields):
    parts = batches(data, 6, views=1 if "architecture" in fields else 4)
    whole = trainer(**fields)
    run(whole, parts[:3])
    tensors, values = whole.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    expected = run(whole, parts[3:])
    resumed = trainer(**fields)
    run(resumed, parts[4:])  # other moments and generators than those that are loaded
    resumed.load_state(tensors, values)
    assert run(resumed, parts[3:]) == expected
    assert_same(state(resumed), state(whole))


class Waits(TorchDispatchMode):
    """Collects the operations that bring a value of the device to the host."""

    HOST = (
        "aten._local_scalar_dense",
        "aten.equal",
        "aten.is_nonzero",
        "aten.nonzero",
        "aten.item",
        "aten.index.Tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(self.HOST):
            self.seen.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("fields", [{"ema": 0.9, "clip_norm": 1.0}, {"architecture": "ftcn"}], ids=str)
def test_an_update_does_not_wait_for_the_device(data, fields, monkeypatch):
    # labels on a CPU are looked at, which is no wait; on a GPU they are not
    monkeypatch.setattr(sys.modules["sdr_kernels.sdr_loss"], "check_sdr_loss", lambda *a: None)
    one = trainer(**fields)
    (batch,) = batches(data, 1, views=1 if "architecture" in fields else 4)
    with Waits() as waits:
        figures = one.step([batch], epoch=0.5)
    assert waits.seen == []
    with Waits() as waits:
        figures[0].item()
    assert len(waits.seen) == 1


@pytest.mark.promise(row="numbers")
@pytest.mark.parametrize("what", ["views", "gradient"])
@pytest.mark.parametrize("fields", [{}, {"accumulate": 2}, {"precision": "fp16"}, {"ema": 0.9}], ids=str)
def test_non_finite_update_leaves_weights_statistics_and_moments(data, what, fields):
    one = trainer(**fields)
    parts = batches(data, 4, size=8 // fields.get("accumulate", 1))
    k = fields.get("accumulate", 1)
    one.step(parts[:k], epoch=0.5)
    before = state(one)
    if what == "views":
        parts[k].views[0, 0, 0, 0, 0, 0] = float("nan")
    else:
        one.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    figures = dict(zip(FIGURES, one.step(parts[k : 2 * k], epoch=0.5).tolist(), strict=True))
    assert figures["skipped"] == 1
    assert np.isnan(figures["total"]) == (what == "views")
    assert not np.isfinite(figures["grad_norm"])
    assert_same(state(one), before)


@pytest.mark.promise(row="numbers")
@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("objective", ["shared", "complementary"])
@pytest.mark.parametrize("edge", ["one class", "one sample", "zero vectors", "huge logits", "huge wrong logits"])
def test_edges_give_finite_losses_and_gradients(edge, objective, weighting):
    B = 1 if edge == "one sample" else 4
    labels = torch.ones(B, dtype=torch.long) if edge in ("one class", "one sample") else torch.tensor([0, 1, 0, 1])
    features = torch.zeros(B, 3, 5) if edge == "zero vectors" else torch.randn(B, 3, 5)
    sign = {"huge logits": 1e4, "huge wrong logits": -1e4}.get(edge, 0.1)
    toward = torch.stack([1.0 - labels, labels.float()], -1) * 2 - 1  # [B, 2]
    parts = [
        sign * toward[:, 1],
        torch.zeros(B, 2, 4),
        features,
        sign * toward,
        -sign * toward[:, None].repeat(1, 3, 1),
    ]
    output = SDROutput(*(part.requires_grad_() for part in parts))
    losses = SDRLoss(LossConfig(objective=objective, weighting=weighting, detach_joint=False))(output, labels)
    assert torch.stack(list(losses)).isfinite().all()
    assert losses.mi >= 0
    assert losses.contrastive >= 0
    losses.total.backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in output)


@pytest.mark.promise(row="numbers")
def test_the_next_update_is_as_if_the_skipped_one_had_not_been(data):
    parts = batches(data, 3)
    plain = model(dropout=0.0)  # whose masks would be others
    one, other = trainer(model=plain, ema=0.9), trainer(model=plain, ema=0.9)
    run(one, [parts[0], parts[1]])
    bad = parts[2]._replace(views=parts[2].views * float("nan"))
    run(other, [parts[0], bad, parts[1]])
    assert_same(state(one), state(other))


def test_accumulated_parts_give_their_mean_gradient(data):
    parts = batches(data, 2, size=4)
    one = trainer(accumulate=2, model=model(dropout=0.0))
    gradients = []
    for batch in parts:
        one.module.train()
        one.module(batch.views, batch.labels)[0].backward()
        gradients.append([p.grad.clone() for p in one.parameters])
        one.optimizer.zero_grad()
    mean = [(a + b) / 2 for a, b in zip(*gradients, strict=True)]
    figures = dict(zip(FIGURES, one.step(parts, epoch=0.5).tolist(), strict=True))
    assert figures["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in mean]).norm().item(), rel=1e-5)


def test_a_long_gradient_is_scaled_down_and_a_short_one_is_not(data):
    (batch,) = batches(data, 1)
    seen = []
    for clip_norm in (None, 1e-3, 1e6):
        one = trainer(clip_norm=clip_norm, lr=1.0)
        step = one.optimizer.step
        one.optimizer.step = lambda one=one, step=step: (
            seen.append(torch.cat([p.grad.flatten() for p in one.parameters]).norm().item()),
            step(),
        )
        norm = dict(zip(FIGURES, one.step([batch], epoch=0.5).tolist(), strict=True))["grad_norm"]
    assert seen[0] == pytest.approx(norm, rel=1e-6)
    assert seen[1] == pytest.approx(1e-3, rel=1e-3)
    assert seen[2] == seen[0]


def test_moving_average_of_weights_and_statistics(data):
    one = trainer(ema=0.75)
    expected = [value.detach().double() for value in one._averaged()]
    for batch in batches(data, 3):
        one.step([batch], epoch=0.5)
        live = [value.detach().double() for value in one._averaged()]
        expected = [0.75 * e + 0.25 * v for e, v in zip(expected, live, strict=True)]
    buffers = [(name, value) for name, value in one.objective.named_buffers() if value.is_floating_point()]
    names = [name for name, _ in (*one.objective.named_parameters(), *buffers)]
    live = {name: value.clone() for name, value in one.objective.state_dict().items()}
    with one.averaged():
        found = one.objective.state_dict()
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-7)
        assert not torch.equal(found[names[0]], live[names[0]])
    assert_same(one.objective.state_dict(), live)


@pytest.mark.parametrize("fields", [{}, {"precision": "bf16"}, {"architecture": "ftcn"}], ids=str)
def test_recomputation_changes_no_bit_and_keeps_less(data, fields):
    parts = batches(data, 2, views=1 if "architecture" in fields else 4)
    runs, kept = [], []
    for recompute in (False, True):
        one = trainer(recompute=recompute, **fields)
        sizes = []
        pack = lambda tensor, sizes=sizes: (sizes.append(tensor.nbytes), tensor)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            one.module.train()
            one.module(parts[0].views, parts[0].labels)
        kept.append(sum(sizes))
        one = trainer(recompute=recompute, **fields)
        runs.append((run(one, parts), state(one)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_weights_and_losses_in_float32(data, precision):
    parts = batches(data, 1)
    one = trainer(precision=precision)
    (half,), (whole,) = run(one, parts), run(trainer(), parts)
    assert {p.dtype for p in one.parameters} == {torch.float32}
    assert half["total"] == pytest.approx(whole["total"], rel=0.02)
    assert half["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.05)
    assert half["total"] != whole["total"]


def test_uncertainty_weights_are_trained(data):
    one = trainer(loss=LossConfig(weighting="uncertainty"))
    run(one, batches(data, 2))
    assert (one.objective.loss.scales != 1).all()


def test_ftcn_is_trained_by_cross_entropy_alone(data):
    fields = {"architecture": "ftcn", "model": model(dropout=0.0)}
    one = trainer(loss=LossConfig(weighting="uncertainty"), **fields)
    (batch,) = batches(data, 1, views=1)
    assert type(one.objective.model) is FTCN
    reference = trainer(**fields).objective.model.train()
    logits = reference(batch.views[:, 0]).logits.double()
    expected = -(batch.labels * torch.nn.functional.logsigmoid(logits)).mean()
    expected -= ((1 - batch.labels) * torch.nn.functional.logsigmoid(-logits)).mean()
    (figures,) = run(one, [batch])
    assert figures["total"] == figures["ce"] == pytest.approx(expected.item(), rel=1e-5)
    assert figures["mi"] == figures["contrastive"] == figures["aux"] == 0


def test_fast_and_reference_start_from_the_same_weights():
    one, other = trainer().objective.model, trainer(implementation="fast").objective.model
    assert (type(one), type(other)) == (SDRModel, fast.SDRModel)
    assert_same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("scheme", ["gram", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_grouped_branches_train_like_the_reference(data, scheme, precision):
    """Six updates from the same weights and dropout, in fp16 with loss scaling; then one that is not finite."""
    parts = batches(data, 6)
    grouped = GroupedConfig(scheme=scheme, impl="cpu")
    plain, fast_one = (
        trainer(implementation=name, grouped=grouped, precision=precision) for name in ("reference", "fast")
    )
    torch.manual_seed(1)
    expected = run(plain, parts)
    torch.manual_seed(1)
    found = run(fast_one, parts)
    rel = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}[precision]
    assert [row["total"] for row in found] == pytest.approx([row["total"] for row in expected], rel=rel)
    before = state(fast_one)
    broken = parts[0]._replace(views=parts[0].views.float() * float("nan"))
    assert run(fast_one, [broken])[0]["skipped"] == 1
    assert_same(before, {name: value for name, value in state(fast_one).items()})


def test_frozen_norms_never_move(data, tmp_path):
    """Neither statistics nor what they do: with both implementations, which train alike."""
    torch.manual_seed(9)
    save_weights(tmp_path / "sdr.safetensors", SDRModel(model()), WeightsInfo())
    settings = {"bn": "frozen", "init": str(tmp_path / "sdr.safetensors"), "grouped": GroupedConfig(impl="cpu")}
    found = []
    for implementation in ("reference", "fast"):
        one = trainer(implementation=implementation, **settings)
        before = [buffer.clone() for buffer in one.objective.model.buffers()]
        torch.manual_seed(1)
        found.append([row["total"] for row in run(one, batches(data, 3))])
        assert all(torch.equal(a, b) for a, b in zip(before, one.objective.model.buffers(), strict=True))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_starts_from_ftcn_weights(tmp_path):
    torch.manual_seed(9)
    ftcn = FTCN(model().branch())
    save_weights(tmp_path / "ftcn.safetensors", ftcn, WeightsInfo())
    init = str(tmp_path / "ftcn.safetensors")
    for branch in trainer(init=init).objective.model.branches:
        assert torch.equal(branch.stem.conv.weight, ftcn.backbone.stem.conv.weight)
    assert_same(trainer(init=init, architecture="ftcn").objective.model.state_dict(), ftcn.state_dict())
    with pytest.raises(SDRError, match=r"ftcn\.safetensors: is of another model: temporal_kernels is True, .* False"):
        trainer(init=init, model=model(temporal_kernels=False))


def test_starts_from_weights_of_its_own_configuration_only(tmp_path):
    torch.manual_seed(9)
    save_weights(tmp_path / "sdr.safetensors", SDRModel(model(num_branches=2)), WeightsInfo())
    init = str(tmp_path / "sdr.safetensors")
    trainer(init=init, model=model(num_branches=2))
    with pytest.raises(SDRError, match=r"is of another model: num_branches is 2, the run asks for 4$"):
        trainer(init=init)
    with pytest.raises(SDRError, match="holds an SDRModel, the run trains an FTCN"):
        trainer(init=init, architecture="ftcn")


@pytest.mark.promise(row="memory")
def test_out_of_memory_names_the_settings(data, monkeypatch):
    one = trainer(accumulate=2)

    def full(self, *inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(one.objective), "forward", full)
    words = (
        r"memory: an update of 8 clips .* cpu \(raise accumulate \(now 2\) or lower batch_size \(now 8\), or set recomp"
    )
    with pytest.raises(SDRError, match=words), refusals(one.config, one.fabric.device):
        one.step(batches(data, 2, size=4), epoch=0.5)
    monkeypatch.setattr(type(one.objective), "forward", lambda self, *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError), refusals(one.config, one.fabric.device):
        one.step(batches(data, 2, size=4), epoch=0.5)


def test_what_cannot_be_deterministic_is_said_in_one_line():
    c, words = config(deterministic=True), r"deterministic: max_pool3d .* \(deterministic false allows it\)"
    with pytest.raises(SDRError, match=words), refusals(c, torch.device("cuda")):
        raise RuntimeError("max_pool3d does not have a deterministic implementation\nmore")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_does_not_wait_for_the_gpu(data):
    c = config(ema=0.9, clip_norm=1.0)
    one = Trainer(c, make_fabric(c, torch.device("cuda")))
    loader = TrainingLoader(data, LoaderConfig(), c.tpa, batch_size=8, num_views=4, device="cuda")
    with closing(iter(loader)) as found:
        one.step([next(found)], epoch=0.5)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode")  # it says once that it is a prototype
                torch.cuda.set_sync_debug_mode("error")
            one.step([next(found)], epoch=0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # PyTorch's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch does to trace it
@pytest.mark.parametrize("implementation", ["reference", "fast"])
def test_compiled_model_gives_the_same_losses(data, implementation):
    parts = batches(data, 2)
    fields = {"model": model(dropout=0.0, num_branches=1, backbone_stages=1, blocks=(1,))}
    fields |= {"implementation": implementation, "grouped": GroupedConfig(impl="cpu")}
    parts = [batch._replace(views=batch.views[:, :1]) for batch in parts]
    compiled, plain = run(trainer(compile=True, **fields), parts), run(trainer(**fields), parts)
    for a, b in zip(compiled, plain, strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-4)


def test_weights_are_cleanly_named(data):
    one = trainer(compile=False, ema=0.5)
    assert one.weights().keys() == SDRModel(one.config.model).state_dict().keys()
    assert replace(TrainConfig(), model=one.config.model).shape == one.config.model
