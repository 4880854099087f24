"""A whole run: it learns, writes down what it did, goes on where it was left, and says in one line what is wrong."""

import csv
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from clip_caches import S, T, make_cache
from sklearn.metrics import roc_auc_score
from train_runs import config, model, results

from sdr import SDRError, tiny
from sdr.checkpoint import load_model
from sdr.clip_cache import ClipCache
from sdr.engine import Processes
from sdr.train import train
from sdr.train_config import learning_rate, to_json
from sdr.trainer import Trainer

PINNED = (
    1.786929,
    1.74175,
    1.446013,
    1.207871,
    1.07929,
    1.002573,
    0.9354236,
    0.8141468,
    0.7953889,
    0.7391423,
    0.7071478,
    0.6666754,
    0.6655452,
    0.6590351,
    0.6304264,
    0.6645378,
    0.6104448,
    0.6225452,
    0.6018069,
    0.619435,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ClipCache:
    """24 clips of flicker, see ``clip_caches``."""
    return ClipCache(make_cache(tmp_path_factory.mktemp("train") / "cache", real=12, fake=12))


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> ClipCache:
    """16 clips of other videos."""
    return ClipCache(make_cache(tmp_path_factory.mktemp("val") / "cache", real=8, fake=8, splits=("val",), seed=1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, others):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(config(ema=0.5), data, others, out).finished
    return out


def train_some(count: int, *arguments, **options):
    """A run that is stopped after ``count`` updates of this call."""
    done = []

    def progress(step: int, steps: int, figures: dict) -> None:
        done.append(step)

    return train(*arguments, progress=progress, stop=lambda: len(done) >= count, **options)


def table(path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(path.read_text().splitlines())]


def test_learns_flicker_and_writes_it_down(tmp_path, data, others):
    c = config(epochs=12, model=tiny_of_tiny())
    result = train(c, data, others, tmp_path / "run", origin="test")
    assert (result.weights, result.finished) == (tmp_path / "run/model.safetensors", True)
    assert result.metrics["video AUC"] >= 0.95
    weights, info = load_model(result.weights)
    assert weights.config == c.model
    assert (info.origin, info.synthetic, info.training) == ("test", True, to_json(c))
    names = {name: f"validation {name}" for name in result.metrics}
    assert info.metrics == {names[name]: value for name, value in result.metrics.items()}
    assert info.metrics["validation threshold"] == result.metrics["threshold"]
    losses = table(tmp_path / "run/losses.csv")
    assert [row["step"] for row in losses] == list(range(1, 12 * 3 + 1))
    assert losses[4]["lr"] == learning_rate(c, losses[4]["epoch"]) == learning_rate(c, 1.5)
    assert np.mean([row["total"] for row in losses[-3:]]) < losses[0]["total"] / 2
    assert json.loads((tmp_path / "run/config.json").read_text()) == to_json(c)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.html", "README.md", "tensorboard"}


def tiny_of_tiny():
    return model(width=8, embed_dim=64)


def test_the_best_weights_on_validation_are_kept(tmp_path, data, others):
    result = train(config(lr=2e-3), data, others, tmp_path)
    rows = table(tmp_path / "validation.csv")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    best = max(rows[::-1], key=lambda row: row["video AUC"])  # the last of equal ones
    assert result.metrics == {name: value for name, value in best.items() if name not in ("step", "epoch")}
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "best.safetensors").read_bytes()
    weights, _ = load_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        clips = torch.stack([torch.from_numpy(others.read(i)) for i in range(len(others))])
        scores = weights(clips.permute(0, 4, 1, 2, 3)).logits.sigmoid()
    assert roc_auc_score(others.labels, scores) == pytest.approx(best["video AUC"], abs=1e-12)


def test_without_validation_the_last_weights_are_kept(tmp_path, data):
    result = train(config(), data, None, tmp_path)
    assert (result.metrics, result.finished) == ({}, True)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "last.safetensors").read_bytes()
    assert not (tmp_path / "best.safetensors").exists()
    assert not (tmp_path / "validation.csv").exists()
    assert (tmp_path / "report.html").exists()


