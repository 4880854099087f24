"""The benchmarks' report: rows of made-up results of both forms, README's part, and the page in a browser."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from importlib import import_module
from pathlib import Path

import pytest
from pages import browser, find, open_html, shown, texts, wait_until  # noqa: F401, fixtures

from sdr import ftcn_released
from sdr.layers import distinct, layers_of

ROOT = Path(__file__).parent.parent
pytest.importorskip("jinja2")
pytest.importorskip("plotly")

RATES = 60e9, 20e9  # of the made-up CPU, FLOP/s and bytes/s
CEILINGS = {"flops_per_s": {"float32": RATES[0]}, "bytes_per_s": RATES[1], "threads": 1}


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return import_module


def stamp(gpu: str = "none", **changes: object) -> dict[str, object]:
    found = {
        "device": "Made-up CPU, 2 cores" if gpu == "none" else gpu,
        "gpu": gpu,
        "driver": "580.1",
        "cuda": "13.0",
        "torch": "2.13.0",
        "triton": "3.7.1",
        "python": "3.11.9",
        "commit": "0123456789",
        "dirty": False,
        "date": "2026-01-02",
        "time": "10:00:00+0000",
    }
    return found | changes


def benchmark(subject: str, op: str, impl: str, seconds: float, **info: object) -> dict[str, object]:
    info = {"subject": subject, "op": op, "impl": impl, "dtype": "float32", "threads": 1, **info}
    return {"name": "bench_op", "stats": {"median": seconds, "data": [seconds] * 5}, "extra_info": info}


def suite(scale: float = 1.0, **changes: object) -> dict[str, object]:
    """What --record writes: every layer at half its floor, a model over frames, saved bytes; all times ``scale``."""
    rows = []
    for layer, _ in distinct(layers_of(replace(ftcn_released(), num_branches=1), 1, 4)):
        floor = layer.floor(*RATES)
        work = {"flops": layer.flops, "bytes": layer.bytes, "floor_s": floor, "bound": layer.bound(*RATES)}
        subject = f"{layer.name}, 1 clip x 1 branch"
        rows.append(benchmark(subject, layer.op, "reference", 6 * floor, **work, share_of_floor=1 / 6))
        compared = {
            "share_of_floor": 0.5 / scale,
            "baseline": {"impl": "reference", "median_s": 6 * floor, "ratio": 3.0},
        }
        rows.append(benchmark(subject, layer.op, "cpu", 2 * floor * scale, **work, **compared))
    for frames in (8, 16, 64):
        subject = f"scaling ftcn_released, frames: 1 clips x 1 branches of {frames} x 112 x 112"
        rows.append(benchmark(subject, "model", "cpu", 0.01 * frames * scale, clips=1, clips_per_s=100 / frames))
    whole = {"threads": 2, "baseline": {"impl": "reference", "median_s": 2.8, "ratio": 4.0}}
    rows.append(benchmark("inference ftcn_released, 1 clip x 1 branch", "model", "cpu", 0.7 * scale, **whole))
    parts = {"stem": 2e9, "res2": 1e9, "res3": 0.5e9, "res4": 0.25e9}
    rows.append(benchmark("saved tensors", "training memory", "cpu gram", 1.0, bytes_per_clip=parts))
    reason = {"bench/bench_ops.py::bench_op[res2.1-triton]": "needs a GPU"}
    machine = {"stamp": stamp(**changes), "ceilings": CEILINGS, "ceilings_by_threads": {"1": CEILINGS}}
    return {"machine_info": machine, "benchmarks": rows, "not_measured": reason, "version": "5.3.1"}


def gpu(name: str = "NVIDIA H200", **changes: object) -> dict[str, object]:
    """What make gpu writes."""
    timings = {
        "inference ftcn_released bf16": {"clips": 16, "clips_per_s": 800.0, "median_s": 0.02, "share_of_floor": 0.6},
        "latency ftcn_released bf16 wall": {"clips": 1, "median_s": 1.5e-3},
        "latency ftcn_released bf16 wall, 1 branch": {"clips": 1, "median_s": 0.7e-3},
        **{f"branches {n}": {"clips": 16, "median_s": n * 5e-3} for n in (1, 2, 4)},
        "import to first result, empty cache": {"seconds": 5.0},
        "deviation from linear, branches": {"1": 0.1},
        "op res3.0, 16 clips, ftcn_released": {
            **{"op": "temporal_bottleneck", "dtype": "bfloat16", "clips": 16, "count": 1, "median_s": 4e-3},
            **{"flops": 10**12, "bytes": 10**9},
            **{"floor_s": 2e-3, "share_of_floor": 0.5, "bound": "arithmetic"},
        },
    }
    steps = {
        "ceilings": {"ceilings": {"flops_per_s": {"bfloat16": 7e14}, "bytes_per_s": 4e12, "threads": 0}},
        "timings": timings,
        "peers": {
            "eager loop bf16 NCTHW, 16 clips": {"clips": 16, "clips_per_s": 200.0, "median_s": 0.08},
            "torch.compile default bf16, 1 clips": "not measured: OutOfMemoryError: CUDA out of memory",
        },
        "losses": {"16 x 4 x 1024 bf16, values and gradients, triton": {"median_s": 2e-5, "launches": 1}},
        "training": {"step gram": {"clips": 16, "median_s": 0.09, "clips_per_s": 178.0}},
    }
    outcomes = {step: {"status": "done", "result": result} for step, result in steps.items()}
    return {"rehearsal": False, "stamp": stamp(name, **changes), "steps": outcomes, "summary": [], "failed": []}


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder of two runs of a CPU, one of an H200, and the hand-copied tables, the audit and the curves."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("by_hand.json", "audit_sm80_sm90.json", "loss_curves_interpreted.csv"):
        shutil.copy(ROOT / "bench" / "results" / name, folder)
    (folder / "new.json").write_text(json.dumps(suite(date="2026-01-03", commit="fedcba9876")))
    (folder / "old.json").write_text(json.dumps(suite(scale=2.0)))
    (folder / "gpu.json").write_text(json.dumps(gpu()))
    return folder


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


# ---------------------------------------------------------------- rows


def test_rows_of_the_suites_form(bench, results):
    found = bench("rows").read_results(results)
    assert found.errors == []
    old, new = (run for run in found.runs if run.device.startswith("Made-up"))
    assert [run.file for run in (old, new)] == ["old.json", "new.json"]  # by date, not by name
    assert (new.commit, new.date, new.command) == ("fedcba9", "2026-01-03 10:00:00+0000", bench("rows").SUITE)
    assert new.versions == {"torch": "2.13.0", "triton": "3.7.1", "python": "3.11.9"}
    assert new.ceilings == {1: CEILINGS}
    row = next(row for row in new.rows if row.subject.startswith("res3.1,") and row.impl == "cpu")
    assert (row.op, row.dtype, row.threads) == ("temporal_bottleneck", "float32", 1)
    assert row.median_s == pytest.approx(2 * row.figures["floor_s"])
    assert row.figures["baseline"]["ratio"] == 3.0
    (missing,) = (row for row in new.rows if row.median_s is None)
    assert (missing.subject, missing.reason) == ("bench/bench_ops.py::bench_op[res2.1-triton]", "needs a GPU")


def test_rows_of_make_gpus_form(bench, results):
    (run,) = (run for run in bench("rows").read_results(results).runs if run.device == "NVIDIA H200")
    found = {(row.subject, row.op, row.impl): row.median_s for row in run.measured}
    assert found == {
        ("inference ftcn_released, 16 clips x 4 branches", "model", "bf16"): 0.02,
        ("latency ftcn_released, 1 clip x 4 branches", "model", "bf16 wall"): 1.5e-3,
        ("latency ftcn_released, 1 clip x 1 branch", "model", "bf16 wall"): 0.7e-3,
        ("inference ftcn_released, 16 clips x 1 branch", "model", "bf16 scaling"): 5e-3,
        ("inference ftcn_released, 16 clips x 2 branches", "model", "bf16 scaling"): 0.01,
        ("inference ftcn_released, 16 clips x 4 branches", "model", "bf16 scaling"): 0.02,
        ("import to first result", "first result", "empty cache"): 5.0,
        ("res3.0, 16 clips x 4 branches", "temporal_bottleneck", "auto"): 4e-3,
        ("inference ftcn_released, 16 clips x 4 branches", "model", "eager loop bf16 NCTHW"): 0.08,
        ("16 x 4 x 1024 bf16, values and gradients", "losses", "triton"): 2e-5,
        ("training step ftcn_released, 16 clips x 4 branches", "training step", "gram"): 0.09,
    }
    (missing,) = (row for row in run.rows if row.median_s is None)
    assert missing.reason == "OutOfMemoryError: CUDA out of memory"
    assert run.versions["driver"] == "580.1"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1}', "bad.json: is neither a run of the benchmarks nor of make gpu, nor any other result"),
        ("[1, 2]", "bad.json: is neither a run"),
        ("{", "bad.json: Expecting property name"),
        (json.dumps(gpu() | {"rehearsal": True}), "bad.json: is a rehearsal, and no result"),
        (json.dumps(suite() | {"machine_info": {}}), "bad.json: has no stamp: --record writes one"),
        (json.dumps(gpu() | {"stamp": {}}), "bad.json: a part is missing or of another form: KeyError"),
    ],
    ids=["other", "list", "broken", "rehearsal", "unstamped", "partial"],
)
def test_a_file_that_is_no_result_is_one_line_that_names_it(bench, results, capsys, text, error):
    (results / "bad.json").write_text(text)
    found = bench("rows").read_results(results)
    (line,) = found.errors
    assert line.startswith(error)
    assert len(found.runs) == 3  # the rest still counts
    assert bench("report").main(["--results", str(results), "--out", str(results / "page")]) == 1
    assert capsys.readouterr().err == f"make report: {line}\n"
    assert not (results / "page").exists()


# ---------------------------------------------------------------- figures


def test_curves_without_rows_are_one_line(bench, results):
    (results / "loss_curves_empty.csv").write_text("step,reference\n")
    found = bench("rows").read_results(results)
    assert found.errors == ["loss_curves_empty.csv: holds no columns of numbers"]
    assert "loss_curves_interpreted.csv" in found.curves


def test_stages_add_up_the_layers(bench, results):
    run = next(run for run in bench("rows").read_results(results).runs if run.file == "new.json")
    found = {(row["impl"], row["stage"]): row for row in bench("figures").stages(run)}
    layers = layers_of(replace(ftcn_released(), num_branches=1), 1, 4)
    assert {stage for _, stage in found} == {"stem", "res2", "res3", "res4", "head"}
    for stage in ("stem", "res2", "res3", "res4", "head"):
        floor = 1e3 * sum(layer.floor(*RATES) for layer in layers if layer.stage == stage)
        assert found["cpu", stage]["floor_ms"] == pytest.approx(floor, rel=1e-4)
        assert found["cpu", stage]["ms"] == pytest.approx(2 * floor, rel=1e-4)
        assert found["reference", stage]["ms"] == pytest.approx(6 * floor, rel=1e-4)


def test_a_stage_with_a_missing_layer_is_left_out(bench, results):
    run = next(run for run in bench("rows").read_results(results).runs if run.file == "new.json")
    rows = tuple(row for row in run.rows if not (row.subject.startswith("res3.1,") and row.impl == "cpu"))
    found = {(row["impl"], row["stage"]) for row in bench("figures").stages(replace(run, rows=rows))}
    assert ("cpu", "res3") not in found
    assert {("cpu", "res2"), ("reference", "res3")} <= found


def test_roofline_points_lie_below_the_roof_by_their_share(bench, results):
    figures = bench("figures")
    run = next(run for run in bench("rows").read_results(results).runs if run.file == "new.json")
    (plot,) = figures.rooflines(run)
    assert plot["title"] == "Made-up CPU, 2 cores, float32, 1 thread, commit fedcba9"
    kernels = {point["op"] for point in plot["points"]}
    assert kernels == {layer.op for layer in layers_of(ftcn_released(), 1)}
    for point in [*plot["points"], *figures.design_roofline()["points"]]:
        rates = RATES if point["impl"] in ("cpu", "reference") else figures.H200_RATES
        roof = min(rates[0], point["x"] * rates[1])
        assert point["y"] == pytest.approx(point["share"] * roof, rel=1e-3)


def test_scaling_and_history_put_alike_rows_together(bench, results):
    runs = bench("rows").read_results(results).runs
    figures = bench("figures")
    frames = figures.scaling(next(run for run in runs if run.file == "new.json"))
    assert frames == [
        {
            "axis": "frames",
            "name": "scaling ftcn_released, frames, 112 pixels, cpu float32, 1 clip x 1 branch",
            "size": [8, 16, 64],
            "ms": [80.0, 160.0, 640.0],
        }
    ]
    (branches,) = figures.scaling(next(run for run in runs if run.device == "NVIDIA H200"))
    assert (branches["axis"], branches["size"], branches["ms"]) == ("branches", [1, 2, 4], [5.0, 10.0, 20.0])
    line = next(h for h in figures.history(runs) if "64 x 112" in h["name"])
    assert "training memory" not in {h["op"] for h in figures.history(runs)}  # its times are those of counting
    assert (line["runs"], line["ms"]) == (["2026-01-02 0123456", "2026-01-03 fedcba9"], [1280.0, 640.0])


def test_memory_keeps_computed_and_counted_apart(bench, results):
    rows = {(m["kind"], m["scheme"]): m for m in bench("figures").memory(bench("rows").read_results(results))}
    assert set(rows) == {("counted", "gram"), *(("computed", scheme) for scheme in ("eager", "fused", "gram"))}
    assert rows["counted", "gram"]["all"] == 3.75
    assert rows["computed", "fused"]["all"] == pytest.approx(3.1, abs=0.05)


# ---------------------------------------------------------------- README


def written(bench, results: Path, capsys, *arguments: str) -> tuple[int, Path, str]:
    """Exit code of the command, README's path, and what it said."""
    readme = results.parent / "README.md"
    if not readme.exists():
        readme.write_text("# SDR\n\n<!-- measured: begin -->\nold\n<!-- measured: end -->\n\nafter\n")
    places = ["--results", str(results), "--readme", str(readme), "--out", str(results.parent / "page")]
    code = bench("report").main([*places, *arguments])
    said = capsys.readouterr()
    return code, readme, said.out + said.err


