"""The training report: its figures by hand and by other libraries, and the page in a browser."""

import dataclasses
import json
import math
import re
from html import unescape

import numpy as np
import pytest
from pages import browser, find, open_html, shown, texts, wait_until  # noqa: F401, fixtures

from sdr.evaluate import ScoredVideos
from sdr.terminal import SYNTHETIC_NOTE
from sdr.train_config import TrainConfig, to_json
from sdr.training_report import (
    POINTS,
    TrainingRun,
    duration,
    render_training_report,
    roc,
    settings_tables,
    smooth,
    smoothing_window,
    thin,
)

pytest.importorskip("jinja2")
pytest.importorskip("plotly")
pytest.importorskip("sklearn")


def loss_row(step: int) -> dict[str, float]:
    """Step 7 was skipped."""
    parts = {"total": 3.0, "ce": 0.5, "mi": 0.0, "contrastive": 2.0, "aux": 0.25}
    parts = {name: math.nan if step == 7 and value else value / step for name, value in parts.items()}
    return {"step": step, "epoch": step / 10, "lr": 1e-4, **parts, "grad_norm": 10.0 / step, "skipped": int(step == 7)}


def metric_row(step: int, auc: float) -> dict[str, float]:
    return {"step": step, "epoch": step / 10, "video AUC": auc, "video accuracy": 0.5, "video EER": 1 - auc}


SCORED = ScoredVideos(
    "ffpp",
    tuple(f"v{i}.mp4" for i in range(8)),
    np.array([0.1, 0.2, 0.3, 0.7, 0.3, 0.8, 0.9, 1.0]),
    np.array([0, 0, 0, 0, 1, 1, 1, 1]),
    ("real",) * 4 + ("FaceSwap", "Deepfakes", "Deepfakes", "Deepfakes"),
)
RUN = TrainingRun(
    title="Run of the test",
    config={"lr": 1e-4, "init": None, "loss": {"mi": 1.0, "anchors": "all"}},
    origin="twenty videos",
    synthetic=True,
    version="0.1.0",
    created="2026-01-02T03:04:05+00:00",
    losses=[loss_row(step) for step in range(1, 201)],
    throughput=[
        {"step": step, "seconds": 60.0, "clips_per_second": 8.0, "memory_gb": 0.0, "skipped_total": 1}
        for step in (100, 200)
    ],
    validation=[metric_row(50, 0.6), metric_row(100, 0.9), metric_row(150, 0.9), metric_row(200, 0.7)],
    scored=SCORED,
    threshold=0.75,
    metrics={"video AUC": 0.9, "video accuracy": 0.875, "video AP": math.nan},
)
BARE = dataclasses.replace(RUN, synthetic=False, validation=[], scored=None, threshold=None, metrics={})


def data_of(run: TrainingRun) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', render_training_report(run), re.S).group(1))


# ---------------------------------------------------------------- without a browser


def test_smooth_is_the_mean_of_what_is_finite_around():
    values = np.array([1.0, math.nan, 3.0, 5.0, math.inf, math.nan, math.nan])
    nearest = [values[max(0, i - 1) : i + 2] for i in range(7)]
    expected = [np.mean(part[np.isfinite(part)]) if np.isfinite(part).any() else math.nan for part in nearest]
    assert smooth(values, 3) == pytest.approx(expected, rel=1e-15, nan_ok=True)
    assert math.isnan(smooth(values, 3)[-1])
    assert smooth(np.array([2.0, 4.0]), 1).tolist() == [2.0, 4.0]
    assert [smoothing_window(n) for n in (1, 99, 100, 200, 20000)] == [1, 1, 3, 5, 401]


@pytest.mark.parametrize("length", [1, 2, POINTS, POINTS + 1, 100_000])
def test_thin_is_even_and_keeps_both_ends(length):
    kept = thin(length, POINTS)
    assert (kept[0], kept[-1], len(kept)) == (0, length - 1, min(length, POINTS))
    assert length < 3 or np.ptp(np.diff(kept)) <= 1


