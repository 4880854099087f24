"""Where the time and memory of a model go, on this machine: :func:`profile` measures, `sdr profile` prints.

The result is a dictionary of JSON values. Seconds, bytes and clips per second throughout; a key that would be a guess
is absent, and ``not_measured`` maps the name of what is missing to the reason.

machine     device, threads, memory_bytes, sdr, torch, python, platform and what else is installed that matters
model       config, weights, parameters, views (their shape), clips, dtype, train, implementation, plan (``block``: our
            kernels in inference; ``gram``, ``fused``: a training scheme; ``eager``: the plain branches), why (of the
            plain branches), ops (op to what runs it on this device)
ceilings    flops_per_s in dtype (float32 for float16 on a CPU), bytes_per_s, ridge in FLOPs a byte: measured now
throughput  clips, median_s, spread (between quartiles, over the median; absent for fewer than 4), repeats, clips_per_s
latency     the same of one clip, by the wall clock; in inference
split       forward_s, loss_s, backward_s, optimiser_s of an update
stages      a list in the order of the forward pass: stage, forward_s, backward_s (where it has one), share_of_time;
            of those whose work is counted, forward and backward pass together: flops, bytes, floor_s, share_of_floor,
            bound (``arithmetic`` or ``memory``), floor_of (``all``, or ``forward`` where the backward pass is not
            counted); and what is known of saved_bytes (for the backward pass), allocated_bytes (when the forward pass
            of the stage ends), peak_bytes (in either pass)
stages_s    sum over the stages, which run one by one for it; whole_s: of calls in turns with those, in which a CPU's
            kernels run slabs through all stages at once and a GPU's are launched while the clock runs
kernels     launches, busy_us, idle_share (of a GPU, between kernels), ops (op to launches, us, share_of_time, floor_us,
            share_of_floor), kernels (the longest ones: kernel, op, launches, us): of one pass, by torch.profiler
memory      peak_bytes and resident_bytes of the process, or of the GPU's allocator; saved_bytes, in training
data        see :class:`sdr.profile_data.Feeding`, and augmentation; with a cache
advice      a list of sentences, each from a figure above
trace       path of the Chrome trace
"""

import gc
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from sdr.errors import SDRError
from sdr.files import atomic_file
from sdr.profile_advice import advice, feeding_advice
from sdr.profile_data import make_loader, measure_feeding
from sdr.profile_floors import layers_by_op, least, split, stage_rows
from sdr.profile_kernels import PASSES, profile_kernels, profiled
from sdr.profile_stages import (
    Segment,
    StageMemory,
    allocator_of,
    medians,
    ranges,
    reset_resident,
    resident,
    saved_bytes,
    stage_memory,
    stage_times,
)
from sdr.profile_work import Inference, ProfileConfig, Training, with_weights
from sdr.timing import Ceilings, cpu_name, measure_ceilings, synchronise
from sdr_kernels.info import choice, versions

LIMIT_S = 2.0  # of each measurement, once the first calls are over
REPEATS, FEWEST = 20, 3
ROUND_S = 0.05  # calls on a GPU are timed in rounds of at least this
OPS = ("temporal_stem", "temporal_bottleneck", "spatial_mean", "norm_linear", "token_attention")
TRAINING_OPS = ("normed_stem", "normed_bottleneck", "sdr_loss")
Say = Callable[[str], None]
Work = Inference | Training


def profile(
    config: ProfileConfig, device: torch.device, *, trace: str | Path | None = None, say: Say = lambda what: None
) -> dict[str, object]:
    """Profile a forward pass, or with ``config.train`` an update.

    Args:
        config: what.
        device: where.
        trace: file for a Chrome trace.
        say: is told what is measured next.

    Returns:
        As the module says.

    Raises:
        SDRError: weights, cache or implementation cannot be used, or memory is too small; says which batch fits.
        ValueError: the weights' model cannot run as the configuration says.
    """
    threads = torch.get_num_threads()
    config, weights = with_weights(config)
    if config.threads is not None and device.type == "cpu":
        torch.set_num_threads(config.threads)
    try:
        # events and streams are those of the current device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            dtype = arithmetic(config.dtype_on(device), device)
            ceilings = measure_ceilings(device, [dtype], say=lambda what: say(f"ceilings: {what}"))
            say("model")
            require_memory(config, device)
            step = 2 if config.train else 1  # an update is half real and half fake
            work = fitting(lambda clips: build(config, device, clips, weights), config.clips(device), device, step=step)
            try:
                report = measure(work, ceilings, say)
                if trace is not None:
                    say("trace")
                    write_trace(work, Path(trace))
                    report["trace"] = str(Path(trace).resolve())
            except torch.OutOfMemoryError as error:  # the profiler and its events take some themselves
                what = f"a batch of {work.clips} fits into that of {device}, but its profile does not"
                raise SDRError("memory", what, "a smaller --batch") from error
            return report
    finally:
        torch.set_num_threads(threads)


