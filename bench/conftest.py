"""``pytest bench`` runs each benchmark once as a check on tiny shapes; ``pytest bench --benchmark`` times it.

pytest-benchmark's own options keep working. ``--record`` writes its JSON among the results, with what a figure needs to
mean something: the machine's stamp, the two ceilings measured at the start, and why a benchmark was not measured.
"""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: on a shared machine waiting in a loop costs others

import pytest
import torch
from ledger import NOT_MEASURED
from machine import ROOT, file_name, stamp
from timing import CLOCK, ceilings
from turns import fixed_rounds

RESULTS = ROOT / "bench" / "results"
CPU_THREADS = (1, 2)  # that rows have
REASONS = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="time the benchmarks instead of running each once")
    group.addoption("--record", action="store_true", help="write the figures to a JSON of their own in the folder")
    group.addoption("--record-folder", type=Path, default=RESULTS, help="where --record writes; bench/results")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[REASONS] = {}
    # a wrong answer fails a benchmark before it is timed: one error is enough
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")
    if not config.getoption("--benchmark"):
        if config.getoption("--record"):
            raise pytest.UsageError("--record needs --benchmark: a check measures nothing")
        config.option.benchmark_disable = True
    elif config.getoption("--record"):
        if config.option.benchmark_json:
            raise pytest.UsageError("--record names its JSON itself: leave out --benchmark-json")
        folder = config.getoption("--record-folder")
        chosen = [Path(argument).resolve() for argument in config.args]
        if folder == RESULTS and (config.option.keyword or config.option.markexpr or chosen != [ROOT / "bench"]):
            raise pytest.UsageError("a part of the benchmarks is no result: give it a --record-folder of its own")
        folder.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = folder / file_name(stamp(None))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def small(request) -> bool:
    """Tiny shapes: the benchmarks are checks."""
    return request.config._benchmarksession.disabled


@pytest.fixture(scope="session", autouse=True)
def measured_ceilings(request, device, small) -> None:
    """Both ceilings before the first benchmark, said on the terminal."""
    if small or fixed_rounds() is not None:
        return
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    for threads in (0,) if device.type == "cuda" else CPU_THREADS:
        top = ceilings(device, threads)
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in top.flops_per_s.items())
        where = f"{threads} thread{'s'[: threads > 1]}" if threads else torch.cuda.get_device_name(device)
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"\nceilings, {where}: {rates}, copy {top.bytes_per_s / 1e9:.1f} GB/s")


@pytest.fixture(autouse=True)
def quiet_machine() -> Iterator[None]:
    """One thread: two would measure the machine's other guests; inputs from the same seed, no TF32 in references."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith(NOT_MEASURED):
            item.config.stash[REASONS][item.nodeid] = reason.removeprefix(NOT_MEASURED)
    return report


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["stamp"] = stamp(None)
    if config._benchmarksession.disabled or fixed_rounds() is not None:
        return
    threads = (0,) if device.type == "cuda" else CPU_THREADS
    by_threads = {number: ceilings(device, number)._asdict() for number in threads}
    machine_info["ceilings"] = by_threads[threads[0]]  # of most rows
    machine_info["ceilings_by_threads"] = by_threads


def pytest_benchmark_update_json(config, output_json):
    output_json["not_measured"] = config.stash[REASONS]


def pytest_terminal_summary(terminalreporter, config):
    """One line a row: what pytest-benchmark's table has no column for."""
    rows = [row.extra_info for row in config._benchmarksession.benchmarks if "subject" in row.extra_info]
    if rows:
        terminalreporter.section("rows: cold and warm medians, floor, baseline")
        for row in rows:
            terminalreporter.write_line(line(row))
    reasons = config.stash[REASONS]
    for reason in dict.fromkeys(reasons.values()):
        names = [name.rpartition("::")[2] for name in reasons if reasons[name] == reason]
        terminalreporter.write_line(f"{NOT_MEASURED}{reason}: {', '.join(names)}")


def line(row: dict) -> str:
    """A row for the terminal."""
    parts = [f"{row['subject']}, {row['op']}, {row['impl']} {row['dtype']}"]
    if "cold_median_s" in row:
        parts.append(f"{1e3 * row['cold_median_s']:.4g} ms")
    if "warm_median_s" in row:
        parts.append(f"warm {1e3 * row['warm_median_s']:.4g} ms")
    if "spread" in row:
        parts.append(f"spread {row['spread']:.0%}")
    if "share_of_floor" in row:
        parts.append(f"{row['share_of_floor']:.0%} of floor ({row['bound']})")
    if "clips_per_s" in row:
        parts.append(f"{row['clips_per_s']:.4g} clips/s")
    if "baseline" in row:
        parts.append(f"{row['baseline']['ratio']:.2f} times as fast as {row['baseline']['impl']}")
    return ", ".join(parts)
