"""A profile for reading: a few lines and tables that fit 80 columns."""

from collections.abc import Iterator, Mapping, Sequence

from sdr.errors import escape

KERNELS = 12  # rows of the table
EMPTY = "-"


def show(report: Mapping) -> None:
    """Print a report of :func:`sdr.profile.profile`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in head(report):
        console.print(Text(line))
    for title, columns, rows in tables(report):
        console.print()
        console.print(table(title, columns, rows))
    console.print()
    for line in foot(report):
        console.print(Text(line))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]):
    """The first column is text and gives way where there is no room; the others are figures, or short."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        text = number == 0 or column in ("our op", "bound by")
        made.add_column(column, justify="left" if text else "right", no_wrap=True, overflow="ellipsis", min_width=None)
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def head(report: Mapping) -> Iterator[str]:
    """What was measured, where, and the figures of the whole."""
    machine, model, ceilings = report["machine"], report["model"], report["ceilings"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} of {machine['cores']}"
    where = threads if machine["kind"] == "cpu" else f"{machine['memory_bytes'] / 1e9:.0f} GB"
    triton = f", triton {machine['triton']}" if "triton" in machine else ""
    yield f"{machine['device']}, {where}; torch {machine['torch']}{triton}, python {machine['python']}"
    what, config = "training" if model["train"] else "inference", model["config"]
    shape = " x ".join(map(str, model["views"]))
    branches = "1 branch" if config["num_branches"] == 1 else f"{config['num_branches']} branches"
    yield (
        f"{what} in {model['dtype']}, views {shape}: {branches} of width {config['width']} to "
        f"res{config['backbone_stages'] + 1}, {model['parameters'] / 1e6:.3g} M parameters"
    )
    if model["weights"] is not None:
        yield f"weights {escape(model['weights'])}"
    yield f"implementation {model['implementation']}: {implementation(model)}"
    rates = quantity(ceilings["flops_per_s"], "FLOP/s"), quantity(ceilings["bytes_per_s"], "B/s")
    top = f"{rates[0]} in {ceilings['dtype']} and {rates[1]}"
    yield f"ceilings, measured now: {top}, {ceilings['ridge']:.3g} FLOP a byte"
    yield f"throughput: {timing(report['throughput'])}"
    if "latency" in report:
        latency = report["latency"]
        yield f"latency of one clip, wall clock: {milliseconds(latency['median_s'])} ms ({sampled(latency)})"
    if "split" in report:
        parts = {name.removesuffix("_s"): seconds for name, seconds in report["split"].items()}
        yield "an update: " + ", ".join(f"{name} {milliseconds(seconds)} ms" for name, seconds in parts.items())


def implementation(model: Mapping) -> str:
    """What runs the branches, and why where it is plain PyTorch."""
    if model["plan"] == "eager":
        return f"plain PyTorch runs the branches: {model['why']}"
    scheme = "" if model["plan"] == "block" else f"scheme {model['plan']}; "
    return scheme + ", ".join(f"{op} by {runs}" for op, runs in model["ops"].items())


def timing(row: Mapping) -> str:
    clips = "1 clip" if row["clips"] == 1 else f"{row['clips']} clips"
    return f"{row['clips_per_s']:.3g} clips/s ({clips} in {milliseconds(row['median_s'])} ms, {sampled(row)})"


def sampled(row: Mapping) -> str:
    """How often a time was taken, and how far the times are apart."""
    count = f"median of {row['repeats']}" if row["repeats"] > 1 else "once"
    return f"{count}, spread {100 * row['spread']:.0f} %" if "spread" in row else f"{count}, spread not known"