def test_moving_average_is_what_is_validated_and_written(tmp_path, data, others, whole):
    train(config(), data, others, tmp_path)
    plain, _ = load_model(tmp_path / "last.safetensors")
    averaged, _ = load_model(whole / "last.safetensors")
    assert not torch.equal(plain.transformer.head.weight, averaged.transformer.head.weight)
    assert (tmp_path / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()


@pytest.mark.promise(row="state")
@pytest.mark.parametrize("step", [1, 3, 8, 11])
def test_goes_on_after_a_stop_at_any_update_bit_for_bit(tmp_path, data, others, whole, step):
    stopped = train_some(step, config(ema=0.5), data, others, tmp_path)
    assert not stopped.finished
    assert train(config(ema=0.5), data, others, tmp_path).finished
    assert results(tmp_path) == results(whole)


@pytest.mark.promise(row="state")
def test_stopped_after_every_update(tmp_path, data, others, whole):
    runs = 0
    while not train_some(1, config(ema=0.5), data, others, tmp_path).finished:
        runs += 1
    assert runs == 12
    assert results(tmp_path) == results(whole)


def test_a_stop_in_a_validation_leaves_it_to_the_next_call(tmp_path, data, others, whole):
    asked = []
    result = train(
        config(ema=0.5), data, others, tmp_path, stop=lambda: len(asked.append(1) or asked) == 4
    )  # the first batch
    assert not result.finished
    assert not (tmp_path / "validation.csv").exists()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())][-1] == "step_000000003.safetensors"
    assert train(config(ema=0.5), data, others, tmp_path).finished
    assert results(tmp_path) == results(whole)


