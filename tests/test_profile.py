"""`sdr profile`: every section and its figures, marks that cost nothing, and what it says to change."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from clip_caches import make_cache
from models import CONFIGS, random_views
from torch.autograd import DeviceType

from sdr import FTCN, ftcn_released, layers, profile_advice, profile_data, profile_stages, stages, training_passes
from sdr import profile as profiler
from sdr.checkpoint import WeightsInfo, save_weights
from sdr.cli import main
from sdr.config import GroupedConfig
from sdr.errors import SDRError
from sdr.fast import SDRModel
from sdr.loading import LoaderConfig
from sdr.profile import add_memory, fitting, profile
from sdr.profile_advice import advice, feeding_advice
from sdr.profile_data import Feeding, make_loader, measure_feeding
from sdr.profile_kernels import kernel_table, op_of, op_table
from sdr.profile_stages import Allocator, Clock, Ranges, StageMemory, saved_bytes, stage_memory, stage_times
from sdr.profile_work import Inference, Plan, ProfileConfig, Training
from sdr.timing import measure_ceilings

CPU = torch.device("cpu")
TINY = replace(CONFIGS["tiny"], image_size=16, num_frames=4)
SHAPE = ("--model.image_size", "16", "--model.num_frames", "4")
PARTS = ["stem", "res2", "res3"]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Small ceilings and few repeats: what is tested is what the figures belong to."""
    monkeypatch.setattr(profiler, "measure_ceilings", partial(measure_ceilings, shrink=32))
    monkeypatch.setattr(profiler, "LIMIT_S", 0.05)
    monkeypatch.setattr(profile_data, "ROUND_S", 0.05)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def config(**settings) -> ProfileConfig:
    return ProfileConfig(**{"model": TINY, "batch": 2} | settings)


RUNS = {
    "inference": config(),
    "inference, reference": config(implementation="reference"),
    "training, reference": config(train=True, implementation="reference"),
    "training, plain": config(train=True),
    "training, gram": config(train=True, grouped=GroupedConfig(impl="cpu")),
    "training, fused": config(train=True, grouped=GroupedConfig(impl="cpu", scheme="fused")),
    "training, recomputed": config(train=True, grouped=GroupedConfig(impl="cpu", recompute=("res2",))),
    "training, bfloat16": config(train=True, grouped=GroupedConfig(impl="cpu"), dtype="bfloat16"),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_section_is_there_and_its_figures_agree(name):
    config, told = RUNS[name], []
    report = json.loads(json.dumps(profile(config, CPU, say=told.append)))
    plan = {"inference": "block", "training, fused": "fused"}.get(name, "gram")
    plan = "eager" if "reference" in name or "plain" in name else plan
    assert report["model"]["plan"] == plan
    assert bool(report["model"]["why"]) == (plan == "eager")
    rows = {row["stage"]: row for row in report["stages"]}
    grouped = ["statistics"] if plan in ("gram", "fused") else []
    assert list(rows) == ["start", *PARTS, *grouped, "head", *["loss", "optimiser"] * config.train]
    assert sum(row["share_of_time"] for row in rows.values()) == pytest.approx(1)
    seconds = [row["forward_s"] + row.get("backward_s", 0) for row in rows.values()]
    assert sum(seconds) == pytest.approx(report["stages_s"])
    backward = {stage for stage, row in rows.items() if "backward_s" in row}
    assert backward == ({*PARTS, "head", "loss"} if config.train else set())
    if config.train:
        assert sum(report["split"].values()) == pytest.approx(report["stages_s"])
        assert report["split"]["backward_s"] == pytest.approx(sum(rows[s]["backward_s"] for s in backward))
        assert report["memory"]["saved_bytes"] == sum(row.get("saved_bytes", 0) for row in rows.values()) > 0
        assert "latency" in report["not_measured"]
    else:
        assert report["latency"]["clips_per_s"] == pytest.approx(1 / report["latency"]["median_s"])
    assert report["throughput"]["clips_per_s"] == pytest.approx(2 / report["throughput"]["median_s"])
    assert sum(row["share_of_time"] for row in report["kernels"]["ops"].values()) == pytest.approx(1)
    assert report["kernels"]["launches"] >= sum(row["launches"] for row in report["kernels"]["kernels"]) > 0
    assert "idle_share" not in report["kernels"]  # of a GPU
    assert report["memory"]["peak_bytes"] >= report["memory"]["resident_bytes"] > 0
    assert {"data", "memory by stage"} <= set(report["not_measured"])
    assert [what for what in told if ":" not in what] == [
        "model",
        "memory",
        "throughput",
        "latency",
        "stages",
        "kernels",
        "memory by stage",
    ]


@pytest.mark.parametrize("name", ["inference", "inference, reference"])
def test_work_of_inference_is_that_of_the_layer_model(name):
    report = profile(RUNS[name], CPU)
    counted: dict[str, int] = {}
    for layer in layers.layers_of(TINY, 2, 4):
        counted[layer.stage] = counted.get(layer.stage, 0) + layer.flops
    rows = {row["stage"]: row for row in report["stages"] if "flops" in row}
    assert {stage: row["flops"] for stage, row in rows.items()} == counted
    rate, speed = report["ceilings"]["flops_per_s"], report["ceilings"]["bytes_per_s"]
    for row in rows.values():
        assert row["floor_s"] >= max(row["flops"] / rate, row["bytes"] / speed) * (1 - 1e-9)
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["forward_s"])
    moved = sum(layer.bytes for layer in layers.layers_of(TINY, 2, 4))
    assert (sum(row["bytes"] for row in rows.values()) > 1.5 * moved) == (name != "inference")


