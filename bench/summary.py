"""The short table: what was measured beside what an H200 must reach, and why where it falls short."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ledger import NOT_MEASURED, measured

TARGET_GPU = "H200"
PEERS = ("eager", "torch.compile", "CUDA graph")  # beginnings of the names of the peers to beat
LONGEST = 3  # layers that a reason names


@dataclass(frozen=True)
class Target:
    """One row: a figure of the report, and the bounds that it should keep.

    Args:
        what: the row's name.
        figure: reads it from the report's results by step; None or a reason where there is none.
        unit: printed behind the figure.
        must: bound that closes the work; None where there is none.
        goal: bound to reach for.
        at_least: the bounds are lower bounds.
        clips: of the profile that gives the reason; 0 where none does.
    """

    what: str
    figure: Callable[[dict], object]
    unit: str
    must: float | None
    goal: float | None
    at_least: bool = False
    clips: int = 0

    def meets(self, figure: float, bound: float | None) -> bool:
        return bound is not None and (figure >= bound if self.at_least else figure <= bound)


def lookup(*path: str) -> Callable[[dict], object]:
    """Reads one value of the results; the reason why there is none, where that stands in its place."""

    def read(results: dict) -> object:
        value: object = results
        for key in path:
            if not isinstance(value, dict):
                return value
            value = value.get(key)
        return value

    return read


def scaled(read: Callable[[dict], object], factor: float) -> Callable[[dict], object]:
    def figure(results: dict) -> object:
        value = read(results)
        return factor * value if isinstance(value, float | int) else value

    return figure


def ratio(over: Callable[[dict], object], under: Callable[[dict], object]) -> Callable[[dict], object]:
    def figure(results: dict) -> object:
        above, below = over(results), under(results)
        if isinstance(above, str) or isinstance(below, str):
            return above if isinstance(above, str) else below
        return above / below if above is not None and below else None

    return figure


def best_peer(results: dict) -> object:
    """Most clips per second of the peers to beat, over the most clips that they were given."""
    rows = [row for name, row in results.get("peers", {}).items() if name.startswith(PEERS) and isinstance(row, dict)]
    most = max((row["clips"] for row in rows), default=0)
    return max((row["clips_per_s"] for row in rows if row["clips"] == most), default=None)


def best(reads: list[Callable[[dict], object]], choose: Callable) -> Callable[[dict], object]:
    """The best of several figures; the first one's reason where there is none."""

    def figure(results: dict) -> object:
        values = [read(results) for read in reads]
        found = [value for value in values if isinstance(value, float | int)]
        return choose(found) if found else values[0]

    return figure


def best_step(results: dict) -> object:
    """Milliseconds that 16 clips take at the rate of the faster scheme."""
    rate = best(STEPS, max)(results)
    return 1e3 * 16 / rate if isinstance(rate, float | int) else rate


def best_eager_step(results: dict) -> object:
    """Clips per second of the faster layout of eager."""
    rows = [row for name, row in results.get("training", {}).items() if name.startswith("peer eager")]
    return max((row["clips_per_s"] for row in rows if isinstance(row, dict)), default=None)


def largest_deviation(sizes: str) -> Callable[[dict], object]:
    def figure(results: dict) -> object:
        deviations = results.get("timings", {}).get(f"deviation from linear, {sizes}")
        return max(map(abs, deviations.values())) if deviations else None

    return figure


def worst_error(results: dict) -> object:
    """Largest error of the fast model over eager's in the same dtype, of all checks that ran."""
    checks = [
        check["errors"]
        for check in results.get("correctness", {}).values()
        if isinstance(check, dict) and "errors" in check
    ]
    return max((part["ratio"] for errors in checks for part in errors.values()), default=None)