def measure(work: Work, ceilings: Ceilings, say: Say) -> dict[str, object]:
    """The report, but for the trace."""
    config, device = work.config, work.device
    loader = make_loader(config, device, work.clips) if config.data else None
    dtype = arithmetic(work.dtype, device)
    rates = ceilings.rates(dtype)
    report: dict = {"machine": machine(device), "model": describe(work), "not_measured": {}}
    report["ceilings"] = {"flops_per_s": rates[0], "bytes_per_s": rates[1], "ridge": ceilings.ridge(dtype)}
    report["ceilings"]["dtype"] = str(dtype).removeprefix("torch.")
    say("memory")
    measure_process(report, work)  # before the profiler, which takes far more than a small model
    say("throughput")
    report["throughput"] = timed(work, device, work.clips)
    say("latency")
    measure_latency(report, work)
    say("stages")
    measure_stages(report, work, rates)
    say("kernels")
    measure_kernels(report, work, rates)
    say("memory by stage")
    measure_memory(report, work)
    report["advice"] = advice(report, config)
    if loader is None:
        report["not_measured"]["data"] = "--train --data CACHE times the loader against the update"
        return report
    say("loader")
    feeding = measure_feeding(loader, work.step, work.batch)
    report["data"] = feeding.as_dict() | {"augmentation": loader.augmentation}
    report["advice"] += feeding_advice(feeding, work, loader.augmentation)
    return report


