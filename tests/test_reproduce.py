"""The paper's experiments: what is planned, what is run, once and gone on with, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_caches import make_cache
from reproductions import CONFIG, COUNTS, DFDC, FIGURES, MODEL, PAPER, FakeTrain, by_line, make_caches, run

from sdr import SDRError, SDRModel
from sdr.checkpoint import WeightsInfo, load_model, save_weights
from sdr.clip_cache import ClipCache, read_manifest, write_manifest
from sdr.config import LossConfig, TPAConfig
from sdr.evaluate import VALIDATION_ACCURACY
from sdr.protocol import EXPERIMENTS, Run, find_caches, plan
from sdr.reproduce import Result, Stage
from sdr.reproduce_tables import render_markdown, table_cells

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    return make_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def copies(caches, tmp_path) -> dict[str, Path]:
    """The same, to change."""
    return {layout: Path(shutil.copytree(folder, tmp_path / layout)) for layout, folder in caches.items()}


@pytest.fixture(scope="module")
def finished(caches, tmp_path_factory) -> tuple[Path, FakeTrain, dict[str, Result]]:
    """Every experiment, run into one folder, by a training that knows what it was asked to do."""
    out, train = tmp_path_factory.mktemp("finished"), FakeTrain()
    order = ("table2", "table3", "figure2", "table1")
    return out, train, {experiment: run(experiment, caches, out, train) for experiment in order}


def fakes(cache: ClipCache) -> list[str]:
    return sorted({record.method for record in cache.records if record.label})


def splits(cache: ClipCache) -> set[str]:
    return {record.split for record in cache.records}


def layouts(planned: Run) -> list[str]:
    return [test.settings["layout"] for test in planned.tests]


# the plan


def test_table1_trains_on_three_and_tests_on_the_fourth(caches):
    runs = plan("table1", CONFIG, caches)
    assert [r.row for r in runs] == list(PAPER)  # in the paper's order, whatever the cache's is
    for r, others in zip(
        runs,
        [
            ["Face2Face", "FaceSwap", "NeuralTextures"],
            ["Deepfakes", "Face2Face", "NeuralTextures"],
            ["Deepfakes", "FaceSwap", "NeuralTextures"],
            ["Deepfakes", "Face2Face", "FaceSwap"],
        ],
        strict=True,
    ):
        assert (r.config, r.data.folder) == (CONFIG, caches["ffpp"])
        assert (splits(r.data), fakes(r.data)) == ({"train"}, others)
        assert (splits(r.validation), fakes(r.validation)) == ({"val"}, others)
        (test,) = r.tests
        assert (test.folder, splits(test), fakes(test)) == (caches["ffpp"], {"test"}, [r.row])
        assert sorted(record.label for record in test.records) == [0, 0, 1, 1]
        assert r.name.startswith(f"sdr_v4_without_{r.row}-")


def test_table2_tests_the_full_model_on_other_datasets(caches):
    (r,) = plan("table2", CONFIG, caches)
    assert (r.row, r.config) == ("SDR", CONFIG)
    assert (splits(r.data), fakes(r.data)) == ({"train"}, sorted(PAPER))
    assert (splits(r.validation), fakes(r.validation)) == ({"val"}, sorted(PAPER))
    assert layouts(r) == ["celebdf", "dfdc"]
    assert [splits(test) for test in r.tests] == [{"test"}, {"test"}]


def test_table3_adds_one_part_after_the_other(caches):
    runs = plan("table3", CONFIG, caches)
    assert [r.row for r in runs] == ["FTCN", "+ TRFI", "+ TPA", "+ contrastive"]
    every = frozenset({"color_jitter", "cutout", "flip", "crop"})
    no_contrastive = LossConfig(contrastive=0.0)
    assert [r.config for r in runs] == [
        replace(CONFIG, architecture="ftcn", tpa=TPAConfig(methods=("none",))),
        replace(CONFIG, tpa=TPAConfig(per_frame=every), loss=no_contrastive),
        replace(CONFIG, loss=no_contrastive),
        CONFIG,
    ]
    names = [r.name.rpartition("-")[0] for r in runs]
    assert names == ["ftcn", "sdr_v4_per_frame_no_contrastive", "sdr_v4_no_contrastive", "sdr_v4"]
    assert all(layouts(r) == ["celebdf", "dfdc"] for r in runs)
    assert {r.data.digest for r in runs} == {runs[0].data.digest}


def test_table3_of_the_paper_preset_can_be_built_with_the_fast_model(caches):
    config = replace(CONFIG, implementation="fast")
    assert [r.config.implementation for r in plan("table3", config, caches)] == ["reference", "fast", "fast", "fast"]


def test_figure2_varies_the_branches_alone(caches):
    runs = plan("figure2", CONFIG, caches)
    assert [r.row for r in runs] == ["V = 1", "V = 2", "V = 3", "V = 4", "V = 5", "V = 6"]
    assert [r.config for r in runs] == [replace(CONFIG, model=replace(MODEL, num_branches=V)) for V in range(1, 7)]
    assert all(layouts(r) == ["celebdf", "dfdc", "ffpp"] for r in runs)
    assert fakes(runs[0].tests[2]) == sorted(PAPER)


def test_the_same_model_has_one_name_in_every_experiment(caches):
    (sdr,) = plan("table2", CONFIG, caches)
    table3, figure2 = (plan(name, CONFIG, caches) for name in ("table3", "figure2"))
    assert table3[3].name == figure2[3].name == sdr.name
    others = [r.name for r in (*table3[:3], *figure2[:3], *figure2[4:], *plan("table1", CONFIG, caches))]
    assert len({sdr.name, *others}) == 1 + len(others)


def test_a_name_is_of_settings_that_change_the_numbers_and_of_clips(caches, copies, tmp_path):
    def name(config=CONFIG, caches=caches):
        return plan("table2", config, caches)[0].name

    assert name(replace(CONFIG, log_every=7, keep_last=5)) == name() == name(caches=copies)
    (tmp_path / "init").write_bytes(b"weights")
    started = replace(CONFIG, init=str(tmp_path / "init"))
    changed = [name(replace(CONFIG, seed=1)), name(replace(CONFIG, lr=2e-3)), name(started)]
    (tmp_path / "init").write_bytes(b"others")
    changed.append(name(started))
    table = read_manifest(copies["ffpp"])
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    write_manifest(copies["ffpp"], [row for row in rows if row["video"] != "val/000.mp4"])
    changed.append(name(caches=copies))
    assert len({name(), *changed}) == 6


# the run


def test_models_are_trained_once_for_all_experiments(finished):
    out, train, _ = finished
    shared, ablations, branches, held_out = 1, 3, 5, 4
    assert len(train.trained) == shared + ablations + branches + held_out
    assert sorted(p.name for p in (out / "runs").iterdir()) == sorted(call.out.name for call in train.trained)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_is_done_is_neither_trained_nor_tested_again(experiment, caches, finished, monkeypatch):
    out, _, results = finished
    train, scored = FakeTrain(), count_scoring(monkeypatch)
    assert run(experiment, caches, out, train).lines == results[experiment].lines
    assert (train.trained, scored) == ([], [])


def test_a_model_of_another_experiment_is_tested_on_what_is_new_alone(caches, tmp_path, monkeypatch):
    train, scored = FakeTrain(), count_scoring(monkeypatch)
    run("table2", caches, tmp_path, train)
    assert scored == ["celebdf", "dfdc"]
    run("table3", caches, tmp_path, train)
    assert scored[2:] == ["celebdf", "dfdc"] * 3


def count_scoring(monkeypatch) -> list[str]:
    """The layouts that are scored from now on."""
    import sdr.reproduce

    scored, score = [], sdr.reproduce.score_videos
    monkeypatch.setattr(
        sdr.reproduce,
        "score_videos",
        lambda model, cache, **options: scored.append(cache.settings["layout"]) or score(model, cache, **options),
    )
    return scored


def test_an_interrupted_experiment_goes_on(caches, tmp_path, monkeypatch):
    def fail() -> None:
        raise OSError("the machine is gone")

    scored, interrupted = count_scoring(monkeypatch), FakeTrain(at_second=fail)
    with pytest.raises(OSError, match="the machine is gone"):
        run("table1", caches, tmp_path, interrupted)
    assert [fakes(call.data) for call in interrupted.trained] == [["Face2Face", "FaceSwap", "NeuralTextures"]]
    assert len(scored) == 1
    train = FakeTrain()
    result = run("table1", caches, tmp_path, train)
    assert [fakes(call.data) for call in train.trained] == [
        ["Deepfakes", "Face2Face", "NeuralTextures"],
        ["Deepfakes", "FaceSwap", "NeuralTextures"],
        ["Deepfakes", "Face2Face", "FaceSwap"],
    ]
    assert len(scored) == 4
    assert [line.row for line in result.lines if line.run] == list(PAPER)


def test_interrupted_between_two_tests_keeps_the_first(caches, tmp_path, monkeypatch):
    stopped = iter([False, False, True])  # asked by the training, then before each test
    train, scored = FakeTrain(), count_scoring(monkeypatch)
    assert run("table2", caches, tmp_path, train, stop=lambda: next(stopped)) is None
    assert scored == ["celebdf"]
    assert run("table2", caches, tmp_path, train) is not None
    assert (scored, len(train.trained)) == (["celebdf", "dfdc"], 1)


def test_a_stopped_training_ends_the_experiment_without_figures(caches, tmp_path):
    train = FakeTrain()
    assert run("table3", caches, tmp_path, train, stop=lambda: True) is None
    assert train.trained == []
    assert not list(tmp_path.glob("evaluations/*"))


def test_other_weights_are_tested_anew(caches, tmp_path):
    train = FakeTrain()
    before = run("table2", caches, tmp_path, train)
    (call,) = train.trained
    torch.manual_seed(50)
    save_weights(call.out / "model.safetensors", SDRModel(MODEL).eval(), WeightsInfo())
    after = run("table2", caches, tmp_path, train)
    assert len(train.trained) == 1
    assert after.lines[0].figures["video AUC"] != before.lines[0].figures["video AUC"]
    assert VALIDATION_ACCURACY not in after.lines[0].figures


def test_other_clips_are_tested_anew_by_the_same_model(copies, tmp_path, monkeypatch):
    train, scored = FakeTrain(), count_scoring(monkeypatch)
    run("table2", copies, tmp_path / "out", train)
    shutil.rmtree(copies["dfdc"])
    make_cache(copies["dfdc"], real=3, fake=2, **DFDC)
    result = run("table2", copies, tmp_path / "out", train)
    assert (scored, len(train.trained)) == (["celebdf", "dfdc", "dfdc"], 1)
    assert [(line.real, line.fake) for line in result.lines[:2]] == [(2, 2), (3, 2)]


def test_figures_are_those_of_the_weights_by_an_own_count(caches, finished):
    _, train, results = finished
    result = results["table1"]
    for held_out, call in zip(PAPER, train.trained[-4:], strict=True):
        model, _ = load_model(call.out / "model.safetensors")
        test = ClipCache(caches["ffpp"], split="test", methods=[held_out])
        clips = torch.stack([torch.from_numpy(test.read(i)) for i in range(len(test))]).permute(0, 4, 1, 2, 3)
        with torch.inference_mode():
            scores = model(clips).logits.double().sigmoid()
        videos = [scores[test.videos == v].mean().item() for v in range(len(test.records))]
        labels = [record.label for record in test.records]
        real = [s for s, label in zip(videos, labels, strict=True) if not label]
        fake = [s for s, label in zip(videos, labels, strict=True) if label]
        wins = sum((f > r) + 0.5 * (f == r) for f in fake for r in real)
        line = by_line(result)[held_out, "ffpp"]
        assert line.figures["video AUC"] == pytest.approx(100 * wins / (len(real) * len(fake)))
        for name, threshold in {"video accuracy": 0.5, VALIDATION_ACCURACY: 0.25}.items():
            right = sum((s >= threshold) == label for s, label in zip(videos, labels, strict=True))
            assert line.figures[name] == pytest.approx(100 * right / len(labels))
        low, high = line.intervals["video AUC"]
        assert 0 <= low <= line.figures["video AUC"] <= high <= 100
        assert (line.run, line.real, line.fake) == (call.out.name, 2, 2)


def test_weights_say_what_they_were_trained_on(finished):
    _, train, _ = finished
    origins = [load_model(call.out / "model.safetensors")[1].origin for call in train.trained]
    videos = "trained on 10 FaceForensics++ videos: real and Deepfakes, FaceSwap, Face2Face, NeuralTextures"
    assert origins[:5] == [
        f"{name}, {videos}" for name in ("SDR of 4 branches", "FTCN", *["SDR of 4 branches"] * 2)
    ] + [f"SDR of 1 branch, {videos}"]
    assert (
        origins[-1] == "SDR of 4 branches, trained on 8 FaceForensics++ videos: real and Deepfakes, FaceSwap, Face2Face"
    )


def test_progress_counts_models_updates_and_clips(caches, tmp_path):
    seen: list[Stage] = []
    run("table2", caches, tmp_path, FakeTrain(), progress=seen.append)
    assert seen[0] == Stage(1, 1, "SDR", "training", 1, 2, FIGURES)
    assert seen[1:] == [
        Stage(1, 1, "SDR", f"testing on {name}", done, 8, {}) for name in ("Celeb-DF-v2", "DFDC") for done in (4, 8)
    ]


def test_without_a_validation_split_there_is_no_threshold_of_it(tmp_path):
    caches = make_caches(tmp_path, splits=("train", "test"))
    train = FakeTrain()
    result = run("table1", caches, tmp_path / "out", train)
    assert [call.validation for call in train.trained] == [None] * 4
    assert "ACC at validation threshold" not in table_cells(result)[0]
    assert "- Chosen by: nothing: there is no split val, so the last weights were tested" in render_markdown(result)


# refusals


def test_finds_which_cache_is_which(caches, tmp_path):
    assert find_caches([caches["dfdc"], str(caches["ffpp"]), caches["celebdf"]]) == caches
    with pytest.raises(SDRError, match=r"dfdc: is of the layout dfdc, and so is .*dfdc \(give one of each\)"):
        find_caches([caches["dfdc"], caches["ffpp"], caches["dfdc"]])
    other = make_cache(tmp_path / "own", layout="csv")
    with pytest.raises(SDRError, match=r"own: is of the layout 'csv' \(the experiments use ffpp, celebdf, dfdc\)"):
        find_caches([other])
    with pytest.raises(SDRError, match=r"nowhere: no such folder"):
        find_caches([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("experiment", "given", "missing"),
    [
        ("table1", ["celebdf", "dfdc"], "ffpp"),
        ("table2", ["ffpp", "dfdc"], "celebdf"),
        ("table3", ["ffpp", "celebdf"], "dfdc"),
        ("figure2", [], "ffpp"),
    ],
)
def test_rejects_a_missing_cache(experiment, given, missing, caches):
    with pytest.raises(SDRError, match=f"--data: {experiment} needs a clip cache of the layout {missing} "):
        plan(experiment, CONFIG, {layout: caches[layout] for layout in given})


def test_table1_needs_the_cache_of_faceforensics_alone(caches):
    assert len(plan("table1", CONFIG, {"ffpp": caches["ffpp"]})) == 4


def test_rejects_clips_of_another_size_before_anything_is_trained(caches, tmp_path):
    train = FakeTrain()
    larger = make_cache(tmp_path / "large", size=32, **COUNTS, **DFDC)
    with pytest.raises(SDRError, match=r"large: holds clips of 8 x 32 x 32 .*--num_frames 8 --size 16"):
        run("table2", caches | {"dfdc": larger}, tmp_path / "out", train)
    assert train.trained == []
    assert not (tmp_path / "out").exists()


def test_rejects_a_single_manipulation(tmp_path):
    caches = make_caches(tmp_path, methods=("FaceSwap",))
    with pytest.raises(SDRError, match="--data: table1 leaves one manipulation out, and ffpp has only FaceSwap"):
        plan("table1", CONFIG, caches)


def test_rejects_a_manipulation_without_test_videos(copies):
    table = read_manifest(copies["ffpp"])
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    write_manifest(copies["ffpp"], [r for r in rows if (r["split"], r["method"]) != ("test", "FaceSwap")])
    with pytest.raises(SDRError, match="has only real videos in its split test with FaceSwap"):
        plan("table1", CONFIG, copies)


def test_rejects_a_dataset_without_a_test_split(caches, tmp_path):
    dfdc = make_cache(tmp_path / "parts", layout="dfdc", **COUNTS)
    with pytest.raises(SDRError, match=r"parts: has no clip of the split 'test' \(it has train\)"):
        plan("table2", CONFIG, caches | {"dfdc": dfdc})


def change(cache: Path, video: str, **values: str) -> None:
    table = read_manifest(cache)
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    write_manifest(cache, [row | values if row["video"] == video else row for row in rows])


def test_rejects_a_person_or_file_in_training_and_test(copies):
    change(copies["ffpp"], "test/001.mp4", identity="train3")
    plan("table2", CONFIG, copies)  # ffpp's test split is of no matter there
    for experiment in ("table1", "figure2"):
        with pytest.raises(
            SDRError, match=r"identity train3 of ffpp is in test \(test/001.mp4\) and train \(train/003"
        ):
            plan(experiment, CONFIG, copies)
    change(copies["ffpp"], "test/001.mp4", identity="val2")
    with pytest.raises(
        SDRError, match=r"identity val2 of ffpp is in test \(test/001.mp4\) and val .*its test would say"
    ):
        plan("table1", CONFIG, copies)
    change(copies["ffpp"], "val/001.mp4", identity="train3")
    with pytest.raises(
        SDRError, match=r"identity train3 of ffpp is in train \(train/003.mp4\) and val \(val/001.mp4\)"
    ):
        plan("table2", CONFIG, copies)


def test_a_name_in_two_datasets_is_two_persons_but_a_file_is_one(copies):
    change(copies["celebdf"], "test/001.mp4", identity="train3")
    plan("table2", CONFIG, copies)
    change(copies["celebdf"], "train/001.mp4", video_sha256="train0")  # not tested on
    plan("table2", CONFIG, copies)
    change(copies["celebdf"], "test/001.mp4", video_sha256="train0")
    with pytest.raises(
        SDRError, match=r"the file of sha256 train0 is in test \(test/001.mp4\) and train \(train/000.mp4"
    ):
        plan("table2", CONFIG, copies)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "ftcn"}, "architecture must be sdr"),
        ({"tpa": TPAConfig(per_frame=frozenset({"flip"}))}, r"tpa.per_frame must be empty.*\['flip'\]"),
        ({"loss": LossConfig(contrastive=0.0)}, "loss.contrastive must be positive"),
    ],
    ids=str,
)
def test_rejects_a_configuration_that_is_a_row_itself(fields, message, caches):
    with pytest.raises(ValueError, match=message):
        plan("table3", replace(CONFIG, **fields), caches)


def test_rejects_an_unknown_experiment_and_a_missing_start(caches, tmp_path):
    with pytest.raises(ValueError, match="experiment must be one of table1, table2, table3, figure2, got 'table4'"):
        plan("table4", CONFIG, caches)
    with pytest.raises(SDRError, match=r"none\.safetensors: cannot be read: No such file"):
        plan("table2", replace(CONFIG, init=str(tmp_path / "none.safetensors")), caches)


def test_a_folder_of_something_else_is_left_alone(caches, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SDRError, match="is not empty and was not written by sdr reproduce"):
        run("table2", caches, tmp_path, FakeTrain())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weights": 1, "clips": 2', '{"weights": "W", "clips": "C", "group": {}}']
)
def test_a_broken_evaluation_is_named(text, caches, tmp_path):
    train = FakeTrain()
    run("table2", caches, tmp_path, train)
    path = next((tmp_path / "evaluations").rglob("dfdc-*.json"))
    kept = json.loads(path.read_text())
    path.write_text(text.replace('"W"', json.dumps(kept["weights"])).replace('"C"', json.dumps(kept["clips"])))
    with pytest.raises(SDRError, match=rf"{path.name}: is not (what sdr reproduce wrote \(remove it|JSON)"):
        run("table2", caches, tmp_path, train)
