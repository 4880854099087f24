"""The studies on synthetic videos: who learns what and is tested on what, resumed, and the arithmetic of the tables."""

import csv
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from clip_caches import make_cache
from jsonargparse import ArgumentParser
from reproductions import MODEL
from scipy import stats
from sklearn.metrics import roc_auc_score

import sdr.study
from sdr import FTCN, SDRError, SDRModel
from sdr.checkpoint import WeightsInfo, load_model, save_weights
from sdr.clip_cache import ClipCache
from sdr.datasets import SYNTH_METHODS
from sdr.evaluate import best_threshold, score_videos
from sdr.shortcut import ARRANGEMENTS, Cue
from sdr.study import run_study
from sdr.study_command import add_study_arguments, run_study_command
from sdr.study_config import MODELS, SCALES, SEEN, UNSEEN, Run, StudyConfig, plan, variants
from sdr.study_table import FALL, MEAN, estimate, render_markdown, statements, summarise, write_study
from sdr.terminal import SYNTHETIC_NOTE
from sdr.train import TrainResult
from sdr.train_config import TrainConfig, flatten, to_json

CONFIG = StudyConfig(TrainConfig(model=MODEL, epochs=1, batch_size=4, lr=1e-3), seeds=2, stride=8, cue=Cue(strength=20))


class Call(NamedTuple):
    config: TrainConfig
    data: ClipCache
    validation: ClipCache
    out: Path


