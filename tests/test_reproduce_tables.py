"""The experiments' figures beside the published ones: tables, files, Figure 2's page and the command."""

import csv
import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from clip_caches import make_cache
from pages import browser, find, open_html, shown, texts, wait_until  # noqa: F401, two are fixtures
from reproductions import (
    CONFIG,
    COUNTS,
    DFDC,
    MODEL,
    PAPER,
    FakeTrain,
    by_line,
    group,
    make_caches,
    result_of,
    run,
    whole,
)

from sdr.checkpoint import load_model
from sdr.protocol import plan
from sdr.published import PUBLISHED, Published
from sdr.reproduce import Line, Result, reproduce
from sdr.reproduce_tables import changes, render_figure, render_markdown, table_cells, to_facts, write_result
from sdr.terminal import SYNTHETIC_NOTE
from sdr.train_config import TRAIN_PRESETS, train_paper

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    return make_caches(tmp_path_factory.mktemp("caches"))


# the tables


TABLE1 = {
    ("Deepfakes", "ffpp"): group(0.901, 0.80),
    ("FaceSwap", "ffpp"): group(0.80, 0.70),
    ("Face2Face", "ffpp"): group(0.70, 0.60),
    ("NeuralTextures", "ffpp"): group(0.601, 0.50),
}


def test_published_figures_are_the_papers():
    flat = {experiment: {key: tuple(p) for key, p in cells.items()} for experiment, cells in PUBLISHED.items()}
    assert flat == {
        "table1": {
            ("Deepfakes", "ffpp"): (99.7, 97.5),
            ("FaceSwap", "ffpp"): (99.7, 97.9),
            ("Face2Face", "ffpp"): (99.6, 98.6),
            ("NeuralTextures", "ffpp"): (99.4, 98.7),
            ("average", "ffpp"): (99.6, 98.2),
            ("FTCN (published), average", "ffpp"): (99.5, None),
        },
        "table2": {
            ("SDR", "celebdf"): (88.5, None),
            ("SDR", "dfdc"): (76.2, None),
            ("FTCN (published)", "celebdf"): (86.9, None),
            ("FTCN (published)", "dfdc"): (74.0, None),
        },
        "table3": {
            ("FTCN", "celebdf"): (86.4, None),
            ("FTCN", "dfdc"): (72.5, None),
            ("+ TRFI", "celebdf"): (87.9, None),
            ("+ TRFI", "dfdc"): (74.3, None),
            ("+ TPA", "celebdf"): (88.2, None),
            ("+ TPA", "dfdc"): (75.8, None),
            ("+ contrastive", "celebdf"): (88.5, None),
            ("+ contrastive", "dfdc"): (76.2, None),
        },
        "figure2": {("V = 4", "celebdf"): (88.5, None), ("V = 4", "dfdc"): (76.2, None)},
    }


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_every_published_figure_of_a_row_stands_beside_ours(experiment, caches):
    lines = by_line(whole(experiment, caches))
    for key, published in PUBLISHED[experiment].items():
        assert lines[key].published == published
        alone = key[0].startswith("FTCN (published)")
        assert (lines[key].figures == {}) == alone
    assert {key for key, line in lines.items() if line.run} >= set(PUBLISHED[experiment]) - {
        key for key in PUBLISHED[experiment] if key[0].startswith(("FTCN (published)", "average"))
    }


