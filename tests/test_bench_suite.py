"""The benchmark suite: what `time_op` refuses and records, what is benchmarked, and how peers that are missing show."""

import json
import os
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sdr_kernels.info import public_ops
from sdr_kernels.leave_one_out_kl import leave_one_out_kl_reference

ROOT = Path(__file__).parent.parent
CORES = os.sched_getaffinity(0)  # before a benchmark is pinned to one


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return import_module


class Benchmark:
    """Stands in for pytest-benchmark's fixture, which this suite may run without."""

    def __init__(self, timer, *, disabled=False):
        self.timer, self.disabled, self.extra_info, self.rounds = timer, disabled, {}, 0
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target, args=(), setup=None, teardown=None, rounds=1):
        if self.disabled:
            return target(*args)
        for _ in range(rounds):
            setup()
            start = self.timer()
            result = target(*args)
            self.stats.stats.data.append(self.timer() - start)
            teardown(*args)
        self.rounds = rounds
        return result


@pytest.fixture
def answers(bench):
    return bench("answers")


@pytest.fixture
def timing(bench, monkeypatch):
    """The module with ceilings of 1 GFLOP/s and 1 GB/s, and a buffer that is quick to flush."""
    module = bench("timing")
    ceilings = bench("sdr.timing").Ceilings({"float32": 1e9}, 1e9, 1)
    monkeypatch.setattr(module, "ceilings", lambda device, threads: ceilings)
    monkeypatch.setattr(module, "flusher", lambda device: torch.empty(16))
    return module


def row_of(timing, **fields):
    work = [timing.Moved(4000, 1000), timing.Moved(100, 8000)]
    return timing.Row("a product", "norm_linear", "cpu", work, 2, limit_s=0.01, **fields)


def test_a_wrong_answer_is_refused_before_anything_is_timed(answers, timing):
    x = torch.randn(8, 8)
    calls = []

    def wrong(a):
        calls.append(1)
        return a @ a + 1e-3

    benchmark = Benchmark(timing.CLOCK)
    with pytest.raises(answers.WrongAnswerError, match=r"result 0: rms error .* limit"):
        timing.time_op(benchmark, wrong, lambda a: a @ a, (x,), row_of(timing))
    assert (len(calls), benchmark.rounds, benchmark.extra_info) == (1, 0, {})
    with pytest.raises(answers.WrongAnswerError):
        timing.time_op(Benchmark(timing.CLOCK, disabled=True), wrong, lambda a: a @ a, (x,), row_of(timing))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t[:1], r"\[1, 64\] instead of \[64, 64\]"),
        (lambda t: t.where(t != t.max(), torch.nan), "not finite"),
        (lambda t: t + 4e-6 * (t == t.max()), "largest error"),
        (lambda t: (t, t), "2 results instead of 1"),
    ],
)
def test_an_answer_is_compared_in_shape_and_every_value(answers, spoil, message):
    exact = torch.randn(64, 64).double()
    plain = exact.float()
    answers.matches(exact, plain)(plain.clone())
    with pytest.raises(answers.WrongAnswerError, match=message):
        answers.matches(exact, plain)(spoil(plain))


def test_ties_leave_single_values_out(answers):
    exact = torch.randn(64, 64).double()
    plain = exact.float()
    spoiled = plain.clone()
    spoiled[0, 0] += 4e-6
    answers.matches(exact, plain, ties=True)(spoiled)
    with pytest.raises(answers.WrongAnswerError, match="largest"):
        answers.matches(exact, plain)(spoiled)


def test_records_what_a_figure_needs(timing):
    x = torch.randn(8, 8)
    benchmark = Benchmark(timing.CLOCK)
    threads = torch.get_num_threads()
    seen = []

    def call(a):
        seen.append((len(os.sched_getaffinity(0)), torch.get_num_threads()))
        return a @ a

    timing.time_op(benchmark, call, lambda a: a @ a, (x,), row_of(timing))
    assert set(seen) == {(1, 1)}
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (CORES, threads)
    info, ours = benchmark.extra_info, benchmark.stats.stats.data
    assert len(ours) == benchmark.rounds >= timing.MIN_ROUNDS
    expected = {
        "subject": "a product",
        "op": "norm_linear",
        "impl": "cpu",
        "shapes": [[8, 8]],
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "clips": 2,
        "flops": 4100,
        "bytes": 9000,
        "floor_s": 4e-6 + 8e-6,
        "bound": "memory",
        "cold_median_s": statistics.median(ours),
    }
    assert {key: info[key] for key in expected} == pytest.approx(expected)
    assert info["clips_per_s"] == pytest.approx(2 / info["cold_median_s"])
    assert info["share_of_floor"] == pytest.approx(12e-6 / info["cold_median_s"])
    assert set(info["baseline"]) == {"impl", "median_s", "ratio"}
    assert info["baseline"]["impl"] == "reference"
    assert info["warm_median_s"] > 0
    assert info["spread"] >= 0
    json.dumps(info)