@pytest.mark.parametrize("scheme", ["eager", "gram", "fused"])
def test_work_of_training_is_that_of_its_scheme(scheme):
    name = {"eager": "training, plain"}.get(scheme, f"training, {scheme}")
    rows = {row["stage"]: row for row in profile(RUNS[name], CPU)["stages"]}
    for part in PARTS:
        passes = [p for p in training_passes.training_passes(TINY, 2, scheme, 4) if p.layer.startswith(part)]
        assert (rows[part]["flops"], rows[part]["bytes"]) == (
            sum(p.flops for p in passes),
            sum(p.bytes for p in passes),
        )
        assert rows[part]["floor_of"] == "all"
    assert rows["head"]["floor_of"] == "forward"


@pytest.mark.parametrize("scheme", ["gram", "fused"])
def test_what_a_clip_more_keeps_is_what_the_scheme_says(scheme):
    """What any batch keeps, such as stacked weights, is in no count by clips."""
    options = RUNS[f"training, {scheme}"]
    few, more = (saved_bytes(work, work.model) for work in (Training(options, CPU, clips) for clips in (2, 4)))
    expected = training_passes.saved_bytes(TINY, scheme, 4)
    assert {part: (more[part] - few[part]) / 2 for part in PARTS} == pytest.approx(expected, rel=1e-3)


def test_recomputation_keeps_less():
    kept = []
    for name in ("training, gram", "training, recomputed"):
        work = Training(RUNS[name], CPU, 2)
        kept.append(saved_bytes(work, work.model))
    before, after = kept
    assert "res2" not in after  # its input is the stem's result, its result the input of res3
    assert sum(after.values()) < sum(before.values()) - before["res2"] / 2


def run_through(model, views):
    """Every stage that a listener hears of in a training step."""
    heard = []
    with stages.listening(lambda stage, backward: heard.append((stage, backward))):
        model(views).logits.sum().backward()
    return heard


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_marks_follow_the_backward_pass_stage_by_stage(impl):
    model = SDRModel(replace(TINY, num_branches=2), grouped=GroupedConfig(impl=impl)).train()
    heard = run_through(model, random_views(model.config, batch=2))
    forward, backward = PARTS, [(part, True) for part in reversed(PARTS)]
    if impl == "cpu":
        expected = [(part, False) for part in ("start", *forward, "statistics", "head")] + backward
    else:
        branch = [*((part, False) for part in forward), ("head", False), ("head", False)]
        expected = [("start", False), *branch * 2, *[("head", True), *backward] * 2]
    assert heard == expected