def test_settings_that_change_no_number_may_be_others(tmp_path, data, others, whole):
    train_some(5, config(ema=0.5), data, others, tmp_path)
    train(config(ema=0.5, log_every=1, checkpoint_every=7, keep_last=5, max_bad_steps=3), data, others, tmp_path)
    expected, found = results(whole), results(tmp_path)
    assert found["losses.csv"] == expected["losses.csv"]
    one, other = (load_model(folder / "last.safetensors")[0].state_dict() for folder in (tmp_path, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_finished_run_is_not_done_again(tmp_path, data, others, whole, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda *a, **k: pytest.fail("trained"))
    before, settings = results(whole), (whole / "config.json").read_bytes()
    monkeypatch.setattr("sdr.train.processes", lambda: Processes(0, 8))  # it was trained by others
    result = train(config(ema=0.5, keep_last=7), data, others, whole)
    assert (whole / "config.json").read_bytes() == settings
    assert (result.finished, results(whole)) == (True, before)
    assert result.metrics == json.loads(before["result.json"])["metrics"]


@pytest.mark.promise(row="state")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": 1e-3}, "lr was 0.003, now 0.001"),
        ({"model": model(num_branches=2)}, "model.num_branches was 4, now 2"),
        ({"seed": 1}, "seed was 0, now 1"),
    ],
    ids=str,
)
def test_a_run_of_other_settings_is_refused_by_name(data, others, whole, fields, words):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(SDRError, match=f"was written with other settings: .*{words}"):
        train(config(**{"ema": 0.5, **fields}), data, others, whole)
    with pytest.raises(SDRError, match="was written with other settings: data was"):
        train(config(ema=0.5), others, others, whole)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(SDRError, match="is not empty and was not written by sdr train"):
        train(config(), data, None, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.promise(row="atomic")
def test_checkpoints_are_few_and_the_one_before_a_damaged_one_counts(tmp_path, data, others, whole, caplog):
    train_some(8, config(ema=0.5), data, others, tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step_000000006.safetensors", "step_000000008.safetensors"]
    damaged = bytearray(kept[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept[1].write_bytes(damaged)
    with caplog.at_level(logging.INFO):
        train(config(ema=0.5), data, others, tmp_path)
    assert "step_000000008.safetensors: is damaged" in caplog.text
    assert "going on after update 6 of 12" in caplog.text
    assert results(tmp_path) == results(whole)


@pytest.mark.promise(row="atomic")
def test_a_checkpoint_after_damaged_ones_replaces_them(tmp_path, data):
    train_some(9, config(checkpoint_every=3, keep_last=3), data, None, tmp_path)
    folder = tmp_path / "checkpoints"
    assert [p.name[-13:-12] for p in sorted(folder.iterdir())] == ["3", "6", "9"]
    for name in ("step_000000006.safetensors", "step_000000009.safetensors"):
        (folder / name).write_bytes(b"damaged")
    train_some(1, config(checkpoint_every=3), data, None, tmp_path)
    assert [p.name[-13:-12] for p in sorted(folder.iterdir())] == ["3", "4"]
    assert train(config(checkpoint_every=3), data, None, tmp_path).finished


def test_the_best_weights_are_of_this_run_even_where_the_file_is_not(tmp_path, data, others):
    """best.safetensors was replaced after the checkpoint by updates that then came out otherwise."""
    train_some(7, config(), data, others, tmp_path)
    foreign = tmp_path / "best.safetensors"
    expected = load_model(foreign)[0].state_dict()
    foreign.write_bytes(b"of updates that never were")
    result = train(config(lr=3e-3), data, others, tmp_path)
    kept = load_model(tmp_path / "model.safetensors")[0].state_dict()
    best = max(table(tmp_path / "validation.csv")[::-1], key=lambda row: row["video AUC"])
    assert result.metrics["video AUC"] == best["video AUC"]
    assert (tmp_path / "model.safetensors").read_bytes() == foreign.read_bytes()
    assert (best["step"] > 6) == any(not torch.equal(kept[name], expected[name]) for name in kept)


def test_no_whole_checkpoint_is_an_error(tmp_path, data):
    train_some(3, config(), data, None, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"x" * 100)
    with pytest.raises(SDRError, match=r"checkpoints: no checkpoint there is whole"):
        train(config(), data, None, tmp_path)


def test_log_that_lacks_what_the_checkpoint_has_is_an_error(tmp_path, data):
    train_some(3, config(), data, None, tmp_path)
    (tmp_path / "losses.csv").unlink()
    with pytest.raises(SDRError, match=r"losses\.csv: ends at step 0, the checkpoint is of step 3"):
        train(config(), data, None, tmp_path)


@pytest.mark.promise(row="state")
def test_other_software_is_said(tmp_path, data, caplog, monkeypatch):
    train_some(3, config(), data, None, tmp_path)
    monkeypatch.setattr("sdr.train.platform.python_version", lambda: "4.0")
    train(config(), data, None, tmp_path)
    assert "other software, its numbers may differ: python was " in caplog.text


def test_rejects_clips_of_another_size(tmp_path, data):
    with pytest.raises(SDRError, match=rf"holds clips of {T} x {S} x {S} .*sdr prepare --num_frames 32 --size 64"):
        train(config(model=tiny()), data, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("real", "fake", "kind"), [(4, 0, "real"), (0, 3, "fake")])
def test_rejects_one_class(tmp_path, data, real, fake, kind):
    one = ClipCache(make_cache(tmp_path / "cache", real=real, fake=fake))
    with pytest.raises(SDRError, match=rf"cache: has only {kind} videos \(training needs real and fake ones\)"):
        train(config(), one, None, tmp_path / "run")
    with pytest.raises(SDRError, match=rf"cache: has only {kind} videos \(validation needs real and fake ones\)"):
        train(config(), data, one, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.promise(row="numbers")
def test_too_many_skipped_updates_stop_the_run_and_name_the_clips(tmp_path, data, monkeypatch, caplog):
    step = Trainer.step

    def poisoned(self, batches, *, epoch):
        bad = [batch._replace(views=batch.views * float("nan")) for batch in batches]
        return step(self, bad if epoch > 1 else batches, epoch=epoch)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(
        SDRError, match=r"training: 4 updates in a row had no finite .*its clips: train/\d+\.mp4 clip 0, "
    ):
        train(config(max_bad_steps=4), data, None, tmp_path)
    assert "update 4 skipped, its loss or gradient is not finite; clips train/" in caplog.text
    rows = table(tmp_path / "losses.csv")
    assert [row["skipped"] for row in rows[:7]] == [0, 0, 0, 1, 1, 1, 1]
    assert np.isnan(rows[5]["total"])
    monkeypatch.setattr(Trainer, "step", step)
    assert train(config(max_bad_steps=4), data, None, tmp_path).finished


@pytest.mark.promise(row="numbers")
def test_a_good_update_between_skipped_ones_ends_the_count(tmp_path, data, monkeypatch):
    step = Trainer.step
    count = iter(range(100))

    def poisoned(self, batches, *, epoch):
        bad = [batch._replace(views=batch.views * float("nan")) for batch in batches]
        return step(self, bad if next(count) % 3 else batches, epoch=epoch)

    monkeypatch.setattr(Trainer, "step", poisoned)
    assert train(config(max_bad_steps=3), data, None, tmp_path).finished
    assert [row["skipped_total"] for row in table(tmp_path / "throughput.csv")][-1] == 8


def test_accumulated_parts_are_one_update(tmp_path, data):
    train(config(accumulate=2, epochs=2), data, None, tmp_path)
    rows = table(tmp_path / "losses.csv")
    assert len(rows) == 2 * 6 // 2
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 6, 0.5, 5 / 6, 7 / 6, 1.5, 11 / 6])


def test_validation_comes_as_often_as_asked(tmp_path, data, others):
    train(config(validate_every=1.5), data, others, tmp_path / "a")
    assert [row["step"] for row in table(tmp_path / "a/validation.csv")] == [5, 9, 12]
    train(config(validate_every=9.0), data, others, tmp_path / "b")
    assert [row["step"] for row in table(tmp_path / "b/validation.csv")] == [12]


@pytest.mark.promise(row="no substitution")
def test_a_vanished_clip_ends_the_run_with_its_name_and_nothing_is_lost(tmp_path, others):
    cache = make_cache(tmp_path / "cache", real=12, fake=12)
    shard = cache / "shards/train/003.tar"
    whole = shard.read_bytes()
    assert not train_some(1, config(), ClipCache(cache), None, tmp_path / "run").finished
    shard.unlink()
    with pytest.raises(SDRError, match=r"003\.tar: cannot be read for train/003\.mp4 clip 0: No such file"):
        train(config(), ClipCache(cache), None, tmp_path / "run")
    shard.write_bytes(whole)
    assert train(config(), ClipCache(cache), None, tmp_path / "run").finished


@pytest.mark.promise(row="disk full, read-only")
def test_full_disk_leaves_the_checkpoint_before(tmp_path, data, monkeypatch):
    from sdr import checkpoints

    write, count = checkpoints.write_tensors, iter(range(100))

    def full(path, *rest):
        if next(count) == 2:
            raise SDRError(path, "cannot be written: No space left on device")
        write(path, *rest)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(SDRError, match="No space left"):
        train(config(), data, None, tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_000000002.safetensors",
        "step_000000004.safetensors",
    ]
    assert train(config(), data, None, tmp_path).finished


def test_twenty_steps_give_the_pinned_losses(tmp_path, data):
    """A refactoring changes no number; another torch or processor may, in the last digits."""
    c = config(epochs=7, warmup_epochs=1.0, model=model(dropout=0.0))
    train(c, data, None, tmp_path)
    found = [row["total"] for row in table(tmp_path / "losses.csv")][:20]
    assert found == pytest.approx(PINNED, rel=1e-4)


def test_losses_of_a_copied_folder_go_on(tmp_path, data, others, whole):
    train_some(7, config(ema=0.5), data, others, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(config(ema=0.5), data, others, tmp_path / "b")
    assert results(tmp_path / "b") == results(whole)
