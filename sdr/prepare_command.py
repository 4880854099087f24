"""`sdr prepare`: a dataset to a clip cache, and the check of one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdr.errors import SDRError, escape
from sdr.terminal import pick_cache, progress_bars, refusals, require, settings

if TYPE_CHECKING:  # importing them for real waits until the command runs
    from rich.progress import Progress

    from sdr.datasets import Record


def run_prepare(options) -> int:
    """Exit code 1 where some videos could not be used, or the check found something."""
    if options.check is not None:
        return run_check(options)
    from sdr.cutting import PrepareConfig
    from sdr.datasets import is_synthetic
    from sdr.layouts import other_layouts, read_layout
    from sdr.prepare import prepare

    if missing := [name for name in ("root", "layout", "out") if options[name] is None]:
        raise SDRError("options", f"needs {' and '.join(missing)}, or --check and a cache")
    require("faces", "prepare")
    config = settings(PrepareConfig, options)
    root = Path(options.root)
    folder = root if root.is_dir() else root.parent
    splits = None if options.splits is None else Path(options.splits)
    records = read_layout(options.layout, root, splits=splits, compression=options.compression, methods=options.methods)
    records = [record for record in records if options.split is None or record.split in options.split]
    if not records:
        raise SDRError(root, f"has no video in the split {' or '.join(options.split)}")
    for note in notes(records, options.layout, other_layouts(root, options.layout)):
        print(f"note: {note}", file=sys.stderr)
    try:
        with progress_bars("{task.fields[rate]}", "{task.fields[bad]} unusable") as bars, refusals():
            summary = prepare(
                records,
                folder,
                options.out,
                config,
                layout=options.layout,
                detector=options.detector,
                weights=options.detector_weights,
                detections=pick_cache(options),
                workers=options.workers,
                max_bad=options.max_bad,
                retry=options.retry,
                synthetic=is_synthetic(folder),
                progress=video_bar(bars),
            )
    except KeyboardInterrupt:
        print("sdr prepare: interrupted; what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    for record, reason in summary.unusable:
        print(f"left out: {escape(record.path)}: {reason}", file=sys.stderr)
    print(f"{summary.clips} clips of {summary.videos} videos, {len(summary.unusable)} videos left out")
    print(f"cache: {escape(Path(options.out).resolve())}")
    return 1 if summary.unusable else 0


def notes(records: Sequence[Record], layout: str, others: Sequence[str]) -> Iterator[str]:
    """What a user should know of a dataset before its clips are cut, a line each."""
    from sdr.datasets import in_two_splits

    if others:
        yield f"the folder also holds {' and '.join(others)}, which is not read"
    if layout == "deepfakebench":
        yield "frames aligned one by one, as DeepfakeBench makes them by default, jitter, which looks like forgery"
    leaks = list(in_two_splits((f"identity {r.identity}", r.split, str(r.path)) for r in records))
    if leaks:
        yield f"{len(leaks)} identities are in two splits, --check will list them; the first: {leaks[0]}"


def video_bar(bars: Progress) -> Callable[[int, int, int], None]:
    """A progress of videos done, of all, and of the unusable ones; the rate is this run's."""
    bar = bars.add_task("videos", total=None, visible=False, bad=0, rate="")  # until the cache is ours
    began, before = time.monotonic(), None

    def report(done: int, total: int, bad: int) -> None:
        nonlocal before
        before = done if before is None else before
        rate = f"{(done - before) / (time.monotonic() - began):.2f} videos/s"
        bars.update(bar, completed=done, total=total, visible=True, bad=bad, rate=rate)

    return report


def run_check(options) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sdr.cache_check import check_cache

    require("prepare")
    with progress_bars() as bars:
        bar = bars.add_task("shards", total=None, visible=False)  # until there is a cache
        report = check_cache(
            Path(options.check),
            progress=lambda done, total: bars.update(bar, completed=done, total=total, visible=True),
        )
    table = Table("split", "method", "label", "videos", "clips")
    for count in report.counts:
        table.add_row(*(Text(escape(str(value))) for value in count))
    Console().print(table)
    for problem in report.problems:
        print(f"sdr prepare: {problem}", file=sys.stderr)
    print(f"{len(report.problems)} problems" if report.problems else "all clips are as they were written")
    return 1 if report.problems else 0