def test_each_stage_takes_the_time_that_it_takes(monkeypatch):
    """A stage that sleeps, forward and backward, is the one that the profile finds."""
    work = Training(RUNS["training, reference"], CPU, 2)

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.05)
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            time.sleep(0.1)
            return dx

    for branch in work.model.branches:
        branch.res2.register_forward_hook(lambda module, arguments, out: Sleep.apply(out))
    work()
    times = stage_times(work, CPU)
    assert times["res2", False] > 4 * 0.05
    assert times["res2", True] > 4 * 0.1
    assert sum(times.values()) - times["res2", False] - times["res2", True] < 0.4


def test_marks_cost_nothing_where_no_profile_runs():
    x = torch.randn(2, requires_grad=True)
    assert stages.enter("stem", x) is x
    assert x._backward_hooks is None
    assert not stages.watched()
    with stages.listening(lambda stage, backward: None):
        assert stages.enter("stem", x) is x
        assert len(x._backward_hooks) == 1
        with pytest.raises(RuntimeError, match="one profile"), stages.listening(print):
            pass
    assert not stages.watched()


def test_a_profile_changes_no_number():
    work = Inference(config(), CPU, 2)
    before = work()
    stage_times(work, CPU)
    with stages.listening(lambda stage, backward: None):
        torch.testing.assert_close(work(), before)
    assert torch.equal(work(), before)


def test_a_gpu_is_timed_by_its_own_clock():
    """Rehearsed with a clock that counts marks: each segment lasts one tick."""
    ticks = count()
    clock = Clock(lambda: next(ticks), lambda start, end: float(end - start))
    times = stage_times(Inference(config(), CPU, 1), CPU, clock=clock)
    assert times == {(stage, False): 1.0 for stage in ("start", *PARTS, "head")}


def test_a_gpus_memory_is_read_where_a_stage_ends():
    """Rehearsed with an allocator that grows by a hundred bytes whenever it is asked."""
    asked, resets = count(100, 100), []
    allocator = Allocator(lambda: next(asked), lambda: 7000, lambda: resets.append(1))
    found = stage_memory(Inference(config(), CPU, 1), allocator)
    assert found == {
        (stage, False): StageMemory(100 * (i + 1), 7000) for i, stage in enumerate(("start", *PARTS, "head"))
    }
    assert len(resets) == len(found) + 1


def test_a_stages_memory_is_that_after_its_forward_pass_and_its_peak():
    rows = {"stem": {}, "loss": {}}
    found = {("stem", False): StageMemory(300, 400), ("loss", False): StageMemory(310, 320)}
    add_memory(rows, found | {("stem", True): StageMemory(100, 900)})
    assert rows["stem"] == {"allocated_bytes": 300, "peak_bytes": 900}
    assert rows["loss"] == {"allocated_bytes": 310, "peak_bytes": 320}


class Nvtx:
    def __init__(self):
        self.log, self.number = [], 0

    def range_start(self, name):
        self.number += 1
        self.log.append(("start", name, self.number))
        return self.number

    def range_end(self, number):
        self.log.append(("end", number))


def test_a_gpus_backward_thread_has_ranges_of_its_own(monkeypatch):
    """Rehearsed with a thread in the place of the one that runs a GPU's backward pass."""
    at_end, nvtx = [], Nvtx()
    monkeypatch.setattr(Ranges, "at_end", at_end.append)
    marks = Ranges(torch.device("cuda"), nvtx)
    marks("loss", False)
    marks("loss", True)  # asked for on the main thread, which then waits

    def backward():
        marks("loss", True)
        marks("res2", True)
        at_end[0]()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert len(at_end) == 1
    assert list(marks._open) == [marks.main]
    marks("optimiser", False)
    marks.close(marks.main)
    marks.close_nvtx()
    assert [entry[1] for entry in nvtx.log if entry[0] == "start"] == [
        "loss forward", "backward", "loss backward", "res2 backward", "optimiser",
    ]  # fmt: skip
    assert [entry[1] for entry in nvtx.log if entry[0] == "end"] == [1, 2, 3, 4, 5]


def sdr(*words: object) -> int:
    """Exit code of a command line."""
    try:
        return main(["profile", "--device", "cpu", *map(str, words)])
    except SystemExit as end:  # of the parser
        return end.code