def test_a_round_is_turn_cold_baseline_cold_call_and_warm_call(timing, monkeypatch):
    happened = []

    def says(what):
        return lambda *_: happened.append(what)

    for name, what in {"take_turn": "turn", "flush": "flush"}.items():
        monkeypatch.setattr(timing, name, says(what))
    x = torch.ones(4)
    timing.time_op(
        Benchmark(timing.CLOCK), lambda a: says("call")() or a, lambda a: says("baseline")() or a, (x,), row_of(timing)
    )
    one = ["turn", "flush", "baseline", "flush", "call", "call"]
    start = happened.index("turn")
    assert happened[start : start + 2 * len(one)] == 2 * one


def test_ratio_is_the_median_over_pairs(timing):
    benchmark = SimpleNamespace(stats=SimpleNamespace(stats=SimpleNamespace(data=[1.0, 2.0, 4.0])), extra_info={})
    times = {"baseline": [3.0, 2.0, 8.0], "warm": []}
    timing.record(benchmark, times, (torch.ones(2),), row_of(timing), torch.device("cpu"))
    assert benchmark.extra_info["baseline"] == {"impl": "reference", "median_s": 3.0, "ratio": 2.0}
    assert benchmark.extra_info["spread"] == pytest.approx((3.0 - 1.5) / 2)


def test_a_comparison_has_its_rounds_and_no_baseline(timing, monkeypatch):
    turns = []
    monkeypatch.setattr(timing, "fixed_rounds", lambda: 3)
    monkeypatch.setattr(timing, "take_turn", lambda: turns.append(1))
    benchmark, x = Benchmark(timing.CLOCK), torch.ones(4)
    timing.time_op(benchmark, torch.clone, torch.clone, (x,), row_of(timing))
    assert (benchmark.rounds, len(turns)) == (3, 3)
    assert not {"baseline", "warm_median_s", "floor_s"} & set(benchmark.extra_info)
    assert benchmark.extra_info["flops"] == 4100


def test_the_gpus_clock_waits_for_the_later_event_and_counts_milliseconds(timing):
    log = []

    class Event:
        def __init__(self):
            self.number = len(log)

        def record(self):
            log.append(f"record {self.number}")

        def synchronize(self):
            log.append(f"wait {self.number}")

        def elapsed_time(self, later):
            return 250.0 * (later.number - self.number)

    with timing.CLOCK.by(Event):
        start, end = timing.CLOCK(), timing.CLOCK()
    assert end - start == 0.25
    assert log == ["record 0", "record 1", "wait 1"]
    assert isinstance(timing.CLOCK(), float)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_public_op_has_a_benchmark(bench, kind):
    cases = bench("cases").cases(kind)
    assert {case.op for case in cases} == set(public_ops())
    names = [case.name for case in cases]
    assert len(names) == len(set(names))


def test_every_op_is_asked_for_in_every_implementation_that_it_has(bench):
    impls = bench("cases").impls_of
    assert impls("temporal_bottleneck") == ["reference", "cpu", "triton"]
    assert impls("normed_stem") == ["reference", "cpu", "triton"]
    assert impls("sdr_loss") == ["reference", "triton", "cuda"]
    assert impls("spatial_mean") == ["reference", "triton"]


def test_what_a_peer_lacks_or_gets_wrong_is_the_reason_why_it_is_not_measured(answers):
    with (
        pytest.raises(pytest.skip.Exception, match="not measured: peer: No module named 'nowhere'"),
        answers.optional("peer"),
    ):
        import_module("nowhere")
    with pytest.raises(pytest.skip.Exception, match="not measured: peer: 2 results"), answers.optional("peer"):
        raise answers.WrongAnswerError("2 results")
    with pytest.raises(ZeroDivisionError), answers.optional("peer"):
        raise ZeroDivisionError


def test_ligers_loss_is_ours(bench, monkeypatch):
    # Liger's class is torch's with a kernel of its own
    package = ModuleType("liger_kernel.transformers")
    package.LigerKLDIVLoss = torch.nn.KLDivLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    joint, loo = torch.randn(5, 2), torch.randn(5, 3, 2, requires_grad=True)
    found = bench("losses").liger_kl()(joint, loo)
    expected = leave_one_out_kl_reference(joint, loo)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, loo) for value in (found, expected)))


class Tensor(SimpleNamespace):
    """Of a stand-in for cuDNN's graph: how it is computed."""

    def set_output(self, _):
        return self

    def set_data_type(self, _):
        return self