def test_readme_holds_what_was_measured_and_where(bench, results, capsys):
    code, readme, _ = written(bench, results, capsys)
    text = readme.read_text()
    assert code == 0
    assert text.startswith("# SDR\n\n<!-- measured: begin -->\nWritten by `make report`")
    assert text.endswith("\n<!-- measured: end -->\n\nafter\n")
    flat = " ".join(text.split())
    assert "Made-up CPU, 2 cores, torch 2.13.0, triton 3.7.1, python 3.11.9, commit fedcba9, 2026-01-03;" in flat
    assert "1 thread: float32 60 GFLOP/s, copy 20.0 GB/s" in flat
    assert "commit 0123456, 2026-01-02; `pytest" not in flat  # of a device only the newest run
    assert "| `temporal_bottleneck` | cpu | float32, 1 thread | 9 | 50 % | 3.00 |" in flat
    what = "inference ftcn_released, 1 clip x 1 branch | cpu | float32, 2 threads"
    assert f"| {what} | 700 ms |  | 4.00 x reference |" in text
    assert "scaling ftcn_released" not in text  # the page has the curves
    assert "| cpu gram | 2.00 | 1.00 | 0.50 | 0.25 | 3.75 |" in text
    assert "Not measured there, and of how many rows: needs a GPU (1)." in flat
    target = "| inference, 16 clips x 4 branches | at least 700 clips/s | at least 1,000 clips/s | 800 clips/s |"
    assert target in text
    assert "| training memory, a clip of 4 branches | at most 3.3 GB | at most 1.5 GB | not measured |" in text
    assert "No GPU has run these kernels yet." not in text
    for table in bench("rows").read_results(results).tables:  # what was copied by hand
        assert all("| " + " | ".join(row) + " |" in text for row in table["rows"])
        assert f"commit {table['commit']}, {table['date']}; `{table['command']}`" in flat