SPEED = lookup("timings", "inference ftcn_released bf16", "clips_per_s")
LATENCY = lookup("timings", "latency ftcn_released bf16 wall", "median_s")
ONE_BRANCH = lookup("timings", "latency ftcn_released bf16 wall, 1 branch", "median_s")
FIRST = lookup("timings", "import to first result, empty cache", "seconds")
FLOOR_SHARE = lookup("timings", "inference ftcn_released bf16", "share_of_floor")
LOSSES = partial(lookup, "losses", "16 x 4 x 1024 bf16, values and gradients, triton")
VIEWS = lookup("views", "clip_views, 16 clips x 4 views bf16", "clips_per_s")
LOADERS = {name: lookup("views", f"loader, {name}", "clips_per_s") for name in ("triton", "dali")}
STEPS = [lookup("training", f"step {scheme}", "clips_per_s") for scheme in ("gram", "fused")]
MEMORY = [lookup("training", f"memory {scheme}", "bytes_per_clip") for scheme in ("gram", "fused")]
BANK = partial(lookup, "losses", "InfoNCE 65536 x 128, ours")
# the inference, loss and augmentation rows of the project's targets for an H200 in bf16
TARGETS = [
    Target("inference, 16 clips x 4 branches", SPEED, "clips/s", 700, 1000, at_least=True, clips=16),
    Target("... against the best peer", ratio(SPEED, best_peer), "x", 3, None, at_least=True, clips=16),
    Target("... share of floor", scaled(FLOOR_SHARE, 100), "%", None, 75, at_least=True, clips=16),
    Target("latency, 1 clip x 4 branches, head included", scaled(LATENCY, 1e3), "ms", 1.6, 1.2, clips=1),
    Target("4 branches against 1, one clip", ratio(LATENCY, ONE_BRANCH), "x", 2.4, 2.1, clips=1),
    Target("T 8..128, off linear in work", scaled(largest_deviation("frames"), 100), "%", 15, 15),
    Target("V 1..16, off linear in work", scaled(largest_deviation("branches"), 100), "%", 15, 15),
    Target("import to first result, nothing cached", FIRST, "s", 10, 3),
    Target("training step, 16 clips x 4 branches", best_step, "ms", 105, 67),
    Target("... against eager bf16", ratio(best(STEPS, max), best_eager_step), "x", 2, None, at_least=True),
    Target("training memory, a clip of 4 branches", scaled(best(MEMORY, min), 1e-9), "GB", 3.3, 1.5),
    Target("losses, 16 x 4 x 1024, values and gradients", scaled(LOSSES("median_s"), 1e6), "us", 25, 12),
    Target("... launches", LOSSES("launches"), "", 1, 1),
    Target("InfoNCE 65,536 x 128, forward and backward", scaled(BANK("median_s"), 1e3), "ms", 7, 4.5),
    Target("... memory beside the features", scaled(BANK("peak_bytes"), 1e-6), "MB", 100, 50),
    Target("TPA, 4 views of 16 uint8 clips in bf16", VIEWS, "clips/s", 20_000, None, at_least=True),
    *(
        Target(f"loader by {name} against inference", ratio(read, SPEED), "x", 1.2, None, at_least=True)
        for name, read in LOADERS.items()
    ),
    Target("error, in units of eager's in the same dtype", worst_error, "x", 2, None),
]


def layer_reason(name: str, row: dict) -> str:
    """One layer: its share of floor and the rate that it reached, in the unit that bounds it."""
    if row["bound"] == "arithmetic":
        rate = f"{row['flops'] / row['median_s'] / 1e12:.0f} TFLOP/s"
    else:
        rate = f"{row['bytes'] / row['median_s'] / 1e12:.2f} TB/s"
    layers = f"{row['count']} x " if row["count"] > 1 else ""
    return f"{layers}{name} {1e6 * row['median_s']:.0f} us, {100 * row['share_of_floor']:.0f} % of floor ({rate})"


def reason(results: dict, clips: int) -> str:
    """Where the time above the floor goes, from the timed ops and the profile; empty where neither was measured."""
    rows = {
        key.removeprefix("op ").split(",")[0]: row
        for key, row in results.get("timings", {}).items()
        if key.startswith("op ") and key.endswith("ftcn_released") and isinstance(row, dict)
        if row["clips"] == clips and "floor_s" in row
    }
    lost = sorted(rows, key=lambda name: -rows[name]["count"] * (rows[name]["median_s"] - rows[name]["floor_s"]))
    parts = [layer_reason(name, rows[name]) for name in lost[:LONGEST]]
    found = results.get("profiling", {}).get(f"inference, {clips} clips")
    if isinstance(found, dict):
        parts.append(f"GPU idle {100 * found['idle_share']:.0f} % between {found['launches']:.0f} launches")
    return "; ".join(parts)


def summarise(results: dict) -> list[dict[str, object]]:
    """Rows of the table: what, must, goal, measured, verdict.

    Args:
        results: step name to what it found.
    """
    rows = []
    for target in TARGETS:
        figure = target.figure(results)
        bounds = {"must": target.must, "goal": target.goal, "at_least": target.at_least}
        row = {"what": target.what, "unit": target.unit, **bounds}
        if not measured(figure):
            verdict = figure if isinstance(figure, str) else NOT_MEASURED + "its step did not get there"
            figure = None
        elif target.meets(figure, target.goal):
            verdict = "goal"
        elif target.must is None or target.meets(figure, target.must):
            verdict = "must" if target.must is not None else "short of goal"
        else:
            verdict = "short"
        if verdict.startswith("short") and target.clips:
            why = reason(results, target.clips)
            verdict = f"{verdict}: {why}" if why else verdict
        rows.append({**row, "measured": figure, "verdict": verdict})
    return rows


def bound_text(row: dict, name: str) -> str:
    return "" if row[name] is None else f"{row[name]:g}"


def table(report: dict) -> str:
    """The summary as text, with what it was measured on above it."""
    stamp = report["stamp"]
    lines = [f"{stamp['gpu']}, torch {stamp['torch']}, triton {stamp['triton']}, commit {str(stamp['commit'])[:7]}"]
    if report["rehearsal"]:
        lines.append("rehearsal, not a measurement")
    elif TARGET_GPU not in str(stamp["gpu"]):
        lines.append(f"must and goal are meant for an {TARGET_GPU}")
    lines.append(f"{'what':<46}{'must':>7}{'goal':>7}{'measured':>12}          verdict")
    for row in report["summary"]:
        figure = "" if row["measured"] is None else f"{row['measured']:.4g}"
        bounds = f"{bound_text(row, 'must'):>7}{bound_text(row, 'goal'):>7}"
        lines.append(f"{row['what']:<46}{bounds}{figure:>12} {row['unit']:<8} {row['verdict']}")
    return "\n".join(lines)