def test_roc_is_scikit_learns():
    from sklearn.metrics import roc_curve

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    for scores in (rng.random(200), rng.integers(0, 5, 200) / 5, np.full(200, 0.5)):  # ties, nothing but ties
        expected = roc_curve(labels, scores, drop_intermediate=False)[:2]
        for ours, theirs in zip(roc(scores, labels), expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-15)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.25, "3.2 s"),
        (59.9, "59.9 s"),
        (60, "1 min"),
        (3599, "1 h 0 min"),
        (3700, "1 h 2 min"),
        (180000, "2 days 2 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_data_is_what_was_logged():
    data = data_of(RUN)
    curves = {curve["name"]: curve for curve in data["curves"]}
    assert list(curves) == ["total", "ce", "contrastive", "aux", "lr", "grad_norm", "clips_per_second"]  # mi, memory: 0
    total = curves["total"]
    assert total["step"] == list(range(1, 201))
    assert total["value"][:7] == [3.0, 1.5, 1.0, 0.75, 0.6, 0.5, None]
    assert total["smooth"][0] == pytest.approx((3.0 + 1.5 + 1.0) / 3, rel=1e-4)  # two neighbours to the right
    assert curves["clips_per_second"] | {"title": ""} == {
        **{"name": "clips_per_second", "title": "", "group": "speed", "step": [100, 200]},
        **{"value": [8.0, 8.0], "smooth": None},
    }
    assert data["skipped"] == [7]
    assert data["validation"]["best"] == {"epoch": 15.0, "step": 150, "video AUC": 0.9}  # the last of two
    assert [curve["name"] for curve in data["validation"]["curves"]] == ["video AUC", "video accuracy", "video EER"]


def test_scores_by_hand():
    scores = data_of(RUN)["scores"]
    assert scores["auc"] == "0.906"  # of 16 pairs 14 are in order and one is a tie
    assert [(m["name"], m["videos"]) for m in scores["methods"]] == [("real", 4), ("Deepfakes", 3), ("FaceSwap", 1)]
    assert [sum(m["counts"]) for m in scores["methods"]] == [4, 3, 1]
    assert scores["methods"][1]["counts"][-1] == 1  # a score of 1 is in the last bin
    assert [(t["value"], t["false"], t["true"]) for t in scores["thresholds"]] == [(0.5, 0.25, 0.75), (0.75, 0.0, 0.75)]


def test_a_long_run_is_thinned_and_small():
    losses = [loss_row(step) for step in range(1, 30_001)]
    page = render_training_report(dataclasses.replace(BARE, losses=losses))
    short = render_training_report(dataclasses.replace(BARE, losses=losses[:1]))
    assert len(page) - len(short) < 1e6
    curve = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))["curves"][0]
    assert len(curve["step"]) == POINTS
    assert curve["step"][-1] == 30_000
    assert "thinned evenly" in page


HOSTILE = "</script><script>alert(1)</script>\n\"'&<b>\udcff\u202e{{ 7 * 7 }}"
HOSTILE_SHOWN = "</script><script>alert(1)</script>\\n\"'&<b>\\udcff\\u202e{{ 7 * 7 }}"


def hostile_run() -> TrainingRun:
    scored = SCORED._replace(methods=("real",) * 4 + (HOSTILE,) * 4)
    validation = [row | {HOSTILE: 0.5} for row in RUN.validation]
    texts = dict.fromkeys(("title", "origin", "version", "created"), HOSTILE)
    config = {HOSTILE: HOSTILE, "loss": {HOSTILE: [HOSTILE]}}
    return dataclasses.replace(
        RUN, **texts, config=config, metrics={HOSTILE: 0.5}, scored=scored, validation=validation
    )


def test_hostile_text_is_escaped_everywhere():
    page = render_training_report(hostile_run())
    page.encode("utf-8")
    ours = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.S)  # without plotly.js
    for forbidden in ("<script>alert", "alert(1)</script>", "&<b>", "\udcff", "\u202e"):
        assert forbidden not in ours
    assert unescape(ours).count(HOSTILE_SHOWN) >= 8


def test_a_run_without_validation_or_any_step():
    page = render_training_report(BARE)
    for absent in ("validation-plot", "roc", "histograms", "metrics", "synthetic-banner"):
        assert f'id="{absent}"' not in page
    assert " ".join(page.split()).count(SYNTHETIC_NOTE) == 1  # in the explanations
    empty = render_training_report(dataclasses.replace(BARE, losses=[], throughput=[]))
    assert "No step was logged." in empty
    assert 'class="plot"' not in empty


def test_one_class_has_no_roc():
    one = SCORED._replace(labels=np.zeros(8, np.int64), methods=("real",) * 8)
    assert 'id="roc"' not in render_training_report(dataclasses.replace(RUN, scored=one))


def test_settings_are_all_there():
    config = to_json(TrainConfig())
    tables = settings_tables(config)
    assert {name for name, _ in tables["run"]} == {n for n, value in config.items() if not isinstance(value, dict)}
    assert dict(tables["loss"])["anchors"] == "all"
    assert dict(tables["tpa"])["methods"] == '["color_jitter", "cutout", "flip", "crop"]'


