"""What the report's plots show, as plain numbers: measured figures by run, and figures computed by the layer model."""

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from rows import GPU, Results, Row, Run, counted
from summary import summarise

import sdr_kernels
from sdr import SDRConfig, ftcn_released
from sdr.layers import Layer, distinct, layers_of
from sdr.passes import INFERENCE, passes_of
from sdr.training_passes import TRAINING, saved_bytes, training_passes

# both of an H200 in bfloat16, as the kernels' design assumes them: given, not measured here
H200_RATES = 790e12, 4.3e12  # FLOP/s, bytes/s
CLIPS = 16  # of the paper's batch
FRAMES = 32
SUBJECT = re.compile(
    r"(?P<what>.*?)[,:] (?P<clips>\d+) clips? x (?P<branches>\d+) branch(?:es)?"
    r"(?:, (?P<frames>\d+) frames| of (?P<T>\d+) x (?P<side>\d+) x \d+)?"
)
AXES = {"clips": "clips B", "branches": "branches V", "frames": "frames T"}
NOUNS = {"clips": "clip", "branches": "branch", "frames": "frame"}
KERNELS = frozenset(sdr_kernels.__all__)  # rows of these ops are kernels; others are of whole parts of the software
STAGES = ("stem", "res2", "res3", "res4", "res5", "head")


def short(value: float) -> float:
    """Five digits, which is more than any figure here is worth."""
    return float(f"{value:.5g}")


def sizes_of(row: Row) -> dict[str, object] | None:
    """What, clips, branches and frames of a subject that names them."""
    match = SUBJECT.fullmatch(row.subject)
    if match is None:
        return None
    found = match.groupdict()
    sizes = {"clips": int(found["clips"]), "branches": int(found["branches"])}
    frames = int(found["frames"] or found["T"] or FRAMES)
    side = f", {found['side']} pixels" if found["side"] else ""
    return {"what": found["what"] + side, **sizes, "frames": frames}


def floors() -> list[dict[str, object]]:
    """Least milliseconds of the backbones on an H200 by how much is fused; computed."""
    rows, config = [], ftcn_released()
    branches = f"{config.num_branches} branches"
    for clips in (1, CLIPS):
        work = f"inference, {counted(clips, 'clip')} x {branches}"
        rows += [(work, plan, passes_of(config, clips, plan)) for plan in INFERENCE]
    work = f"training step, {CLIPS} clips x {branches}"
    rows += [(work, scheme, training_passes(config, CLIPS, scheme)) for scheme in TRAINING]
    return [
        {"work": work, "plan": plan, "ms": short(1e3 * sum(x.floor(*H200_RATES) for x in passes))}
        for work, plan, passes in rows
    ]


def point(name: str, op: str, impl: str, flops: float, moved: float, seconds: float, share: float) -> dict[str, object]:
    """Of a roofline plot: FLOP/byte and FLOP/s, and the share of its own floor."""
    place = {"x": short(flops / moved), "y": short(flops / seconds)}
    return {"name": name, "op": op, "impl": impl, **place, "seconds": short(seconds), "share": short(share)}


def design_roofline() -> dict[str, object]:
    """Every op of a forward pass where an H200's ceilings would have it; computed."""
    points = []
    for layer, _ in distinct(layers_of(ftcn_released(), CLIPS)):
        seconds = layer.floor(*H200_RATES)
        name = f"{layer.name}, {CLIPS} clips x 4 branches"
        points.append(point(name, layer.op, "floor, computed", layer.flops, layer.bytes, seconds, 1.0))
    flops, moved = H200_RATES
    title = "H200, bfloat16: ceilings as given, not measured; kernels at their floors, computed"
    return {"title": title, "flops_per_s": flops, "bytes_per_s": moved, "points": points, "measured": False}