class Graph:
    """A stand-in for cuDNN's graph that plain torch computes."""

    def __init__(self, **_):
        self.result = None

    def tensor(self, name, dim, stride, data_type):
        made = Tensor(shape=(dim, stride))
        made.value = lambda given: given[id(made)]
        return made

    def node(self, function, *operands):
        self.result = Tensor(value=lambda given: function(*(operand.value(given) for operand in operands)))
        return self.result

    def conv_fprop(self, image, weight, padding, stride, dilation):
        return self.node(lambda x, w: F.conv3d(x.float(), w.float(), None, stride, padding, dilation), image, weight)

    def mul(self, a, b):
        return self.node(torch.mul, a, b)

    def add(self, a, b):
        return self.node(torch.add, a, b)

    def relu(self, input):
        return self.node(torch.relu, input)

    def build(self, modes):
        assert modes == ["A", "FALLBACK"]

    def get_workspace_size(self):
        return 0

    def execute(self, tensors, workspace, handle):
        given = {id(key): value for key, value in tensors.items()}
        for key, value in tensors.items():
            assert key is self.result or [list(value.shape), list(value.stride())] == list(key.shape)
        tensors[self.result].copy_(self.result.value(given))


def test_cudnns_graphs_are_the_bottleneck(bench, monkeypatch):
    fake = SimpleNamespace(
        create_handle=object,
        set_stream=lambda handle, stream: None,
        data_type=SimpleNamespace(BFLOAT16="bf16", FLOAT="fp32"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        pygraph=Graph,
    )
    Tensor.__hash__ = object.__hash__
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    peers = bench("peers")
    config = bench("cases").Sizes("cpu", True).config("paper")
    with torch.no_grad():
        blocks, rows = peers.block_inputs(config, 1, torch.device("cpu"), torch.bfloat16)
        found = bench("cudnn_peer").fused_blocks(blocks, rows)(rows)
        expected = peers.block_loop(blocks, rows)(rows)
        assert (torch.stack(found) - torch.stack(rows)).abs().mean() > 0.1  # the block does something
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_what_tensorrt_reads_is_the_model(bench, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    peer, machine, inputs = (bench(name) for name in ("tensorrt_peer", "machine", "inputs"))
    device = torch.device("cpu")
    config = bench("cases").replace(bench("sdr").ftcn_released(), **machine.SMALL)
    with torch.no_grad():
        model = inputs.random_model(config, device)
        views = inputs.random_views(config, 2, device).contiguous()
        peer.export(model, views, tmp_path / "model.onnx")
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        logits, tokens = session.run(list(peer.OUTPUTS), {"views": views.numpy()})
        expected = model(views)
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(tokens), expected.tokens, rtol=1e-4, atol=1e-4)


def test_a_result_is_named_by_its_device_date_and_commit(bench):
    machine = bench("machine")
    stamp = {"device": "AMD EPYC 9R14, 2 cores", "date": "2026-01-02", "commit": "0123456789", "dirty": True}
    assert machine.file_name(stamp) == "amd-epyc-9r14-2-cores_2026-01-02_0123456-dirty.json"
    assert machine.stamp("abc")["device"] == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else machine.short_cpu_name()
    )
    assert machine.short_cpu_name().endswith(f", {os.cpu_count()} cores")


def pytest_bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_a_recorded_session_holds_ceilings_stamp_rows_and_reasons(bench, tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = pytest_bench(
        "bench/bench_ops.py", "-k", "joint or info", "--benchmark", "--benchmark-columns=median,rounds",
        "--record", "--record-folder", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    machine, rows = found["machine_info"], {row["fullname"]: row for row in found["benchmarks"]}
    assert file.name == bench("machine").file_name(machine["stamp"])
    assert set(machine["stamp"]) >= {"device", "torch", "triton", "python", "commit", "dirty", "date"}
    assert machine["ceilings"]["bytes_per_s"] > 1e8
    assert machine["ceilings"]["flops_per_s"]["float32"] > 1e8
    row = rows["bench/bench_ops.py::bench_op[joint head-reference]"]
    assert row["extra_info"]["op"] == "norm_linear"
    assert row["extra_info"]["share_of_floor"] > 0
    assert row["extra_info"]["cold_median_s"] == pytest.approx(row["stats"]["median"])
    if not torch.cuda.is_available():
        reason = found["not_measured"]["bench/bench_ops.py::bench_op[joint head-triton]"]
        assert reason == "it needs CUDA tensors, got cpu"
        assert "not measured: it needs CUDA tensors, got cpu: bench_op[joint head-triton]" in done.stdout
    assert "of floor (memory)" in done.stdout
    assert "ceilings, " in done.stdout


@pytest.mark.slow
def test_a_part_is_no_result():
    """A newer file of a few rows would take the place of all of them in README."""
    pytest.importorskip("pytest_benchmark")
    for chosen in (("bench/bench_start.py",), ("bench", "-k", "start")):
        done = pytest_bench(*chosen, "--benchmark", "--record")
        assert done.returncode == 4
        assert "a part of the benchmarks is no result" in done.stderr


@pytest.mark.slow
def test_a_check_records_nothing(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = pytest_bench("bench/bench_start.py", "--record", "--record-folder", str(tmp_path))
    assert done.returncode == 4
    assert "--record needs --benchmark" in done.stderr
    assert list(tmp_path.iterdir()) == []