def arithmetic(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """That products are computed in at the best rate: few CPUs have any for float16."""
    return torch.float32 if (dtype, device.type) == (torch.float16, "cpu") else dtype


def build(config: ProfileConfig, device: torch.device, clips: int, weights) -> Work:
    """The work, called once."""
    work = Training(config, device, clips) if config.train else Inference(config, device, clips, weights)
    work()
    synchronise(device)
    return work


def require_memory(config: ProfileConfig, device: torch.device) -> None:
    """Raise SDRError where the views alone are more than a CPU's memory has: Linux promises it and then kills."""
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return
    available = 1024 * int(re.search(r"^MemAvailable:\s*(\d+)", meminfo.read_text(), re.MULTILINE)[1])
    model, clips = config.model, config.clips(device)
    a_clip = model.num_branches * 3 * model.num_frames * model.image_size**2 * config.dtype_on(device).itemsize
    if clips * a_clip > available // 2:  # as much again goes through the network
        what = f"the views of {clips} clips take {clips * a_clip / 1e9:.3g} GB, {available / 1e9:.3g} GB are free"
        raise SDRError("memory", what, f"--batch {max(2, available // (2 * a_clip) // 2 * 2)} or less")


def fitting(make: Callable[[int], Work], clips: int, device: torch.device, *, step: int = 1) -> Work:
    """What ``make`` makes of that many clips.

    Args:
        make: builds the work and calls it once.
        clips: B.
        device: whose memory it is.
        step: B is a multiple of this.

    Raises:
        SDRError: they do not fit into memory; says how many do, found by halving.
    """
    wanted = clips
    while True:
        try:
            work = make(clips)
            break
        except RuntimeError as error:  # on the CPU, running out of memory has no type of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        # outside of the handler, which keeps what the failed run had allocated
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if clips <= step:
            raise SDRError("memory", f"a batch of {clips} does not fit into that of {device}, nor does any other")
        clips = max(step, clips // 2 // step * step)
    if clips != wanted:
        what = f"a batch of {wanted} clips does not fit into that of {device}"
        raise SDRError("memory", what, f"--batch {clips} does")
    return work


def timed(call: Callable[[], object], device: torch.device, clips: int, *, waited: bool = False) -> dict[str, object]:
    """Wall-clock times of calls one after the other, which on a GPU are waited for in rounds, or each where asked."""
    call()  # once more: some libraries choose at the second call
    once = round_s(call, device, 1)
    calls = max(1, int(ROUND_S / once)) if device.type == "cuda" and not waited else 1
    repeats = int(min(REPEATS, max(FEWEST, LIMIT_S / (once * calls)))) if once < LIMIT_S else 1
    return summary([round_s(call, device, calls) for _ in range(repeats)], clips)


def round_s(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of each of so many calls in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def summary(times: Sequence[float], clips: int) -> dict[str, object]:
    median = statistics.median(times)
    found = {"clips": clips, "median_s": median, "repeats": len(times), "clips_per_s": clips / median}
    if len(times) > FEWEST:
        low, _, high = statistics.quantiles(times, n=4)
        found["spread"] = (high - low) / median
    return found


def passes_within(seconds: float, most: int) -> int:
    """How many calls of this length there is time for; one at least."""
    return max(1, min(most, int(LIMIT_S / seconds)))


def measure_latency(report: dict, work: Work) -> None:
    """Add the wall-clock time of one clip, in inference."""
    if isinstance(work, Training):
        report["not_measured"]["latency"] = "an update is not waited for; without --train that of one clip is measured"
        return
    work.one_clip()
    report["latency"] = timed(work.one_clip, work.device, 1, waited=True)


def measure_stages(report: dict, work: Work, rates: tuple[float, float]) -> None:
    """Add each stage's time, and that of a call in which none is marked: medians over calls in turns."""
    passes, wholes, median_s = [], [], report["throughput"]["median_s"]
    with work.by_stage():
        for _ in range(passes_within(2 * median_s, REPEATS // 2) + 1):
            wholes.append(round_s(work, work.device, 1))
            passes.append(stage_times(work, work.device, ahead_s=wholes[-1]))
    first = int(len(passes) > 2)  # which may be slow
    times, floors = medians(passes[first:]), least(work, rates)
    report["stages"] = stage_rows(times, floors, train=work.config.train)
    report["stages_s"], report["whole_s"] = sum(times.values()), statistics.median(wholes[first:])
    if work.config.train:
        report["split"] = split(times)
    if not floors:
        report["not_measured"]["floors"] = "work is not counted for convolutions that look sideways"


def measure_kernels(report: dict, work: Work, rates: tuple[float, float]) -> None:
    """Add what torch.profiler sees."""
    median_s = report["throughput"]["median_s"]
    passes = passes_within(median_s, PASSES)
    found = profile_kernels(work, work.device, median_s=median_s, layers=layers_by_op(work), rates=rates, passes=passes)
    if work.device.type == "cpu":
        del found["idle_share"]  # of a GPU between launches; an operator is not launched
    report["kernels"] = found | {"passes": passes}


def measure_process(report: dict, work: Work) -> None:
    """Add what the process holds between calls and at the peak of one; a GPU's is its allocator's, by stage."""
    report["memory"] = {}
    if work.device.type == "cuda":
        return
    known = reset_resident()
    work()
    if held := resident() if known else None:
        report["memory"] = {"peak_bytes": held.peak, "resident_bytes": held.now}
    else:
        report["not_measured"]["peak memory"] = "this system does not say what a process holds"


def measure_memory(report: dict, work: Work) -> None:
    """Add what is kept for the backward pass, and what is allocated, by stage where that can be known."""
    rows = {row["stage"]: row for row in report["stages"]}
    if work.device.type == "cuda":
        with work.by_stage():
            found = stage_memory(work, allocator_of(work.device))
        add_memory(rows, found)
        report["memory"]["peak_bytes"] = max(memory.peak for memory in found.values())
    else:
        report["not_measured"]["memory by stage"] = "a CPU's allocator does not say; what training keeps is counted"
    if isinstance(work, Training):
        for stage, size in (kept := saved_bytes(work, work.model)).items():
            rows[stage]["saved_bytes"] = size
        report["memory"]["saved_bytes"] = sum(kept.values())


def add_memory(rows: Mapping[str, dict], found: Mapping[Segment, StageMemory]) -> None:
    """Add to each stage's row what is allocated when its forward pass ends, and its peak in either pass."""
    for (stage, backward), memory in found.items():
        row = rows[stage]
        row["peak_bytes"] = max(row.get("peak_bytes", 0), memory.peak)
        if not backward:
            row["allocated_bytes"] = memory.allocated


def write_trace(work: Work, path: Path) -> None:
    """A Chrome trace of one call, with a range for each stage; raises SDRError where it cannot be written."""
    with atomic_file(path) as file, tempfile.TemporaryDirectory() as folder:
        with work.by_stage():
            work()
            synchronise(work.device)
            with profiled(work.device, both=True) as run, ranges(work.device):
                work()
        made = Path(folder, "trace.json")
        run.export_chrome_trace(str(made))
        file.write(made.read_bytes())


def machine(device: torch.device) -> dict[str, object]:
    """What figures must name to mean something later."""
    found = {"device": cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
    installed = {name: version for name, version in versions().items() if version}
    return found | {"kind": device.type, "platform": platform.platform()} | installed


def describe(work: Work) -> dict[str, object]:
    """What runs, and by what."""
    config = work.config
    views = work.batch.views if config.train else work.views
    ops = TRAINING_OPS if config.train else OPS
    like = torch.empty(0, device=work.device)
    return {
        "config": asdict(config.model),
        "weights": config.weights,
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "views": list(views.shape),
        "clips": work.clips,
        "dtype": str(work.dtype).removeprefix("torch."),
        "train": config.train,
        "implementation": config.implementation,
        "plan": work.plan.name,
        "why": work.plan.why,
        "ops": {} if work.plan.plain else {op: choice(op, like)["runs"] for op in ops},
    }