def test_table1_with_its_average_and_differences(caches):
    header, rows = table_cells(result_of("table1", caches, TABLE1))
    assert header == [
        "held out",
        "tested on",
        "real + fake videos",
        "AUC",
        "AUC, paper",
        "difference",
        "ACC at 0.5",
        "ACC at 0.5, paper",
        "difference",
        "EER",
        "AP",
    ]
    assert rows[0] == [
        "Deepfakes",
        "FaceForensics++",
        "140 + 140",
        "90.1 (89.1-92.1)",
        "99.7",
        "-9.6",
        "80.0 (79.0-82.0)",
        "97.5",
        "-17.5",
        "10.0 (9.0-12.0)",
        "90.0 (89.0-92.0)",
    ]
    mean = (90.1 + 80 + 70 + 60.1) / 4
    assert [row[0] for row in rows[1:]] == [*PAPER[1:], "average", "FTCN (published), average"]
    average = [f"{mean:.1f}", "99.6", f"{mean - 99.6:+.1f}", "65.0", "98.2", "-33.2", "10.0", "90.0"]
    assert rows[4][2:] == ["-", *average]
    assert rows[5][2:] == ["-", "-", "99.5", *["-"] * 6]


def test_an_average_over_other_manipulations_is_not_compared(tmp_path):
    caches = make_caches(tmp_path, methods=("Deepfakes", "FaceSwap"))
    result = result_of("table1", caches, dict(list(TABLE1.items())[:2]))
    lines = by_line(result)
    assert lines["average", "ffpp"].figures["video AUC"] == pytest.approx((90.1 + 80) / 2)
    assert lines["average", "ffpp"].difference("video AUC") is None
    assert lines["FaceSwap", "ffpp"].difference("video AUC") == pytest.approx(80 - 99.7)
    assert lines["Face2Face", "ffpp"].figures == {}  # the paper's alone


def test_synthetic_figures_stand_beside_the_published_but_are_not_compared(tmp_path):
    caches = make_caches(tmp_path, methods=("FullJitter", "GainFlicker"), synthetic=True)
    train = FakeTrain()
    result = run("table1", caches, tmp_path / "out", train)
    assert result.synthetic
    header, rows = table_cells(result)
    assert "difference" not in header
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == ["FullJitter", "GainFlicker", *PAPER, "average", "FTCN (published), average"]
    assert table["FullJitter"]["AUC, paper"] == "-"
    assert (table["Deepfakes"]["AUC"], table["Deepfakes"]["AUC, paper"]) == ("-", "99.7")
    assert (table["average"]["ACC at 0.5, paper"], table["average"]["AUC"]) != ("98.2", "-")
    text = render_markdown(result)
    assert SYNTHETIC_NOTE in text
    assert "The published figures are of the real datasets; figures of synthetic videos cannot be compared." in text
    assert all(
        "synthetic matched-marginals" in load_model(c.out / "model.safetensors")[1].origin for c in train.trained
    )


def test_nothing_synthetic_is_compared_not_even_under_the_papers_names(caches):
    lines = whole("table1", caches, synthetic=True).lines
    assert [line.difference("video AUC") for line in lines] == [None] * 6
    assert None not in [line.difference("video AUC") for line in whole("table1", caches).lines[:5]]


def test_one_synthetic_test_set_is_enough_for_the_note(caches, tmp_path):
    dfdc = make_cache(tmp_path / "dfdc", **COUNTS, **DFDC)
    result = run("table2", caches | {"dfdc": dfdc}, tmp_path / "out", FakeTrain())
    assert SYNTHETIC_NOTE in render_markdown(result)
    assert SYNTHETIC_NOTE not in render_markdown(run("table2", caches, tmp_path / "out", FakeTrain()))


def test_scale_is_stated(caches):
    text = render_markdown(result_of("table1", caches, TABLE1))
    assert "- Model: of no preset, width 2, clips of 8 frames of 16 x 16 pixels\n" in text
    assert "- Training: 2 epochs, 4 clips an update, learning rate 0.001, fp32, seed 0\n" in text
    assert "- Trained on: 16 clips of 8 videos\n- Chosen by: 16 clips of 8 videos of the split val\n" in text
    assert "- Tested on: 140 + 140 videos of FaceForensics++\n" in text
    result = result_of("table1", caches, TABLE1)._replace(config=train_paper())
    assert "- Model: the preset paper, clips of 32 frames of 224 x 224 pixels\n" in render_markdown(result)