def tables(report: Mapping) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, columns and rows."""
    yield "Stages: time", *stage_table(report)
    if any("saved_bytes" in row or "peak_bytes" in row for row in report["stages"]):
        yield "Stages: memory", *memory_table(report)
    kernels, busy = report["kernels"], report["kernels"]["busy_us"]
    if set(kernels["ops"]) != {"other"}:
        columns = "our op", "launches", "ms", "share", "floor\nms", "of\nfloor"
        yield (
            "Ops, under the profiler, which takes time of its own",
            columns,
            [op_row(*item) for item in kernels["ops"].items()],
        )
    kind = "Operators" if report["machine"]["kind"] == "cpu" else "Kernels"
    gpu = kind == "Kernels"  # an operator's name does not say in which of our ops it ran
    rows = [
        [
            *(row["kernel"], *[row["op"]] * gpu, f"{row['launches']:.0f}", milliseconds(row["us"] / 1e6)),
            percent(row["us"] / busy),
        ]
        for row in kernels["kernels"][:KERNELS]
    ]
    title = f"{kind}{'' if gpu else ', own time of all threads'}: the longest, of {kernels['launches']:.0f} launches"
    yield title, ("name", *["our op"] * gpu, "launches", "ms", "share"), rows


def stage_table(report: Mapping) -> tuple[Sequence[str], list[list[str]]]:
    train = report["model"]["train"]
    columns = ["stage", "forward\nms", *["backward\nms"] * train, "share", "GFLOP", "MB", "floor\nms", "of\nfloor"]
    rows = []
    for row in report["stages"]:
        times = [milliseconds(row["forward_s"])]
        times += [milliseconds(row["backward_s"]) if "backward_s" in row else EMPTY] * train
        work = [EMPTY] * 5
        if "floor_s" in row:
            work = [f"{row['flops'] / 1e9:.3g}", f"{row['bytes'] / 1e6:.3g}", milliseconds(row["floor_s"])]
            work += [percent(row["share_of_floor"]) + "*" * (row["floor_of"] == "forward"), row["bound"]]
        rows.append([row["stage"], *times, percent(row["share_of_time"]), *work])
    both = [sum(row["forward_s"] for row in report["stages"])]
    both += [sum(row.get("backward_s", 0.0) for row in report["stages"])] * train
    rows.append(["all", *map(milliseconds, both), "100 %", *[""] * 5])
    return [*columns, "bound by"], rows


def memory_table(report: Mapping) -> tuple[Sequence[str], list[list[str]]]:
    names = {"saved_bytes": "kept for\nbackward MB", "allocated_bytes": "allocated\nMB", "peak_bytes": "peak\nMB"}
    names = {key: name for key, name in names.items() if any(key in row for row in report["stages"])}
    rows = [
        [row["stage"], *(f"{row[key] / 1e6:.3g}" if key in row else EMPTY for key in names)] for row in report["stages"]
    ]
    return ["stage", *names.values()], rows


def op_row(op: str, row: Mapping) -> list[str]:
    floor = [milliseconds(row["floor_us"] / 1e6), percent(row["share_of_floor"])] if "floor_us" in row else [EMPTY] * 2
    launches = f"{row['launches']:.0f}" if row["launches"] else EMPTY
    return [op, launches, milliseconds(row["us"] / 1e6), percent(row["share_of_time"]), *floor]


def foot(report: Mapping) -> Iterator[str]:
    """How the figures belong together, loading against computing, what is not measured, and what to change."""
    whole, alone = report["whole_s"], report["stages_s"]
    slabs = report["model"]["plan"] == "block" and report["machine"]["kind"] == "cpu"
    apart = ", whose kernels run slabs of rows through all stages at once," if slabs else ""
    yield f"in turns: stages one by one {milliseconds(alone)} ms, a call as a whole{apart} {milliseconds(whole)} ms"
    if any(row.get("floor_of") == "forward" for row in report["stages"]):
        yield "* of the forward pass alone: the head's backward pass is not counted"
    if any(row.get("share_of_floor", 0.0) > 1 for row in report["stages"]):
        more = "; and a wide 3-tap convolution takes four products for six" * (report["machine"]["kind"] == "cpu")
        yield f"above 100 % of a floor: the ceilings may be of a time when something else was at work{more}"
    if "idle_share" in report["kernels"]:
        yield f"the GPU is idle {percent(report['kernels']['idle_share'])} of the time, between launches"
    memory = report["memory"]
    if "peak_bytes" in memory:
        whose = "the GPU's allocator"
        if "resident_bytes" in memory:
            whose = f"the process, {memory['resident_bytes'] / 1e6:.4g} MB between calls"
        yield f"memory: {memory['peak_bytes'] / 1e6:.4g} MB at the peak of {whose}"
    if "data" in report:
        data = report["data"]
        rates = {
            "reading": data["reading"],
            "loader": data["loader"],
            "update": data["update"],
            "both": data["together"],
        }
        said = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
        yield f"clips/s: {said}; augmentation by {data['augmentation']}; the bottleneck is the {data['bottleneck']}"
    for name, reason in report["not_measured"].items():
        yield f"{name}: not measured: {reason}"
    for line in report["advice"]:
        yield f"> {line}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def quantity(value: float, unit: str) -> str:
    """With the prefix that leaves one to three digits before the point."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    raise AssertionError("unreachable")
