"""The training step: it learns, is a function of its seed, and skips what is not finite."""

import re
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from clip_caches import S, T, make_cache

from sdr import FTCN, LossConfig, SDRError
from sdr.checkpoint import WeightsInfo, load_model, save_weights
from sdr.clip_cache import ClipCache
from sdr.config import PRESETS
from sdr.loading import Batch, LoaderConfig, TrainingLoader
from sdr.train import TrainConfig, Trainer, learning_rate, train


@pytest.fixture(autouse=True)
def tiny_of_tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", lambda: replace(TINY(), num_frames=8, image_size=16))


TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ClipCache:
    """24 clips of flicker, see ``clip_caches``."""
    return ClipCache(make_cache(tmp_path_factory.mktemp("train") / "cache", real=12, fake=12))


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> ClipCache:
    """16 clips of other videos."""
    return ClipCache(make_cache(tmp_path_factory.mktemp("val") / "cache", real=8, fake=8, splits=("val",), seed=1))


def config(**fields) -> TrainConfig:
    return TrainConfig(**{"epochs": 4, "batch_size": 8, "lr": 3e-3, "warmup_epochs": 0} | fields)


def some_batches(data: ClipCache, count: int, seed: int = 0) -> list[Batch]:
    loader = TrainingLoader(data, LoaderConfig(), config().tpa, batch_size=8, num_views=4, seed=seed)
    with closing(iter(loader)) as batches:
        return list(islice(batches, count))


def run(trainer: Trainer, data: ClipCache, steps: int) -> list[float]:
    return [trainer.step(batch, epoch=0.5).total.item() for batch in some_batches(data, steps)]


def test_learns_flicker_and_writes_it_down(tmp_path, data, others):
    path, metrics = train(config(epochs=12), data, others, tmp_path / "run", info=WeightsInfo("test", True))
    assert metrics["video AUC"] >= 0.95
    model, info = load_model(path)
    assert info.metrics == {f"validation {name}": value for name, value in metrics.items()}
    assert (info.origin, info.synthetic, info.training["lr"]) == ("test", True, 3e-3)
    log = (tmp_path / "run/log.csv").read_text().splitlines()
    assert log[0] == "step,epoch,total,ce,mi,contrastive,aux"
    assert len(log) == 1 + 12 * 3
    assert model.config.image_size == 16


def test_same_seed_gives_the_same_losses_bit_for_bit(data):
    first, second = (run(Trainer(config()), data, 4) for _ in range(2))
    assert first == second
    assert run(Trainer(config(seed=1)), data, 4) != first


def test_the_model_is_given_the_loaders_views_with_the_runs_seed(tmp_path, data, monkeypatch):
    seen = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batch, **k: seen.append(batch) or step(self, batch, **k))
    train(config(epochs=2, seed=5), data, None, tmp_path, info=WeightsInfo())
    assert len(seen) == 6
    for batch, expected in zip(seen, some_batches(data, 6, seed=5), strict=True):
        assert torch.equal(batch.views, expected.views)
        assert batch[2:] == expected[2:]


def test_weights_of_an_earlier_run_are_not_replaced(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(SDRError, match=r"model\.safetensors: is there from an earlier run"):
        train(config(epochs=1), data, None, tmp_path, info=WeightsInfo())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_rejects_clips_of_another_size(tmp_path, data, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    with pytest.raises(SDRError, match=rf"holds clips of {T} x {S} x {S} .*sdr prepare --num_frames 32 --size 64"):
        train(config(), data, None, tmp_path / "run", info=WeightsInfo())
    assert not (tmp_path / "run").exists()


def test_non_finite_step_changes_nothing_and_too_many_in_a_row_stop_the_run(caplog, data):
    trainer = Trainer(config(max_bad_steps=2))
    run(trainer, data, 1)
    with torch.no_grad():
        trainer.model.transformer.head.bias.fill_(float("nan"))
    assert caplog.text == ""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert np.isnan(run(trainer, data, 1)).all()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert re.search(r"step skipped, its loss or gradient is not finite; clips train/\d+\.mp4 clip 0, ", caplog.text)
    with pytest.raises(
        SDRError, match=r"training: 2 steps in a row had no finite loss \(last clips: train/\d+\.mp4 clip 0, "
    ):
        run(trainer, data, 1)


def test_learning_rate_warms_up_then_follows_a_cosine():
    c = config(lr=2.0, epochs=110, warmup_epochs=10)
    assert [learning_rate(c, e) for e in (0, 5, 10)] == [0, 1, 2]
    assert learning_rate(c, 60) == pytest.approx(1)
    assert learning_rate(c, 35) == pytest.approx(1 + np.cos(np.pi / 4))
    assert learning_rate(c, 110) == pytest.approx(0)


def test_uncertainty_weights_are_trained(data):
    trainer = Trainer(config(loss=LossConfig(weighting="uncertainty")))
    run(trainer, data, 2)
    assert (trainer.loss.scales != 1).all()


def test_run_is_kept_when_its_evaluation_fails(tmp_path, data, others, monkeypatch):
    monkeypatch.setattr("sdr.train.evaluate", lambda *a: (_ for _ in ()).throw(SDRError("scikit-learn", "is missing")))
    with pytest.raises(SDRError, match="is missing"):
        train(config(epochs=1), data, others, tmp_path, info=WeightsInfo())
    assert load_model(tmp_path / "model.safetensors")[1].metrics == {}
    assert (tmp_path / "log.csv").exists()


def test_starts_from_ftcn_weights(tmp_path):
    shape = PRESETS["tiny"]()
    torch.manual_seed(9)
    ftcn = FTCN(shape.branch())
    save_weights(tmp_path / "ftcn.safetensors", ftcn, WeightsInfo())
    model = Trainer(config(init=str(tmp_path / "ftcn.safetensors"))).model
    for branch in model.branches:
        assert torch.equal(branch.stem.conv.weight, ftcn.backbone.stem.conv.weight)
    with pytest.raises(SDRError, match=r"ftcn\.safetensors: has the configuration"):
        Trainer(config(init=str(tmp_path / "ftcn.safetensors"), temporal_kernels=False))


def test_bf16_keeps_weights_and_losses_in_float32(data):
    (batch,), trainer = some_batches(data, 1), Trainer(config(precision="bf16"))
    losses = trainer.step(batch, epoch=0.5)
    assert {x.dtype for x in losses} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    reference = Trainer(config()).step(batch, epoch=0.5)
    assert losses.total.item() == pytest.approx(reference.total.item(), rel=0.02)
    assert losses.total.item() != reference.total.item()


@pytest.mark.parametrize("fields", [{"preset": "huge"}, {"batch_size": 3}, {"warmup_epochs": 9}, {"lr": 0}], ids=str)
def test_rejects_wrong_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(**fields)