def test_a_ratio_is_of_the_reference_or_not_said(bench, results):
    changed = suite(date="2026-01-03", commit="fedcba9876")
    for row in changed["benchmarks"]:
        if "baseline" in row["extra_info"] and row["extra_info"]["op"] == "temporal_stem":
            row["extra_info"]["baseline"] |= {"impl": "cpu", "ratio": 0.2}
    (results / "new.json").write_text(json.dumps(changed))
    part = bench("report").readme_part(bench("rows").read_results(results))
    (line,) = (line for line in part.splitlines() if line.startswith("| `temporal_stem` | cpu"))
    assert "0.20" not in line
    assert line.endswith("|  |")


def test_without_a_gpus_run_its_targets_are_not_measured(bench, results, capsys):
    (results / "gpu.json").write_text(json.dumps(gpu("NVIDIA A100")))  # another GPU's is none of an H200
    _, readme, _ = written(bench, results, capsys)
    flat = " ".join(readme.read_text().split())
    assert "no run of `make gpu` on an H200 is among the results yet:" in flat
    assert "| inference, 16 clips x 4 branches | at least 700 clips/s | at least 1,000 clips/s | not measured |" in flat
    assert "NVIDIA A100, torch" in flat
    (results / "gpu.json").unlink()
    _, readme, _ = written(bench, results, capsys)
    assert "No GPU has run these kernels yet." in readme.read_text()