def test_the_command_prints_everything_and_writes_a_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    files = ("--trace", tmp_path / "trace.json", "--json", tmp_path / "report.json")
    assert sdr(*SHAPE, "--train", "--grouped.impl", "cpu", *files) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(80, len(str(tmp_path)) + 20)
    for word in ("throughput", "Stages: time", "Stages: memory", "scheme gram", "optimiser", "not measured"):
        assert word in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["trace"] == str(tmp_path / "trace.json")
    for line in report["advice"]:
        assert line[:40] in out
    trace = json.loads((tmp_path / "trace.json").read_text())
    ranges = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    names = [event["name"] for event in sorted(ranges, key=lambda event: event["ts"]) if "#" not in event["name"]]
    forward = [f"{part} forward" for part in (*PARTS, "statistics", "head", "loss")]
    backward = [f"{part} backward" for part in ("loss", "head", *reversed(PARTS))]
    assert names == ["start", *forward, *backward, "optimiser"]
    assert all(event["dur"] > 0 for event in ranges)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "trace.json"]


def test_weights_bring_their_own_shapes(tmp_path, capsys):
    path = tmp_path / "ftcn.safetensors"
    small = replace(ftcn_released(), image_size=16, num_frames=4, width=4, embed_dim=16, num_heads=2, head_dim=8)
    save_weights(path, FTCN(small.branch()), WeightsInfo())
    for more in ([], ["--train"]):
        assert sdr("--weights", path, "--batch", 2, "--json", tmp_path / "report.json", *more) == 0
        model = json.loads((tmp_path / "report.json").read_text())["model"]
        assert (model["views"], model["weights"]) == ([2, 1, 3, 4, 16, 16], str(path))
        assert "res4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--batch", "3", "--train"], "batch must be even in training"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--data", "somewhere"], "data must go with train"),
        (["--recompute", "true"], "recompute must go with train"),
        (["--train", "--grouped.recompute", "[res5]"], "grouped.recompute must name the model's parts"),
        (["--train", "--data", "/nonexistent"], "/nonexistent"),
        (["--weights", "/nonexistent"], "no such weights file"),
        (["--weights", "/nonexistent", "--model.width", "4"], "give either"),
        (["--trace", "/nonexistent/trace.json"], "its folder is missing"),
        (["--json", "/"], "is not a regular file"),
        (["--json", "/tmp/a", "--trace", "/tmp/./a"], "is to hold the trace too"),
        (["--threads", "100000"], "threads must be at most "),
        (["--batch", "1000000000"], "--batch "),
    ],
)
def test_bad_options_are_one_line(words, line, capsys):
    assert sdr(*SHAPE * ("--weights" not in words), *words) == 2
    captured = capsys.readouterr()
    (last,) = [text for text in captured.err.splitlines() if text.startswith("sdr profile: ")]
    assert line in last
    assert captured.out == ""


def test_a_named_implementation_that_cannot_run_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sdr.train.why_not_impl", lambda options, device: f"planted for {options.impl}")
    assert sdr(*SHAPE, "--train", "--grouped.impl", "triton") == 2
    assert "grouped.impl 'triton' cannot run: planted for triton" in capsys.readouterr().err


def test_an_interrupt_ends_it_without_a_traceback(monkeypatch, capsys):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiler, "measure", interrupted)
    assert sdr(*SHAPE) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("train", [False, True])
def test_memory_is_the_models_and_not_the_profilers(train, monkeypatch):
    """torch.profiler takes hundreds of megabytes, which stay."""
    ballast = []

    def greedy(report, work, rates):
        ballast.append(torch.ones(256 << 20, dtype=torch.uint8))

    monkeypatch.setattr(profiler, "measure_kernels", greedy)
    monkeypatch.setattr(profiler, "advice", lambda report, config: [])
    memory = profile(config(train=train), CPU)["memory"]
    assert memory["resident_bytes"] <= memory["peak_bytes"] < profile_stages.resident().now - (128 << 20)