def rooflines(run: Run) -> list[dict[str, object]]:
    """A plot for each dtype and number of threads that rows were measured in: ceilings and points."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in run.measured:
        if row.op in KERNELS and row.figures.get("flops") and row.figures.get("bytes"):
            groups.setdefault((row.threads, row.dtype), []).append(row)
    plots = []
    for (threads, dtype), rows in sorted(groups.items()):
        ceilings = run.ceilings.get(threads)
        if ceilings is None or dtype not in ceilings["flops_per_s"]:
            continue
        where = f"{run.device}, {dtype}" + (f", {counted(threads, 'thread')}" if threads else "")
        points = [
            point(
                *(row.subject, row.op, row.impl, row.figures["flops"], row.figures["bytes"], row.median_s),
                row.figures.get("share_of_floor", 0.0),
            )
            for row in rows
        ]
        rates = {"flops_per_s": ceilings["flops_per_s"][dtype], "bytes_per_s": ceilings["bytes_per_s"]}
        plots.append({"title": f"{where}, commit {run.commit}", **rates, "points": points, "measured": True})
    return plots


def stages(run: Run) -> list[dict[str, object]]:
    """Milliseconds of every stage of the forward pass, summed over its layers, and of its floor.

    A stage of which a layer was not measured is left out. Layers of equal sizes were measured once and count as often
    as there are of them.
    """
    groups: dict[tuple, dict[str, Row]] = {}
    for row in run.measured:
        sizes = sizes_of(row)
        if sizes and sizes["frames"] == FRAMES:
            key = (sizes["clips"], sizes["branches"], row.dtype, row.impl)
            groups.setdefault(key, {})[sizes["what"]] = row
    found = []
    for (clips, branches, dtype, impl), rows in sorted(groups.items()):
        config = replace(ftcn_released(), num_branches=branches)
        for stage, layers in by_stage(config, clips).items():
            if all(layer.name in rows and rows[layer.name].op == layer.op for layer, _ in layers):
                ms = sum(1e3 * count * rows[layer.name].median_s for layer, count in layers)
                floors = [1e3 * count * rows[layer.name].figures.get("floor_s", math.nan) for layer, count in layers]
                floor = None if math.isnan(sum(floors)) else short(sum(floors))
                work = f"{counted(clips, 'clip')} x {counted(branches, 'branch')}, {dtype}"
                found.append({"work": work, "impl": impl, "stage": stage, "ms": short(ms), "floor_ms": floor})
    return found


def by_stage(config: SDRConfig, clips: int) -> dict[str, list[tuple[Layer, int]]]:
    """Distinct layers of every stage with how often they come."""
    found: dict[str, list[tuple[Layer, int]]] = {}
    for layer, count in distinct(layers_of(config, clips)):
        found.setdefault(layer.stage, []).append((layer, count))
    return found


def memory(results: Results) -> list[dict[str, object]]:
    """Gigabytes that an update keeps of a clip of four branches, by part; computed and counted ones apart."""
    kept = {("computed", scheme): saved_bytes(ftcn_released(), scheme) for scheme in TRAINING}
    for run in results.runs:
        for row in run.measured:
            parts = row.figures.get("bytes_per_clip")
            if isinstance(parts, dict):
                kept["counted", "eager" if row.impl == "reference" else row.impl.split()[-1]] = parts
    rows = []
    for (kind, scheme), parts in kept.items():
        gigabytes = {part: short(size / 1e9) for part, size in parts.items()}
        rows.append({"kind": kind, "scheme": scheme, "parts": gigabytes, "all": short(sum(parts.values()) / 1e9)})
    return rows


def scaling(run: Run) -> list[dict[str, object]]:
    """Seconds of a model over frames, branches or clips, wherever three or more sizes were measured alike."""
    series: dict[tuple, dict[int, float]] = {}
    for row in run.measured:
        sizes = sizes_of(row)
        if sizes is None or row.op not in ("model", "training step"):
            continue
        for axis in AXES:
            rest = tuple(counted(sizes[other], NOUNS[other]) for other in AXES if other != axis)
            series.setdefault((axis, sizes["what"], row.impl, row.dtype, row.threads, rest), {})[sizes[axis]] = (
                row.median_s
            )
    return [
        {
            "axis": axis,
            "name": f"{what}, {impl} {dtype}, {' x '.join(rest)}",
            "size": sorted(times),
            "ms": [short(1e3 * times[size]) for size in sorted(times)],
        }
        for (axis, what, impl, dtype, _, rest), times in series.items()
        if len(times) > 2
    ]


def history(runs: Iterable[Run]) -> list[dict[str, object]]:
    """Milliseconds of each subject and implementation, run by run on each machine."""
    series: dict[tuple, dict[str, float]] = {}
    for run in runs:
        for row in run.measured:
            if isinstance(row.figures.get("bytes_per_clip"), dict):  # its seconds are those of counting
                continue
            key = (run.device, row.op or "other", row.subject, row.impl, row.dtype, row.threads)
            # the first, where a run has several of them, each against something else
            series.setdefault(key, {}).setdefault(f"{run.date[:10]} {run.commit}", short(1e3 * row.median_s))
    return [
        {
            "device": device,
            "op": op,
            "name": f"{subject}, {impl} {dtype}" + (f", {threads} threads" if threads > 1 else ""),
            "runs": list(points),
            "ms": list(points.values()),
        }
        for (device, op, subject, impl, dtype, threads), points in sorted(series.items())
    ]


def audited(audit: dict | None) -> list[dict[str, object]]:
    """Most registers and shared memory of each kernel, over every dtype and tile that ships, by architecture."""
    found: dict[tuple[str, str], dict[str, object]] = {}
    for row in audit["rows"] if audit else []:
        key = (row["kernel"].strip("_").removesuffix("_kernel"), row["arch"])
        entry = found.setdefault(key, {"compiled": 0, "registers": 0, "shared": 0, "spilled": 0, "tensor_core": False})
        entry["compiled"] += 1
        for name in ("registers", "shared"):
            entry[name] = max(entry[name], row[name])
        entry["spilled"] = max(entry["spilled"], row["local"])
        entry["tensor_core"] |= row["tensor_core"] > 0
    return [{"kernel": kernel, "arch": arch, **entry} for (kernel, arch), entry in sorted(found.items())]


def newest_h200(results: Results) -> Run | None:
    """The last run of `make gpu` on an H200."""
    runs = [run for run in results.runs if run.command == GPU and "H200" in run.device]
    return max(runs, key=lambda run: run.date, default=None)


def target_rows(results: Results) -> tuple[list[dict], Run | None]:
    """The H200's targets with what was measured of each, and the run that it is from."""
    run = newest_h200(results)
    return list(run.targets) if run else summarise({}), run