def test_check_finds_a_changed_figure_and_writes_nothing(bench, results, capsys):
    written(bench, results, capsys)
    code, readme, said = written(bench, results, capsys, "--check")
    assert (code, said.startswith("README.md says what the results say, and ")) == (0, True)
    text = readme.read_text()
    readme.write_text(text.replace("| 700 ms |", "| 600 ms |"))
    code, readme, said = written(bench, results, capsys, "--check")
    assert code == 1
    assert said.count("\n") == 1
    assert "README.md: line " in said
    assert "600 ms" in said
    assert "700 ms" in said
    assert "600 ms" in readme.read_text()
    content = json.loads((results / "new.json").read_text())
    content["benchmarks"][-2]["stats"]["median"] = 0.8
    readme.write_text(text)
    (results / "new.json").write_text(json.dumps(content))
    assert written(bench, results, capsys, "--check")[0] == 1
    readme.write_text("no marks")
    code, _, said = written(bench, results, capsys)
    assert (code, said.startswith("make report: README must have the lines <!-- measured: begin -->")) == (1, True)


def test_the_same_results_give_the_same_bytes(bench, results, capsys):
    def files() -> list[bytes]:
        _, readme, _ = written(bench, results, capsys)
        return [readme.read_bytes(), (results.parent / "page" / "index.html").read_bytes()]

    first = files()
    for path in sorted(results.iterdir(), reverse=True):  # in another order, at another time
        path.write_bytes(path.read_bytes())
    assert files() == first