def test_memory_that_runs_out_later_is_said(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(profiler, "measure_kernels", full)
    with pytest.raises(SDRError, match=r"a batch of 2 fits .* but its profile does not"):
        profile(config(), CPU)


def test_says_which_batch_fits():
    tried = []

    def make(clips: int):
        tried.append(clips)
        if clips > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    limit = 5
    with pytest.raises(SDRError, match=r"a batch of 24 clips does not fit .* \(--batch 2 does\)"):
        fitting(make, 24, CPU, step=2)
    assert tried == [24, 12, 6, 2]
    limit = 0
    with pytest.raises(SDRError, match="nor does any other"):
        fitting(make, 4, CPU)

    def broken(clips: int):
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        fitting(broken, 4, CPU)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("profile") / "cache", real=6, fake=6)


def fed(cache, **settings) -> ProfileConfig:
    return config(model=replace(TINY, num_frames=8), train=True, data=str(cache), **settings)


def test_loading_is_timed_against_the_update(cache, capsys, tmp_path):
    report = profile(fed(cache), CPU)
    data = report["data"]
    assert data["augmentation"] == "reference"
    assert data["bottleneck"] in ("loader", "update")
    assert all(data[name] > 0 for name in ("reading", "loader", "update", "together"))
    assert "loader" in report["advice"][-1]
    shape = ("--model.image_size", 16, "--model.num_frames", 8)
    assert sdr(*shape, "--train", "--data", cache, "--json", tmp_path / "report.json") == 0
    assert "clips/s: reading" in capsys.readouterr().out
    with pytest.raises(SDRError, match="holds clips of 8 x 16 x 16"):
        profile(config(train=True, data=str(cache)), CPU)


@pytest.mark.parametrize("slow", ["augmentation", "reading", "update"])
def test_finds_a_planted_bottleneck(cache, monkeypatch, slow):
    options = fed(cache)
    work = Training(options, CPU, 2)
    loader = make_loader(options, CPU, 2)
    nap = 0.3 if slow == "update" else 0.03

    def planted(function):
        def run(*arguments, **settings):
            time.sleep(nap)
            return function(*arguments, **settings)

        return run

    update = planted(lambda batch: None) if slow == "update" else lambda batch: None
    if slow == "augmentation":
        monkeypatch.setattr(profile_data.TrainingLoader, "_batch", planted(profile_data.TrainingLoader._batch))
    if slow == "reading":
        monkeypatch.setattr(type(loader.cache), "read", planted(type(loader.cache).read))
    feeding = measure_feeding(loader, update, work.batch)
    assert feeding.bottleneck == ("update" if slow == "update" else "loader")
    (line,) = feeding_advice(feeding, work, loader.augmentation)
    expected = {
        "augmentation": "--loader.augmentation dali",
        "reading": "--loader.readers",
        "update": "would change nothing",
    }
    assert expected[slow] in line


def test_advice_on_loading_names_options_that_change_something():
    options = config(train=True, data="cache", loader=LoaderConfig(readers=3, ahead=5))
    work = SimpleNamespace(config=options, device=torch.device("cuda"), dtype=torch.float32, clips=2, plan=Plan("gram"))
    waiting = Feeding(reading=1000.0, loader=10.0, update=100.0, together=9.0, waiting_share=0.91)
    (line,) = feeding_advice(waiting, work, "triton")
    assert "--loader.augmentation dali" in line
    assert "--loader.augmentation triton" not in line
    (line,) = feeding_advice(replace(waiting, reading=11.0), work, "triton")
    assert "--loader.readers above 3, --loader.ahead above 5" in line
    (line,) = feeding_advice(replace(waiting, waiting_share=0.05), work, "triton")
    assert "would change nothing" in line
    assert line.endswith("to try: --dtype bfloat16, --grouped.scheme fused, --batch above 2")
    assert replace(waiting, waiting_share=0.05).bottleneck == "update"


