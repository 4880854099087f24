"""`sdr evaluate` end to end on small caches, and every way in which it refuses."""

import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_caches import S, T, make_cache
from jsonargparse import ArgumentParser
from sklearn.metrics import average_precision_score, roc_auc_score

from sdr import FTCN, SDRError, fast
from sdr.checkpoint import WeightsInfo, save_weights
from sdr.clip_cache import SETTINGS, ClipCache, read_manifest, write_manifest
from sdr.config import tiny
from sdr.evaluate import intervals, video_metrics
from sdr.evaluate_command import add_evaluate_arguments, run_evaluate
from sdr.model import SDRModel
from sdr.terminal import SYNTHETIC_NOTE

CONFIG = replace(tiny(), num_frames=T, image_size=S)
METHODS = ("Swap", "Puppet")
FILES = ["evaluation.json", "evaluation.md", "scores.csv", "videos.csv"]


def evaluate(*arguments: object) -> int:
    """The command as the command line runs it."""
    parser = ArgumentParser(exit_on_error=False)
    add_evaluate_arguments(parser)
    return run_evaluate(parser.instantiate(parser.parse_args([str(argument) for argument in arguments])))


def rewrite(folder: Path, change) -> Path:
    """Change the manifest's rows; ``change`` is given each with its number."""
    table = read_manifest(folder)
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    write_manifest(folder, [row | change(n, row) for n, row in enumerate(rows)])
    return folder