def test_the_page_names_every_setting_that_is_not_a_presets():
    usual = TRAIN_PRESETS["paper"]()
    assert changes(usual) == changes(replace(usual, log_every=7)) == "the preset paper"
    other = replace(usual, model=replace(usual.model, num_branches=2), loss=replace(usual.loss, mi=0.5))
    assert changes(other) == "the preset paper with model.num_branches 2, loss.mi 0.5"


def test_a_name_cannot_break_the_table(tmp_path):
    caches = make_caches(tmp_path, methods=("a|b\nc", "FaceSwap"))
    text = render_markdown(result_of("table1", caches, {("a|b\nc", "ffpp"): group(0.5, 0.5)}))
    assert "| a\\|b\\nc | FaceForensics++ | 140 + 140 | 50.0 (49.0-52.0) |" in text
    assert [r.name.rpartition("-")[0] for r in plan("table1", CONFIG, caches)] == [
        "sdr_v4_without_FaceSwap",
        "sdr_v4_without_a_b_c",
    ]


def test_files_hold_the_same_figures(caches, tmp_path):
    result = result_of("table1", caches, TABLE1)
    assert [path.name for path in write_result(result, tmp_path)] == ["table1.json", "table1.csv", "table1.md"]
    facts = json.loads((tmp_path / "table1.json").read_text())
    assert facts == json.loads(json.dumps(to_facts(result)))
    assert (facts["experiment"], facts["unit"], facts["synthetic"]) == ("table1", "percent", False)
    assert facts["config"]["model"]["num_branches"] == 4
    assert facts["runs"] == {r.name: {"row": r.row, "videos": 8, "clips": 16} for r in result.runs}
    line = facts["lines"][0]
    assert (line["row"], line["run"]) == ("Deepfakes", result.runs[0].name)
    assert line["video AUC"] == pytest.approx(90.1)
    assert (line["published video AUC"], line["published video accuracy"]) == (99.7, 97.5)
    assert line["difference video AUC"] == pytest.approx(90.1 - 99.7)
    with open(tmp_path / "table1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert float(rows[0]["video AUC high"]) == pytest.approx(92.1)
    assert (rows[5]["video AUC"], rows[5]["published video AUC"]) == ("", "99.5")
    assert (tmp_path / "table1.md").read_text() == render_markdown(result)


# Figure 2's page


@pytest.fixture
def figure2(caches) -> Result:
    pytest.importorskip("jinja2")
    pytest.importorskip("plotly")
    return whole("figure2", caches)


def test_page_holds_curves_and_table_and_loads_nothing(figure2):
    page = render_figure(figure2)
    assert "default-src 'none'" in page
    assert "synthetic-banner" not in page
    curves = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [curve["name"] for curve in curves] == ["FaceForensics++", "Celeb-DF-v2", "DFDC"]
    lines = by_line(figure2)
    for curve, dataset in zip(curves, ("ffpp", "celebdf", "dfdc"), strict=True):
        assert curve["branches"] == [1, 2, 3, 4, 5, 6]
        ours = [lines[f"V = {V}", dataset] for V in range(1, 7)]
        assert curve["auc"] == [line.figures["video AUC"] for line in ours]
        high = [value + up for value, up in zip(curve["auc"], curve["up"], strict=True)]
        low = [value - down for value, down in zip(curve["auc"], curve["down"], strict=True)]
        assert [*zip(low, high, strict=True)] == pytest.approx([line.intervals["video AUC"] for line in ours])
    assert [curve["paper"] for curve in curves] == [[], [[4, 88.5]], [[4, 76.2]]]
    assert page.count("<tr>") == 1 + 18
    assert "synthetic-banner" in render_figure(figure2._replace(synthetic=True))


def test_page_draws_itself_and_asks_for_nothing(figure2, open_html):  # noqa: F811, the fixture
    page = open_html(render_figure(figure2))
    wait_until(lambda: find(page, "#curves").get_attribute("data-drawn") == "true")
    curves, points = 3, 2  # one for each dataset, and the published ones
    assert len(page.find_elements("css selector", "#curves .scatterlayer .trace")) == curves + points
    assert len(page.find_elements("css selector", "#curves .errorbar")) == curves * 6
    assert texts(page, "#curves .legendtext")[1:3] == ["Celeb-DF-v2", "Celeb-DF-v2, published"]
    assert shown(page, "#title") == "Figure 2: number of branches"
    assert len(texts(page, "#figures tbody tr")) == 18


# the command

SIZES = ("num_frames", "image_size", "width", "backbone_stages", "embed_dim", "num_heads", "head_dim", "mlp_dim")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `sdr reproduce` with the fake training; gives the exit code and what was printed."""
    pytest.importorskip("jsonargparse")
    from sdr.cli import main

    def run(*arguments, train: FakeTrain | None = None):
        monkeypatch.setattr("sdr.reproduce.reproduce", partial(reproduce, train=train or FakeTrain()))
        sizes = [f"--model.{name}={getattr(MODEL, name)}" for name in SIZES]
        options = ["--model.blocks=[1]", "--device=cpu", "--epochs=2", "--batch_size=4", *sizes]
        code = main(["reproduce", *map(str, arguments), *options])
        return code, capsys.readouterr()

    return run


def test_command_writes_and_prints_the_table(command, caches, tmp_path):
    pytest.importorskip("rich")
    train = FakeTrain()
    code, printed = command("table2", "--data", *caches.values(), "--out", tmp_path / "out", "--seed=3", train=train)
    assert (code, printed.err.count("sdr reproduce:")) == (0, 0)
    (call,) = train.trained
    assert call.config == replace(CONFIG, lr=call.config.lr, warmup_epochs=call.config.warmup_epochs, seed=3)
    assert "Table II: other datasets" in printed.out
    assert "2 epochs, 4 clips an update" in printed.out
    assert f"written: {tmp_path}/out/table2.json, {tmp_path}/out/table2.csv, {tmp_path}/out/table2.md" in printed.out
    assert SYNTHETIC_NOTE not in printed.out
    assert "| SDR | Celeb-DF-v2 | 2 + 2 |" in (tmp_path / "out/table2.md").read_text()


def test_command_ends_in_one_line_where_it_is_refused(command, caches, tmp_path):
    code, printed = command("table2", "--data", caches["ffpp"], "--out", tmp_path / "out")
    assert code == 2
    assert "sdr reproduce: --data: table2 needs a clip cache of the layout celebdf" in printed.err
    code, printed = command("table1", "--data", caches["ffpp"], "--out", tmp_path / "out", "--loss.contrastive=0")
    assert code == 2
    assert "sdr reproduce: options: loss.contrastive must be positive" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_command_stops_on_a_signal_and_goes_on(number, code, command, caches, tmp_path):
    arguments = "table1", "--data", caches["ffpp"], "--out", tmp_path / "out"
    train = FakeTrain(at_second=lambda: os.kill(os.getpid(), number))
    found, printed = command(*arguments, train=train)
    assert (found, len(train.trained)) == (code, 1)
    assert (
        f"sdr reproduce: stopped, what is done is kept; the same command goes on from there: {tmp_path}" in printed.err
    )
    assert not (tmp_path / "out/table1.md").exists()
    train = FakeTrain()
    assert command(*arguments, train=train)[0] == 0
    assert len(train.trained) == 3


def test_published_of_a_line_is_by_metric():
    line = Line("x", "ffpp", "x", 1, 1, {"video AUC": 90.0, "video EER": 1.0}, {}, Published(80.0), comparable=True)
    assert (line.paper("video AUC"), line.paper("video accuracy"), line.paper("video EER")) == (80.0, None, None)
    assert (line.difference("video AUC"), line.difference("video EER")) == (10.0, None)