def test_advice_holds_the_figure_that_it_comes_from():
    report = {
        "machine": {"kind": "cuda"},
        "whole_s": 0.01,
        "throughput": {"spread": 0.3, "median_s": 0.01},
        "kernels": {"idle_share": 0.6, "launches": 900.0},
        "model": {"clips": 2, "dtype": "float32", "plan": "gram"},
        "memory": {"saved_bytes": 1000},
        "stages": [
            {"stage": "stem", "share_of_time": 0.25, "share_of_floor": 0.9, "bound": "memory", "saved_bytes": 100},
            {"stage": "res2", "share_of_time": 0.65, "share_of_floor": 0.1, "bound": "memory", "saved_bytes": 900},
            {"stage": "head", "share_of_time": 0.1},
        ],
    }
    report["stages"][0]["floor_of"] = report["stages"][1]["floor_of"] = "all"
    told = "\n".join(advice(report, config(train=True)))
    for phrase in ("spread by 30 %", "idle 60 %", "900 launches", "res2 takes 65 %", "10 % of the floor"):
        assert phrase in told
    assert "memory bounds stem, 25 % of the time" in told  # res2 is far from what memory allows
    assert "res2 keeps 90 %" in told
    assert "--grouped.recompute '[res2]'" in told
    report["kernels"], report["memory"] = {}, {}
    del report["throughput"]["spread"]
    report["model"]["dtype"] = "bfloat16"
    report["stages"][1]["share_of_floor"] = 0.8
    assert advice(report, config(train=True)) == []


@pytest.mark.parametrize(("policy", "hint"), [("passive", False), ("active", True)])
def test_two_times_of_one_call_that_are_apart_are_said(monkeypatch, policy, hint):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    report = {"machine": {"kind": "cpu"}, "throughput": {"median_s": 4.0}, "whole_s": 0.6}
    (line,) = profile_advice.noise(report)
    assert "took 4e+03 ms, and 600 ms a moment later" in line
    assert ("OMP_WAIT_POLICY=passive" in line) == hint
    assert list(profile_advice.noise(report | {"whole_s": 3.5})) == []


def test_float16_on_a_cpu_is_held_against_float32(monkeypatch):
    report = profile(config(dtype="float16"), CPU)
    assert (report["model"]["dtype"], report["ceilings"]["dtype"]) == ("float16", "float32")


def test_ops_of_a_gpu_are_held_against_their_floors():
    rates, floor = (1e12, 1e9), {}
    found = layers.layers_of(TINY, 2)
    for layer in found:
        floor[op_of(layer.op)] = floor.get(op_of(layer.op), 0.0) + 1e6 * layer.floor(*rates)
    names = ("_temporal_stem_fwd_kernel", "_temporal_bottleneck_fwd_kernel", "_norm_linear_fwd_kernel", "elementwise")
    kernels = [{"kernel": name, "op": op_of(name), "launches": 2.0, "us": 50.0} for name in names]
    table = op_table(kernels, found, rates)
    assert set(table) == {"temporal_stem", "temporal_bottleneck", "head", "other"}
    assert table["head"]["share_of_floor"] == pytest.approx(floor["head"] / 50)
    assert table["temporal_stem"]["floor_us"] == pytest.approx(floor["temporal_stem"])
    assert "floor_us" not in table["other"]
    assert sum(row["share_of_time"] for row in table.values()) == pytest.approx(1)


def test_a_gpus_kernels_are_counted_for_one_pass():
    """Rehearsed with events such as torch.profiler gives for a GPU, of three passes."""
    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    seen = (
        ("_conv_norm_kernel", cuda, 6, 300.0, 0.0),
        ("_patch_covariance_kernel", cuda, 3, 600.0, 0.0),
        ("aten::mm", cpu, 9, 0.0, 50.0),
        ("Memset", cuda, 1, 0.0, 0.0),
    )
    names = ("key", "device_type", "count", "self_device_time_total", "self_cpu_time_total")
    rows = kernel_table([SimpleNamespace(**dict(zip(names, event, strict=True))) for event in seen], cuda, 3)
    assert [(row["op"], row["launches"], row["us"]) for row in rows] == [
        ("stem_training", 1.0, 200.0),
        ("norm_conv", 2.0, 100.0),
    ]


def test_a_model_that_looks_sideways_has_no_floor():
    report = profile(config(model=replace(TINY, spatial_kernel=3)), CPU)
    assert "look sideways" in report["not_measured"]["floors"]
    assert all("floor_s" not in row for row in report["stages"])
    assert "spatial_kernel" in report["model"]["why"]


@pytest.mark.slow
def test_tiny_on_this_machine_takes_less_than_a_minute():
    for more in ([], ["--train"]):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "sdr", "profile", "--preset", "tiny", "--device", "cpu", *more],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "res3" in done.stdout
        assert time.perf_counter() - start < 60