class FakeTrain:
    """Keeps the contract of ``sdr.train.train`` with random weights; ``calls`` are those that made some."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, config, data, validation, out, *, origin, device, progress, stop) -> TrainResult:
        weights = out / "model.safetensors"
        if stop():
            return TrainResult(weights, {}, finished=False)
        if not weights.exists():
            out.mkdir()
            self.calls.append(Call(config, data, validation, out))
            torch.manual_seed(config.seed)
            model = FTCN(config.shape) if config.architecture == "ftcn" else SDRModel(config.shape)
            save_weights(weights, model.eval(), WeightsInfo(origin, synthetic=True))
        return TrainResult(weights, {}, finished=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    counts = {"real": 2, "fake": 2, "clips": 2, "methods": SYNTH_METHODS, "layout": "ffpp"}
    return make_cache(tmp_path_factory.mktemp("study") / "clips", splits=("train", "val", "test"), **counts)


@pytest.fixture(scope="module")
def study(clips) -> Callable:
    """``run_study`` on small clips, whose few pixels tell of the cue by chance."""

    def run(
        kind: str, out: Path, train: Callable, config: StudyConfig = CONFIG, gap: float = 1.0, **options
    ) -> list[dict] | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sdr.study, "make_clips", lambda *args, **options: clips)
            patch.setattr(sdr.study, "LARGEST_GAP", gap)
            return run_study(kind, config, out, train=train, **options)

    return run


@pytest.fixture(scope="module")
def heldout(study, tmp_path_factory) -> tuple[list[Call], list[dict], list[tuple]]:
    """The whole study, run once: the trainings, the rows and what was told of the progress."""
    train, seen = FakeTrain(), []
    rows = study("heldout", tmp_path_factory.mktemp("heldout"), train, progress=lambda *stage: seen.append(stage))
    return train.calls, rows, seen


def methods(cache: ClipCache) -> set[str]:
    return {record.method for record in cache.records if record.label}


# the plan


def test_every_type_is_left_out_for_every_model_and_seed():
    runs = plan("heldout", CONFIG)
    assert {(r.held_out, r.model, r.seed) for r in runs} == {
        (held_out, model, seed) for held_out in SYNTH_METHODS for model in MODELS["heldout"] for seed in (0, 1)
    }
    assert len({run.name for run in runs}) == len(runs) == 40
    assert all(set(run.learned) == set(SYNTH_METHODS) - {run.held_out} for run in runs)
    assert len(plan("heldout", SCALES["smallest"]())) == 4 * 5 * 5


def test_the_shortcut_leaves_nothing_out():
    runs = plan("shortcut", CONFIG)
    assert [(r.model, r.seed) for r in runs] == [(model, seed) for seed in (0, 1) for model in MODELS["shortcut"]]
    assert {run.learned for run in runs} == {SYNTH_METHODS}


def test_each_model_differs_from_sdr_in_its_part_alone():
    full = flatten(to_json(CONFIG.train))
    methods = ["color_jitter", "crop", "cutout", "flip"]
    none = {"architecture": "ftcn", "tpa.methods": ["none"]}
    expected = {
        "FTCN": none,
        "SDR": {},
        "SDR without TPA": {"tpa.per_frame": methods},
        "SDR without TRFI": {"model.joint_feature": "mean", "loss.mi": 0.0, "loss.aux": 0.0},
        "SDR without contrastive": {"loss.contrastive": 0.0},
        "plain 3D ResNet": none | {"model.spatial_kernel": 3},
    }
    for name, config in variants(CONFIG.train).items():
        found = flatten(to_json(config))
        assert {key: value for key, value in found.items() if value != full[key]} == expected.pop(name)
    assert expected == {}


@pytest.mark.parametrize("scale", SCALES)
def test_scales_validate_once_at_the_end(scale):
    config = SCALES[scale]()
    assert config.train.validate_every == config.train.epochs
    assert config.seeds == 5


# what is run


def test_heldout_learns_three_types_and_is_tested_on_the_fourth(heldout):
    calls, rows, _ = heldout
    assert len(calls) == 40
    for call, run in zip(calls, plan("heldout", CONFIG), strict=True):
        assert call.out.name == run.name
        assert call.config == replace(variants(CONFIG.train)[run.model], seed=run.seed)
        assert methods(call.data) == methods(call.validation) == set(SYNTH_METHODS) - {run.held_out}
        assert {r.split for r in call.data.records} == {"train"}
        assert {r.split for r in call.validation.records} == {"val"}
    assert [(r["held_out"], r["model"], r["seed"], r["test"], r["real"], r["fake"]) for r in rows] == [
        (run.held_out, run.model, run.seed, *test)
        for run in plan("heldout", CONFIG)
        for test in ((UNSEEN, 2, 2), (SEEN, 2, 6))
    ]


def test_figures_are_those_of_unseen_people(heldout, clips):
    calls, rows, _ = heldout
    row, run = rows[0], plan("heldout", CONFIG)[0]
    model, info = load_model(calls[0].out / "model.safetensors")
    assert info.origin == f"FTCN, trained on 8 synthetic matched-marginals videos, fakes by {', '.join(run.learned)}"
    scored = score_videos(model, ClipCache(clips, split="test", methods=(run.held_out,)))
    assert row["AUC"] == pytest.approx(roc_auc_score(scored.labels, scored.scores), abs=1e-12)
    assert row["ACC"] == np.mean((scored.scores >= 0.5) == scored.labels)
    chosen = score_videos(model, ClipCache(clips, split="val", methods=run.learned))
    threshold = best_threshold(chosen.scores, chosen.labels)
    assert row["ACC at validation threshold"] == np.mean((scored.scores >= threshold) == scored.labels)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_progress_counts_models(heldout):
    assert [stage for stage in heldout[2] if stage[0] == "models"] == [("models", n, 40) for n in range(41)]


def test_shortcut_learns_the_aligned_cue_and_is_tested_three_ways(study, clips, tmp_path):
    train = FakeTrain()
    rows = study("shortcut", tmp_path, train)
    assert len(train.calls) == 10
    plain = ClipCache(clips, split="train")
    for call in train.calls:
        assert methods(call.data) == methods(call.validation) == set(SYNTH_METHODS)
        for i in (0, 1, len(plain) - 1):
            assert np.array_equal(call.data.read(i), CONFIG.cue.mark(plain.read(i), cue=bool(plain.labels[i])))
    assert [row["test"] for row in rows] == list(ARRANGEMENTS) * 10
    assert all((row["real"], row["fake"]) == (2, 8) for row in rows)
    model = load_model(train.calls[-1].out / "model.safetensors")[0]
    for row in rows[-3:]:
        scored = score_videos(model, ClipCache(tmp_path / f"shortcut/clips_{row['test']}", split="test"))
        assert row["AUC"] == pytest.approx(roc_auc_score(scored.labels, scored.scores), abs=1e-12)


def test_refuses_a_cue_that_single_pixels_show(study, tmp_path):
    with pytest.raises(SDRError, match=r"shows the cue in single pixels: total variation 0\.\d+, at most 0"):
        study("shortcut", tmp_path, FakeTrain(), gap=0)


def test_goes_on_where_it_was_stopped(study, tmp_path):
    train = FakeTrain()
    assert study("shortcut", tmp_path, train, stop=lambda: len(train.calls) == 4) is None
    assert len(train.calls) == 4
    rows = study("shortcut", tmp_path, train)
    assert [call.out.name for call in train.calls] == [run.name for run in plan("shortcut", CONFIG)]
    assert study("shortcut", tmp_path, train) == rows
    result = tmp_path / "shortcut/results" / f"{plan('shortcut', CONFIG)[3].name}.json"
    result.unlink()  # as if killed after the training, before the test
    again = study("shortcut", tmp_path, train)
    assert len(train.calls) == 10
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    assert json.loads(result.read_text()) == again[9:12]


def test_stopped_while_data_are_made(study, tmp_path):
    train = FakeTrain()
    assert study("shortcut", tmp_path, train, stop=lambda: True) is None
    assert train.calls == []


def test_refuses_a_folder_of_other_settings(study, tmp_path):
    train = FakeTrain()
    assert study("shortcut", tmp_path, train, stop=lambda: len(train.calls) == 1) is None
    other = replace(CONFIG, train=replace(CONFIG.train, lr=2e-3))
    with pytest.raises(SDRError, match=r"other settings: train\.lr was 0\.001, now 0\.002"):
        study("shortcut", tmp_path, train, other)


def test_refuses_foreign_folders_and_other_videos(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SDRError, match="is not empty and was not written by sdr study"):
        run_study("heldout", CONFIG, tmp_path)
    (tmp_path / "out").mkdir()
    settings = {"format": 1, "videos": {"identities": 8}, "clips": {}}
    (tmp_path / "out/settings.json").write_text(json.dumps(settings))
    (tmp_path / "out/data").mkdir()
    with pytest.raises(SDRError, match="other settings: videos was"):
        run_study("heldout", CONFIG, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 1}, "seeds must be at least 2, or there is no interval, got 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"train": replace(CONFIG.train, architecture="ftcn")}, r"train\.architecture must be sdr, got 'ftcn'"),
    ],
)
def test_rejects_wrong_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)


# the tables


def made_up(kind: str, auc: Callable[[Run, str], float], seeds: int = 5) -> list[dict]:
    """Rows with given AUCs."""
    tests = (UNSEEN, SEEN) if kind == "heldout" else ARRANGEMENTS
    about = {"real": 16, "fake": 16, "parameters": 1000, "seconds": 2.0, "device": "cpu"}
    rows = []
    for run in plan(kind, replace(CONFIG, seeds=seeds)):
        for test in tests:
            value = auc(run, test)
            figures = {"AUC": value, "ACC": value / 2, "ACC at validation threshold": value / 4}
            rows.append({**run._asdict(), "test": test, **figures, **about})
    return rows


@pytest.mark.parametrize("n", [2, 5, 30])
def test_estimate_is_students(n):
    values = np.random.default_rng(n).normal(0.9, 0.05, n)
    mean, low, high = estimate(list(values))
    expected = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert mean == pytest.approx(values.mean(), abs=1e-12)
    assert (low, high) == pytest.approx(expected, abs=1e-12)


def test_equal_values_have_no_width():
    assert estimate([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_summary_of_heldout_against_numpy():
    rng = np.random.default_rng(0)
    rows = made_up("heldout", lambda run, test: rng.uniform(0.5, 1))
    lines = {line[:4]: line for line in summarise("heldout", rows)}
    assert len(lines) == 2 * 5 * 5 * 3  # tests, types and their mean, models, metrics
    table = np.empty((4, 5, 5))  # type, model, seed
    for row in rows:
        if row["test"] == UNSEEN:
            place = SYNTH_METHODS.index(row["held_out"]), MODELS["heldout"].index(row["model"]), row["seed"]
            table[place] = row["AUC"]
    for m, model in enumerate(MODELS["heldout"]):
        for column, values in [*zip(SYNTH_METHODS, table, strict=True), (MEAN, table.mean(0))]:
            line = lines[UNSEEN, column, model, "AUC"]
            assert line.value == pytest.approx(estimate(values[m].tolist()), abs=1e-12)
            halves = lines[UNSEEN, column, model, "ACC"].value
            assert halves == pytest.approx([x / 2 for x in line.value], abs=1e-12)
            if model == "SDR":
                assert line.difference is None
            else:  # the t interval that SciPy gives for a paired test
                paired = stats.ttest_rel(values[1], values[m])
                assert line.difference.mean == pytest.approx((values[1] - values[m]).mean(), abs=1e-12)
                assert line.difference[1:] == pytest.approx(tuple(paired.confidence_interval(0.95)), abs=1e-12)


def test_summary_of_the_shortcut_has_the_fall():
    rng = np.random.default_rng(0)
    rows = made_up("shortcut", lambda run, test: rng.uniform(0.5, 1))
    line = next(x for x in summarise("shortcut", rows) if x[:4] == ("", FALL, "plain 3D ResNet", "AUC"))
    values = {(r["test"], r["seed"]): r["AUC"] for r in rows if r["model"] == "plain 3D ResNet"}
    falls = [values["aligned", seed] - values["reversed", seed] for seed in range(5)]
    assert line.value == pytest.approx(estimate(falls), abs=1e-12)


def test_heldout_says_where_sdr_does_not_win():
    def auc(run: Run, test: str) -> float:
        base = {"ShiftJitter": 0.5, "GainFlicker": 1.2}.get(run.held_out, 0.8)
        if run.model == "FTCN":  # varies against SDR, so that equal means are not told apart
            return base + 0.01 * (4 - run.seed)
        return 0.5 if run.model == "SDR without TPA" else 0.8 + 0.01 * run.seed

    rows = made_up("heldout", auc)
    said = statements("heldout", rows, summarise("heldout", rows))
    ftcn = (
        "higher for ShiftJitter; lower for GainFlicker; neither shown for BlendFlicker, FullJitter, mean of the types"
    )
    assert said[0] == f"AUC of SDR against FTCN: {ftcn}."
    columns = "ShiftJitter, GainFlicker, BlendFlicker, FullJitter, mean of the types"
    assert said[1] == f"AUC of SDR against SDR without TPA: higher for {columns}."
    assert said[2] == f"AUC of SDR against SDR without TRFI: neither shown for {columns}."
    others = "FTCN, SDR without TRFI, SDR without contrastive"
    assert said[4] == f"SDR is not shown to be better on every type than {others}."
    top = "0 of 100 models have an AUC of 1 on the type that they never saw"
    assert said[5] == f"{top}: above that no difference can show."


def test_shortcut_says_who_fell():
    def auc(run: Run, test: str) -> float:
        taken = run.model == "plain 3D ResNet" and test == "reversed"
        return 0.1 if taken else 1.0 if run.model == "FTCN" else 0.9 + 0.01 * (run.seed % 2)

    rows = made_up("shortcut", auc)
    said = statements("shortcut", rows, summarise("shortcut", rows))
    assert said[0] == "AUC of FTCN is not shown to fall."
    assert said[4].startswith("AUC of plain 3D ResNet falls by 0.80")
    assert said[5].startswith("With the cue reversed the AUC of SDR is lower than that of FTCN: by -0.09")
    assert said[6] == "With the cue reversed no difference of AUC is shown between SDR and SDR without TPA."
    assert said[8].startswith("With the cue reversed the AUC of SDR is higher than that of plain 3D ResNet: by 0.80")
    assert said[9].startswith("5 of 25 models have an AUC of 1 on the reversed cue")


@pytest.mark.parametrize("kind", MODELS)
def test_files(kind, tmp_path):
    rng = np.random.default_rng(0)
    rows = made_up(kind, lambda run, test: rng.uniform(0.5, 1))
    paths = write_study(kind, "smallest", CONFIG, rows, tmp_path)
    assert [path.name for path in paths] == ["study.md", "study.json", "runs.csv"]
    page = paths[0].read_text()
    assert SYNTHETIC_NOTE in page
    assert "Student's t" in page
    facts = json.loads(paths[1].read_text())
    assert facts["synthetic"] is True
    assert facts["notes"][0] == SYNTHETIC_NOTE
    assert facts["runs"] == rows
    for line, told in zip(summarise(kind, rows), facts["summary"], strict=True):
        assert told["value"] == line.value._asdict()
        if line.metric == "AUC" and line.table != SEEN:
            assert str(line.value) in page
            assert line.difference is None or str(line.difference) in page
    table = list(csv.DictReader(io.StringIO(paths[2].read_text())))
    assert [float(row["AUC"]) for row in table] == [row["AUC"] for row in rows]
    assert list(table[0])[:6] == ["seed", "held_out", "test", "model", "AUC", "ACC"]


# the command


def command(*arguments: object) -> int:
    parser = ArgumentParser(exit_on_error=False)
    add_study_arguments(parser)
    return run_study_command(parser.instantiate(parser.parse_args([str(argument) for argument in arguments])))


def test_command_writes_and_prints_the_table(monkeypatch, tmp_path, capsys):
    def run(kind, config, out, *, device, workers, progress, stop) -> list[dict]:
        assert (kind, config, device.type, workers) == ("heldout", SCALES["smallest"](), "cpu", 3)
        for stage in (("models", 0, 2), ("training", 1, 5), ("models", 1, 2)):
            progress(*stage)
        (out / kind).mkdir(parents=True)
        return made_up("heldout", lambda run, test: 0.5 + 0.1 * run.seed)

    monkeypatch.setattr(sdr.study, "run_study", run)
    out = tmp_path / "out"
    assert command("heldout", "--out", out, "--workers", 3, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert (out / "heldout/study.md").read_text() in printed
    assert f"written: {out}/heldout/study.md" in printed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_command(monkeypatch, tmp_path, capsys, number, code):
    def run(kind, config, out, *, device, workers, progress, stop) -> None:
        os.kill(os.getpid(), number)
        assert stop()

    monkeypatch.setattr(sdr.study, "run_study", run)
    assert command("shortcut", "--out", tmp_path / "out", "--device", "cpu") == code
    assert "the same command goes on from there" in capsys.readouterr().err


# for real


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch):
    """Videos, clips, two processes that train and test; nothing is done twice, one process gives the same figures."""
    monkeypatch.setattr(sdr.study, "LARGEST_GAP", 0.1)  # of few pixels
    train = TrainConfig(model=MODEL, epochs=1, batch_size=4, lr=1e-3)
    toy = StudyConfig(train, seeds=2, identities=8, video_frames=8, video_size=96, stride=8)
    rows = run_study("shortcut", toy, tmp_path, workers=2)
    assert len(rows) == 2 * 5 * 3
    assert SYNTHETIC_NOTE in render_markdown("shortcut", "toy", toy, rows)
    for run in plan("shortcut", toy):
        folder = tmp_path / "shortcut/runs" / run.name
        assert load_model(folder / "model.safetensors")[1].synthetic
        assert (folder / "report.html").is_file()
    assert run_study("shortcut", toy, tmp_path, workers=2, train=None) == rows
    run = plan("shortcut", toy)[1]
    shutil.rmtree(tmp_path / "shortcut/runs" / run.name)
    (tmp_path / "shortcut/results" / f"{run.name}.json").unlink()
    again = run_study("shortcut", toy, tmp_path)
    assert [row["AUC"] for row in again] == [row["AUC"] for row in rows]