def test_the_committed_results_are_readable(bench):
    found = bench("rows").read_results(ROOT / "bench" / "results")
    assert found.errors == []
    assert found.audit is not None
    assert found.curves


# ---------------------------------------------------------------- the page


def page_of(bench, results: Path) -> str:
    return bench("report_page").render(bench("rows").read_results(results))


def drawn(page, selector: str):
    """An element once its plot is drawn."""
    element = find(page, selector)
    wait_until(lambda: element.get_attribute("data-drawn") == "true")
    return element


def test_every_plot_is_drawn_and_has_its_table(bench, results, open_html):  # noqa: F811
    text = page_of(bench, results)
    page = open_html(text)
    for plot in page.find_elements("css selector", ".plot"):
        wait_until(lambda plot=plot: plot.get_attribute("data-drawn") == "true")
        assert plot.get_attribute("aria-label")
    names = {plot.get_attribute("id") for plot in page.find_elements("css selector", ".plot")}
    assert names == {
        *("floors-plot", "memory-plot", "history-plot", "curves-0", "stage-0", "scaling-0", "scaling-1"),
        *("roofline-0", "roofline-1", "roofline-2"),
    }
    count = "return [...document.querySelectorAll('#roofline-0 path.point')].length"
    assert page.execute_script(count) == len(data_of(text)["rooflines"][0]["points"])
    lines = page.find_elements("css selector", "#history-plot g.trace")
    assert len(lines) == 4 + 7  # models of the CPU and of the GPU
    bars = "return document.querySelectorAll('#floors-plot .trace.bars path').length"
    assert page.execute_script(bars) == 5 + 5 + 3
    find(page, "#floors-plot ~ details summary, figure:has(#floors-plot) + details summary").click()
    assert "block" in " ".join(texts(page, "figure:has(#floors-plot) + details td"))