def resettle(folder: Path, **changes) -> Path:
    """Change the cache's settings."""
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def cache_of_two_methods(folder: Path, **options) -> Path:
    """Test videos of two clips; the fakes are of Swap and Puppet in turns."""
    make_cache(folder, **{"real": 9, "fake": 12, "clips": 2, "splits": ("test",)} | options)
    return rewrite(folder, lambda n, row: {"method": METHODS[n // 2 % 2]} if row["label"] else {})


@pytest.fixture(scope="module")
def model() -> SDRModel:
    """Its scores lie on both sides of 0.5."""
    torch.manual_seed(4)
    return SDRModel(CONFIG).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return cache_of_two_methods(tmp_path_factory.mktemp("evaluate") / "videos")


@pytest.fixture(scope="module")
def weights(model, cache, tmp_path_factory) -> Path:
    """With a validation threshold in the middle of the scores."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    threshold = float(np.median(list(loop(model, ClipCache(cache)).values())))
    save_weights(path, model, WeightsInfo("a test", True, {"validation threshold": threshold}))
    return path


@torch.inference_mode()
def loop(model, cache: ClipCache) -> dict[str, float]:
    """The mean score of each video's clips by its name, clip by clip by the reference model."""
    scores: dict[str, list[float]] = {}
    for i in range(len(cache)):
        clip = torch.from_numpy(cache.read(i)).permute(3, 0, 1, 2)[None]
        video = str(cache.records[cache.videos[i]].path)
        scores.setdefault(video, []).append(model(clip).logits.double().sigmoid().item())
    return {video: float(np.mean(of)) for video, of in scores.items()}


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.promise(row="metrics")
def test_scores_metrics_and_intervals_are_right_and_all_files_agree(tmp_path, model, weights, cache, capsys):
    out = tmp_path / "deep/out"
    assert evaluate(weights, cache, "--out", out, "--batch_size", 5, "--resamples", 60, "--seed", 3) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    expected, rows = loop(model, ClipCache(cache)), read_csv(out / "videos.csv")
    assert [row["video"] for row in rows] == list(expected)
    scores = np.array([float(row["score"]) for row in rows])
    assert np.allclose(scores, list(expected.values()), rtol=0, atol=1e-5)
    assert len(set(scores.tolist())) == 21
    labels = np.array([int(row["label"]) for row in rows])
    assert labels.tolist() == [0] * 9 + [1] * 12
    assert [row["method"] for row in rows] == ["real"] * 9 + ["Puppet", "Swap"] * 6
    assert {(row["dataset"], row["clips"]) for row in rows} == {("videos", "2")}

    assert read_csv(out / "scores.csv") == [
        {"video_id": f"videos/{row['video']}", "prob": row["score"], "label": row["label"]} for row in rows
    ]

    document = json.loads((out / "evaluation.json").read_text())
    threshold = document["validation threshold"]["value"]
    groups = {group["method"]: group for group in document["groups"]}
    assert list(groups) == ["all", "Puppet", "Swap"]
    markdown = (out / "evaluation.md").read_text()
    for method, group in groups.items():
        keep = [i for i, row in enumerate(rows) if method == "all" or row["method"] in ("real", method)]
        s, y = scores[keep], labels[keep]
        assert (group["real"], group["fake"]) == (9, np.count_nonzero(y))
        metrics = group["metrics"]
        assert abs(metrics["video AUC"] - roc_auc_score(y, s)) < 1e-12
        assert abs(metrics["video AP"] - average_precision_score(y, s)) < 1e-12
        assert metrics["video accuracy"] == np.mean((s >= 0.5) == y)
        assert metrics["video accuracy at the validation threshold"] == np.mean((s >= threshold) == y)
        assert metrics["video EER"] == video_metrics(s, y)["video EER"]
        bounds = intervals(s, y, resamples=60, seed=3)
        for name, (low, high) in bounds.items():
            assert group["intervals"][name] == [low, high]
        low, high = bounds["video AUC"]
        assert f"{100 * metrics['video AUC']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in markdown
    assert groups["all"]["metrics"]["video accuracy"] != groups["Swap"]["metrics"]["video accuracy"]
    shown = capsys.readouterr()
    assert str((out / "evaluation.md").resolve()) in shown.out
    assert re.search(rf"video AUC +│ {100 * groups['Puppet']['metrics']['video AUC']:.1f}", shown.out)


def test_the_json_says_all_that_was_used(tmp_path, weights, cache):
    evaluate(weights, cache, "--out", tmp_path / "out", "--resamples", 5)
    document = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert document["weights"]["path"] == str(weights.resolve())
    assert document["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (document["weights"]["model"], document["weights"]["config"]["num_frames"]) == ("SDRModel", T)
    assert document["weights"]["info"]["origin"] == "a test"
    assert document["caches"] == [
        {
            "dataset": "videos",
            "folder": str(cache.resolve()),
            "layout": "csv",
            "synthetic": True,
            "videos": 21,
            "clips": 42,
            "digest": ClipCache(cache, split="test").digest,
        }
    ]
    used = {"split": "test", "methods": None, "threshold": None, "batch_size": 8, "resamples": 5, "seed": 0}
    assert document["settings"] == used | {"device": "cuda:0" if torch.cuda.is_available() else "cpu"}
    assert document["version"]


def test_a_second_run_writes_the_same_bytes(tmp_path, weights, cache):
    for out in ("first", "second", "second"):
        evaluate(weights, cache, "--out", tmp_path / out, "--resamples", 20)
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_markdown_tables_are_whole(tmp_path, weights, cache):
    evaluate(weights, cache, "--out", tmp_path / "out", "--resamples", 5)
    lines = (tmp_path / "out/evaluation.md").read_text().splitlines()
    assert lines[0] == "# Evaluation on videos"
    tables = [line for line in lines if line.startswith("|")]
    titles = "video AUC \\| video accuracy at 0.5 \\| video accuracy at 0.\\d+ \\(val\\) \\| video EER \\| video AP"
    assert re.fullmatch(rf"\| dataset \| real \| fake \| {titles} \|", tables[0])
    assert [line.split(" | ")[0] for line in tables] == [
        *("| dataset", "| ---", "| videos"),
        *("| method", "| ---", "| Puppet", "| Swap"),
        *("| dataset", "| ---", "| videos"),
    ]
    assert {line.count(" | ") for line in tables[:7]} == {7}
    assert "95 % intervals of 5 bootstrap draws" in "\n".join(lines)


def test_threshold_is_the_weights_the_users_or_none(tmp_path, model, weights, cache, capsys):
    def run(path, *options):
        evaluate(path, cache, "--out", tmp_path / "out", "--resamples", 5, *options)
        document = json.loads((tmp_path / "out/evaluation.json").read_text())
        known = "video accuracy at the validation threshold" in document["groups"][0]["metrics"]
        assert known == ("(val)" in (tmp_path / "out/evaluation.md").read_text())
        return document["validation threshold"], known, capsys.readouterr().err

    found, known, errors = run(weights)
    assert (found["from"], known) == ("the weights", True)
    assert "note" not in errors
    assert run(weights, "--threshold", 0.25)[:2] == ({"value": 0.25, "from": "--threshold"}, True)
    bare = tmp_path / "bare.safetensors"
    save_weights(bare, model, WeightsInfo("a test"))
    found, known, errors = run(bare)
    assert (found, known) == ({"value": None, "from": None}, False)
    assert (
        "note: the weights carry no validation threshold, so the accuracy is that at 0.5 alone; --threshold" in errors
    )
    assert "No validation threshold is known" in (tmp_path / "out/evaluation.md").read_text()
    assert run(bare, "--threshold", 0.25)[:2] == ({"value": 0.25, "from": "--threshold"}, True)


def test_the_thresholds_accuracy_is_at_it(tmp_path, weights, cache):
    for threshold, accuracy in ((0.0, 12 / 21), (1.0, 9 / 21)):  # all fake, all real
        evaluate(weights, cache, "--out", tmp_path / "out", "--resamples", 5, "--threshold", threshold)
        (group, *_) = json.loads((tmp_path / "out/evaluation.json").read_text())["groups"]
        assert group["metrics"]["video accuracy at the validation threshold"] == pytest.approx(accuracy, abs=1e-15)


@pytest.mark.parametrize(("of_weights", "of_cache"), [(True, False), (False, True), (False, False)])
def test_what_is_synthetic_says_so_everywhere(tmp_path, model, of_weights, of_cache, capsys):
    save_weights(tmp_path / "m.safetensors", model, WeightsInfo("a test", of_weights))
    folder = resettle(make_cache(tmp_path / "cache", splits=("test",)), synthetic=of_cache)
    evaluate(tmp_path / "m.safetensors", folder, "--out", tmp_path / "out", "--resamples", 5)
    says = of_weights or of_cache
    document = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (document["synthetic"], document["note"]) == (says, SYNTHETIC_NOTE if says else "")
    assert (SYNTHETIC_NOTE in (tmp_path / "out/evaluation.md").read_text()) == says
    assert (SYNTHETIC_NOTE in capsys.readouterr().out) == says


def test_split_and_methods_choose_the_videos(tmp_path, weights):
    folder = cache_of_two_methods(tmp_path / "cache", splits=("test", "val"))
    evaluate(weights, folder, "--out", tmp_path / "out", "--split", "val", "--methods", "[Puppet]", "--resamples", 5)
    rows = read_csv(tmp_path / "out/videos.csv")
    assert {row["method"] for row in rows} == {"real", "Puppet"}
    assert {row["video"].split("/")[0] for row in rows} == {"val"}
    assert {row["label"] for row in rows if row["method"] == "Puppet"} == {"1"}
    groups = json.loads((tmp_path / "out/evaluation.json").read_text())["groups"]
    assert [(group["method"], group["real"], group["fake"]) for group in groups] == [
        ("all", 9, 6),
        ("Puppet", 9, 6),
    ]


def test_ftcn_weights_are_evaluated_too(tmp_path, cache):
    torch.manual_seed(0)
    model = FTCN(CONFIG.branch()).eval()
    save_weights(tmp_path / "ftcn.safetensors", model, WeightsInfo("a test"))
    evaluate(tmp_path / "ftcn.safetensors", cache, "--out", tmp_path / "out", "--resamples", 5)
    scores = [float(row["score"]) for row in read_csv(tmp_path / "out/videos.csv")]
    assert np.allclose(scores, list(loop(model, ClipCache(cache)).values()), rtol=0, atol=1e-5)


def test_several_caches_are_told_apart(tmp_path, weights):
    one = make_cache(tmp_path / "one", splits=("test",))
    two = make_cache(tmp_path / "two", splits=("test",), seed=1)
    nested = make_cache(tmp_path / "deeper/two", splits=("test",), seed=2)
    other = make_cache(tmp_path / "other", splits=("test",), seed=3)
    for folder in (one, two, nested):
        resettle(folder, layout="celebdf")
    resettle(other, layout="dfdc")
    out = tmp_path / "out"
    evaluate(weights, one, two, nested, other, "--out", out, "--resamples", 5)
    names = ["celebdf (one)", f"celebdf ({two.resolve()})", f"celebdf ({nested.resolve()})", "dfdc"]
    document = json.loads((out / "evaluation.json").read_text())
    assert [cache["dataset"] for cache in document["caches"]] == names
    assert [group["dataset"] for group in document["groups"]] == [name for name in names for _ in range(2)]
    ids = [row["video_id"] for row in read_csv(out / "scores.csv")]
    assert len(ids) == len(set(ids)) == 32
    assert ids[:2] == ["celebdf (one)/test/000.mp4", "celebdf (one)/test/001.mp4"]
    means = {name: [float(r["score"]) for r in read_csv(out / "videos.csv") if r["dataset"] == name] for name in names}
    assert means["celebdf (one)"] != means["dfdc"]


def test_hostile_names_stay_one_line_and_one_cell(tmp_path, weights):
    folder = make_cache(tmp_path / "a|b`c", splits=("test",))
    rewrite(
        folder,
        lambda n, row: {"video": f'{n},"x"\n.mp4'} | ({"method": "<b>|*\n[x](y)"} if row["label"] else {}),
    )
    evaluate(weights, folder, "--out", tmp_path / "out", "--resamples", 5)
    rows = read_csv(tmp_path / "out/videos.csv")
    assert rows[1]["video"] == r'1,"x"\n.mp4'
    assert rows[1]["method"] == r"<b>|*\n[x](y)"
    assert len((tmp_path / "out/videos.csv").read_text().splitlines()) == 9
    lines = (tmp_path / "out/evaluation.md").read_text().splitlines()
    assert lines[0] == r"# Evaluation on a\|b\`c"
    (row,) = [line for line in lines if "x" in line and line.startswith(r"| \<b\>")]
    assert row.startswith(r"| \<b\>\|\*\\n\[x\](y) | 4 | 4 | ")


def test_scores_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, cache):
    torch.manual_seed(0)
    broken = SDRModel(CONFIG)
    with torch.no_grad():
        broken.transformer.head.bias.fill_(3e38)
        broken.transformer.head.weight.fill_(3e38)
    save_weights(tmp_path / "m.safetensors", broken, WeightsInfo("a test"))
    with pytest.raises(SDRError, match=r"weights: the model gives no finite score for test/\d+\.mp4 clip \d"):
        evaluate(tmp_path / "m.safetensors", cache, "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_clip_is_named_and_nothing_is_written(tmp_path, weights):
    folder = make_cache(tmp_path / "cache", splits=("test",))
    (folder / "shards/test/003.tar").unlink()
    with pytest.raises(SDRError, match=r"003\.tar: cannot be read for test/003\.mp4 clip 0: No such file"):
        evaluate(weights, folder, "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def broken_manifest(folder: Path) -> None:
    path = folder / "manifest.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def same_names(folder: Path) -> None:
    rewrite(folder, lambda n, row: {"video": f"{max(n, 1)}.mp4"})


def one_class(label: int):
    return lambda folder: rewrite(folder, lambda n, row: {"label": label, "method": ("real", "Flicker")[label]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_manifest, r"manifest\.parquet: cannot be read: "),
        (lambda folder: (folder / "manifest.parquet").unlink(), "cache: is no clip cache: it has no manifest.parquet"),
        (lambda folder: (folder / SETTINGS).unlink(), r"cache: is no clip cache: it has no prepare\.json"),
        (lambda folder: resettle(folder, num_frames=4), r"cache: holds clips of 4 x 16 x 16 \(.* --num_frames 8"),
        (
            lambda folder: rewrite(folder, lambda n, row: {"split": "val"}),
            r"has no clip of the split 'test' \(it has val",
        ),
        (one_class(0), r"cache: has only real videos in the split 'test' \(an evaluation needs real and fake ones\)"),
        (one_class(1), r"cache: has only fake videos in the split 'test' \(an evaluation needs real and fake ones\)"),
        (same_names, r"cache: has two videos of the name 1\.mp4"),
    ],
)
def test_refuses_caches_in_one_line(tmp_path, weights, damage, message):
    folder = make_cache(tmp_path / "cache", splits=("test",))
    damage(folder)
    with pytest.raises(SDRError, match=message) as caught:
        evaluate(weights, folder, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "[Swap,Nothing]"], "has no clip of the method Nothing"),
        (["--threshold", ".nan"], "options: threshold must lie in 0..1"),
        (["--batch_size", "0"], "options: batch_size must be at least 1"),
        (["--resamples", "0"], "options: resamples must be at least 1"),
        (["--seed", "-1"], "options: seed must not be negative"),
        (["--device", "meta"], "--device: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_refuses_options_in_one_line(tmp_path, weights, cache, options, message):
    with pytest.raises(SDRError, match=message):
        evaluate(weights, cache, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_refuses_files_in_one_line(tmp_path, weights, cache, monkeypatch):
    with pytest.raises(SDRError, match=r"none\.safetensors: no such weights file"):
        evaluate(tmp_path / "none.safetensors", cache, "--out", tmp_path / "out")
    with pytest.raises(SDRError, match="none: no such folder"):
        evaluate(weights, tmp_path / "none", "--out", tmp_path / "out")
    with pytest.raises(SDRError, match="videos: is given twice"):
        evaluate(weights, cache, f"{cache}/../{cache.name}", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SDRError, match="file: cannot be made: "):
        evaluate(weights, cache, "--out", tmp_path / "file")
    monkeypatch.setattr("sdr.checkpoint.load_model", lambda path: (SDRModel(CONFIG).eval(), WeightsInfo()))
    with pytest.raises(SDRError, match=r"gone\.safetensors: cannot be read: No such file"):
        evaluate(tmp_path / "gone.safetensors", cache, "--out", tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(tmp_path, weights, cache):
    (tmp_path / "scores.csv").write_text("precious")
    with pytest.raises(SDRError, match="is not empty and was not written by sdr evaluate"):
        evaluate(weights, cache, "--out", tmp_path, "--resamples", 2)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("scores.csv", "precious")]


@pytest.mark.parametrize("value", [True, float("nan")])
def test_refuses_a_validation_threshold_that_is_no_number(tmp_path, model, cache, value):
    save_weights(tmp_path / "m.safetensors", model, WeightsInfo("a test", metrics={"validation threshold": value}))
    with pytest.raises(SDRError, match=r"m\.safetensors: carries a validation threshold that is no number"):
        evaluate(tmp_path / "m.safetensors", cache, "--out", tmp_path / "out")
    assert (
        evaluate(tmp_path / "m.safetensors", cache, "--out", tmp_path / "out", "--threshold", 0.5, "--resamples", 2)
        == 0
    )


def test_the_fast_model_scores_in_batches_of_the_size_that_was_asked_for(tmp_path, weights, cache, monkeypatch):
    seen = []
    forward = fast.SDRModel.forward
    monkeypatch.setattr(fast.SDRModel, "forward", lambda self, clips: seen.append(len(clips)) or forward(self, clips))
    evaluate(weights, cache, "--out", tmp_path / "out", "--batch_size", 20, "--resamples", 2)
    assert seen == [20, 20, 2]