# ---------------------------------------------------------------- in a browser


def drawn(page, selector: str):
    """An element once its plot is drawn."""
    element = find(page, selector)
    wait_until(lambda: element.get_attribute("data-drawn") == "true")
    return element


def test_head_says_what_was_run(open_html):  # noqa: F811
    page = open_html(render_training_report(RUN))
    assert shown(page, "h1") == page.title == "Run of the test"
    assert SYNTHETIC_NOTE in shown(page, "#synthetic-banner")
    assert texts(page, "#metrics dt") == ["video AUC", "video accuracy", "video AP"]
    assert texts(page, "#metrics dd") == ["0.900", "0.875", "undefined"]
    assert "the figures flatter" in shown(page, "#metrics-note")
    names, values = texts(page, "#run dt"), texts(page, "#run dd")
    assert dict(zip(names, values, strict=True)) == {
        "Trained on": "twenty videos",
        "Steps": "200",
        "Skipped steps": "1: their loss or gradient was not finite",
        "Time in training": "2 min",
        "Validation videos": "4 real, 4 fake",
        "Validation threshold": "0.7500, the most accurate there",
        "Made": "2026-01-02T03:04:05+00:00",
        "Version": "0.1.0",
    }


def test_every_plot_is_drawn(open_html):  # noqa: F811
    page = open_html(render_training_report(RUN))
    for name in ("total", "ce", "contrastive", "aux", "lr", "grad_norm", "clips_per_second"):
        plot = drawn(page, f"#curve-{name}")
        lines = len(plot.find_elements("css selector", "g.trace:has(path.js-line)"))
        assert lines == (1 if name in ("lr", "clips_per_second") else 2)
        marks = len(plot.find_elements("css selector", "path.point"))
        assert marks == (1 if name in ("total", "grad_norm") else 0)
    assert "best AUC 0.900" in texts(drawn(page, "#validation-plot"), ".annotation")
    assert texts(find(page, "#validation-plot"), ".legendtext") == ["video AUC", "video accuracy", "video EER"]
    assert "AUC 0.906" in texts(drawn(page, "#roc"), ".annotation")
    assert texts(find(page, "#roc"), ".legendtext") == ["at 0.5", "at 0.750 (validation)"]
    labels = texts(drawn(page, "#histograms"), ".annotation")
    assert labels == ["real, 4 videos", "Deepfakes, 3 videos", "FaceSwap, 1 video", "0.5", "0.750"]
    fills = (
        "return [...document.querySelectorAll('#histograms .trace.bars')].map(b => b.querySelectorAll('path').length)"
    )
    assert page.execute_script(fills) == [40, 40, 40]


def test_table_marks_the_best(open_html):  # noqa: F811
    page = open_html(render_training_report(RUN))
    assert texts(page, "#validation-table thead th") == ["epoch", "step", "video AUC", "video accuracy", "video EER"]
    assert texts(page, "#validation-table tr.best td") == ["15", "150", "0.900", "0.500", "0.100"]
    assert texts(page, "#settings h3") == ["run", "loss"]
    assert texts(page, "#settings td") == ["0.0001", "null", "1.0", "all"]


def test_logarithmic_axes_on_demand(open_html):  # noqa: F811
    page = open_html(render_training_report(RUN))
    drawn(page, "#curve-ce")
    kind = "return document.getElementById('curve-ce').layout.yaxis.type"
    assert page.execute_script(kind) == "linear"
    find(page, "#log-scale").click()
    wait_until(lambda: page.execute_script(kind) == "log")
    assert page.execute_script("return document.getElementById('curve-lr').layout.yaxis.type") != "log"


def test_hostile_text_is_shown_not_run(open_html):  # noqa: F811
    page = open_html(render_training_report(hostile_run()))
    assert shown(page, "h1") == HOSTILE_SHOWN
    assert f"{HOSTILE_SHOWN}, 4 videos" in texts(drawn(page, "#histograms"), ".annotation")


def test_a_bare_run_opens(open_html):  # noqa: F811
    page = open_html(render_training_report(dataclasses.replace(BARE, losses=BARE.losses[:1], throughput=[])))
    assert drawn(page, "#curve-total").find_elements("css selector", "path.point") != []
    assert texts(page, "h2")[:2] == ["Losses", "Optimisation"]


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_sideways(open_html, browser, width):  # noqa: F811
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        origin = "/data/" + "long" * 60
        page = open_html(render_training_report(dataclasses.replace(RUN, origin=origin, config={"init": origin})))
        drawn(page, "#histograms")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