def test_history_shows_the_op_that_is_chosen(bench, results, open_html):  # noqa: F811
    page = open_html(page_of(bench, results))
    drawn(page, "#history-plot")
    chosen = find(page, "#history-op")
    assert chosen.get_attribute("value") == "model"
    chosen.send_keys("temporal_s")
    traces = "return document.getElementById('history-plot').data.map(line => line.name)"
    wait_until(lambda: len(page.execute_script(traces)) == 2)
    assert page.execute_script(traces)[0].startswith("stem, 1 clip x 1 branch, cpu")


def test_the_page_names_sources_and_what_is_missing(bench, results, open_html):  # noqa: F811
    page = open_html(page_of(bench, results))
    assert shown(page, "h1") == "Benchmarks"
    assert "commit 0123456, 2026-01-02; make gpu" in texts(page, "#targets ~ p")[0]
    sources = " ".join(texts(page, "h3.source"))
    assert "Made-up CPU, 2 cores, torch 2.13.0" in sources
    assert any("cpu gram" in text and "3.75 GB" in text for text in texts(page, "#figures ~ .figures tbody tr"))
    last = [text for text in texts(page, "#figures ~ .figures tbody tr") if "needs a GPU" in text]
    assert last == ["bench/bench_ops.py::bench_op[res2.1-triton] not measured needs a GPU"]
    assert "given, not measured" in " ".join(texts(page, ".roof h3"))


def test_hostile_text_is_escaped(bench, results):
    hostile = "</script><script>alert(1)</script>{{ 7 * 7 }}"
    (results / "new.json").write_text(json.dumps(suite(date="2026-01-03", device=hostile)))
    page = page_of(bench, results)
    ours = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)  # without plotly.js
    assert "<script>alert" not in ours
    assert hostile in unescape(ours)


def test_an_empty_folder_says_not_measured(bench, tmp_path, open_html):  # noqa: F811
    page = open_html(page_of(bench, tmp_path))
    drawn(page, "#floors-plot")
    assert len([text for text in texts(page, "main p") if text.startswith("Not measured: ")]) == 6


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_sideways(bench, results, open_html, browser, width):  # noqa: F811
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = open_html(page_of(bench, results))
        drawn(page, "#history-plot")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
