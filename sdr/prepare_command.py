"""`sdr prepare`: a dataset to a clip cache, and the check of one."""

import sys
import time
from pathlib import Path

from sdr.errors import SDRError, escape
from sdr.terminal import pick_cache, progress_bars, refusals, require, settings


def run_prepare(options) -> int:
    """Exit code 1 where some videos could not be used, or the check found something."""
    if options.check is not None:
        return run_check(options)
    from sdr.cutting import PrepareConfig
    from sdr.datasets import in_two_splits, is_synthetic
    from sdr.layouts import other_layouts, read_layout
    from sdr.prepare import prepare

    if missing := [name for name in ("root", "layout", "out") if options[name] is None]:
        raise SDRError("options", f"needs {' and '.join(missing)}, or --check and a cache")
    require("faces", "prepare")
    config = settings(PrepareConfig, options)
    root = Path(options.root)
    splits = None if options.splits is None else Path(options.splits)
    records = read_layout(options.layout, root, splits=splits, compression=options.compression, methods=options.methods)
    records = [record for record in records if options.split is None or record.split in options.split]
    if not records:
        raise SDRError(root, f"has no video in the split {' or '.join(options.split)}")
    if others := other_layouts(root, options.layout):
        print(f"note: {escape(root)} also holds {' and '.join(others)}, which is not read", file=sys.stderr)
    if leaks := list(in_two_splits((f"identity {r.identity}", r.split, str(r.path)) for r in records)):
        print(
            f"note: {len(leaks)} identities are in two splits, --check lists them, first: {leaks[0]}", file=sys.stderr
        )
    with progress_bars("{task.fields[rate]}", "{task.fields[bad]} unusable") as bars:
        bar = bars.add_task("videos", total=len(records), bad=0, rate="")
        began, first = time.monotonic(), []

        def report(done: int, total: int, bad: int) -> None:
            first.append(done) if not first else None
            rate = (done - first[0]) / (time.monotonic() - began)
            bars.update(bar, completed=done, bad=bad, rate=f"{rate:.2f} videos/s")

        with refusals():
            summary = prepare(
                records,
                root if root.is_dir() else root.parent,
                options.out,
                config,
                layout=options.layout,
                detector=options.detector,
                weights=options.detector_weights,
                detections=pick_cache(options),
                workers=options.workers,
                max_bad=options.max_bad,
                retry=options.retry,
                synthetic=is_synthetic(root),
                progress=report,
            )
    for record, reason in summary.unusable:
        print(f"left out: {escape(record.path)}: {reason}", file=sys.stderr)
    print(f"{summary.clips} clips of {summary.videos} videos, {len(summary.unusable)} videos left out")
    print(f"cache: {escape(Path(options.out).resolve())}")
    return 1 if summary.unusable else 0


def run_check(options) -> int:
    from rich.console import Console
    from rich.table import Table

    from sdr.cache_check import check_cache

    require("prepare")
    with progress_bars() as bars:
        bar = bars.add_task("shards", total=None)
        report = check_cache(
            Path(options.check), progress=lambda done, total: bars.update(bar, completed=done, total=total)
        )
    table = Table("split", "method", "label", "videos", "clips")
    for count in report.counts:
        table.add_row(*map(str, count))
    Console().print(table)
    for problem in report.problems:
        print(f"sdr prepare: {problem}", file=sys.stderr)
    print(f"{len(report.problems)} problems" if report.problems else "all clips are as they were written")
    return 1 if report.problems else 0
