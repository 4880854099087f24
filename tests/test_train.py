"""The training step: it learns, is a function of its seed, skips what is not finite; and the clip loader."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdr import FTCN, LossConfig, SDRError, TPAConfig
from sdr.checkpoint import WeightsInfo, load_model, save_weights
from sdr.config import PRESETS
from sdr.datasets import Record
from sdr.loading import ClipSet, balanced_batches, load_clips
from sdr.train import TrainConfig, Trainer, learning_rate, train


@pytest.fixture(autouse=True)
def tiny_of_tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", lambda: replace(TINY(), num_frames=8, image_size=16))


TINY = PRESETS["tiny"]


def flicker_clips(n=24, seed=0) -> ClipSet:
    """Real: one random frame, held still. Fake: the same kind of frame, every second one brighter."""
    rng = np.random.default_rng(seed)
    clips = np.repeat(rng.integers(60, 180, (n, 3, 1, 16, 16)), 8, axis=2)
    labels = np.arange(n) % 2
    clips[labels == 1, :, ::2] += 60
    records = tuple(
        Record(f"{i}.mp4", int(y), "train", "flicker" if y else "real", str(i)) for i, y in enumerate(labels)
    )
    return ClipSet(
        torch.from_numpy(clips.astype(np.uint8)), torch.from_numpy(labels), torch.arange(n), records, failures=()
    )


def config(**fields) -> TrainConfig:
    return TrainConfig(**{"epochs": 4, "batch_size": 8, "lr": 3e-3, "warmup_epochs": 0} | fields)


def run(trainer: Trainer, data: ClipSet, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        batch = next(balanced_batches(data.labels, 8, seed=0, epoch=step))
        losses.append(trainer.step(data.clips[batch], data.labels[batch], samples=batch, epoch=0.5).total.item())
    return losses


def test_learns_flicker_and_writes_it_down(tmp_path):
    path, metrics = train(
        config(epochs=12), flicker_clips(), flicker_clips(16, seed=1), tmp_path / "run", info=WeightsInfo("test", True)
    )
    assert metrics["video AUC"] >= 0.95
    model, info = load_model(path)
    assert info.metrics == {f"validation {name}": value for name, value in metrics.items()}
    assert (info.origin, info.synthetic, info.training["lr"]) == ("test", True, 3e-3)
    log = (tmp_path / "run/log.csv").read_text().splitlines()
    assert log[0] == "step,epoch,total,ce,mi,contrastive,aux"
    assert len(log) == 1 + 12 * 3
    assert model.config.image_size == 16


def test_same_seed_gives_the_same_losses_bit_for_bit():
    data = flicker_clips()
    first, second = (run(Trainer(config()), data, 4) for _ in range(2))
    assert first == second
    assert run(Trainer(config(seed=1)), data, 4) != first


def test_every_branch_sees_its_own_view(monkeypatch):
    """The model is given what TPA makes of the clips for this seed, epoch and these samples."""
    from sdr.tpa import augment

    data, trainer, seen = flicker_clips(), Trainer(config(seed=5)), []
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda views: seen.append(views) or forward(views))
    trainer.step(data.clips[[3, 4]], data.labels[[3, 4]], samples=[3, 4], epoch=2.5)
    assert torch.equal(seen[0], augment(data.clips[[3, 4]], TPAConfig(), seed=5, epoch=2, samples=[3, 4], num_views=4))


def test_non_finite_step_changes_nothing_and_too_many_in_a_row_stop_the_run(caplog):
    data = flicker_clips()
    trainer = Trainer(config(max_bad_steps=2))
    run(trainer, data, 1)
    with torch.no_grad():
        trainer.model.transformer.head.bias.fill_(float("nan"))
    assert caplog.text == ""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert np.isnan(run(trainer, data, 1)).all()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert "step skipped, its loss or gradient is not finite; samples " in caplog.text
    with pytest.raises(SDRError, match=r"training: 2 steps in a row had no finite loss \(last samples: \d+, "):
        run(trainer, data, 1)


def test_learning_rate_warms_up_then_follows_a_cosine():
    c = config(lr=2.0, epochs=110, warmup_epochs=10)
    assert [learning_rate(c, e) for e in (0, 5, 10)] == [0, 1, 2]
    assert learning_rate(c, 60) == pytest.approx(1)
    assert learning_rate(c, 35) == pytest.approx(1 + np.cos(np.pi / 4))
    assert learning_rate(c, 110) == pytest.approx(0)


def test_uncertainty_weights_are_trained():
    trainer = Trainer(config(loss=LossConfig(weighting="uncertainty")))
    run(trainer, flicker_clips(), 2)
    assert (trainer.loss.scales != 1).all()


def test_batches_are_balanced_and_cover_the_larger_class():
    labels = torch.tensor([0] * 5 + [1] * 20)
    batches = list(balanced_batches(labels, 8, seed=3, epoch=1))
    assert len(batches) == 5
    for batch in batches:
        assert labels[batch].sum() == 4
        assert len(batch) == 8
    counts = Counter(i for batch in batches for i in batch)
    assert all(counts[i] == 1 for i in range(5, 25))
    assert all(counts[i] == 4 for i in range(5))
    assert batches == list(balanced_batches(labels, 8, seed=3, epoch=1))
    assert batches != list(balanced_batches(labels, 8, seed=3, epoch=2))


def test_batches_need_both_classes():
    with pytest.raises(SDRError, match="needs both classes, got 3 real and 0 fake"):
        list(balanced_batches(torch.zeros(3, dtype=torch.long), 2, seed=0, epoch=0))


def test_bad_videos_are_named_and_never_replaced(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    records = [Record(tmp_path / "text.mp4", 0, "train", "real", "0")]
    with pytest.raises(SDRError, match=r"text\.mp4: .*1 of 1 videos gave no clip"):
        load_clips(records, PRESETS["tiny"](), workers=1, cache=tmp_path)


def test_run_is_kept_when_its_evaluation_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("sdr.train.evaluate", lambda *a: (_ for _ in ()).throw(SDRError("scikit-learn", "is missing")))
    with pytest.raises(SDRError, match="is missing"):
        train(config(epochs=1), flicker_clips(), flicker_clips(), tmp_path, info=WeightsInfo())
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


def test_bf16_keeps_weights_and_losses_in_float32():
    data, trainer = flicker_clips(), Trainer(config(precision="bf16"))
    losses = trainer.step(data.clips[:8], data.labels[:8], samples=range(8), epoch=0.5)
    assert {x.dtype for x in losses} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    reference = Trainer(config()).step(data.clips[:8], data.labels[:8], samples=range(8), epoch=0.5)
    assert losses.total.item() == pytest.approx(reference.total.item(), rel=0.02)
    assert losses.total.item() != reference.total.item()


@pytest.mark.parametrize("fields", [{"preset": "huge"}, {"batch_size": 3}, {"warmup_epochs": 9}, {"lr": 0}], ids=str)
def test_rejects_wrong_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(**fields)
