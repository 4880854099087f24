"""`sdr study`: held-out forgery types or the reversed shortcut on synthetic videos, from nothing to the table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdr.errors import escape
from sdr.stopping import stopping
from sdr.terminal import pick_device, progress_bars, refusals, require

if TYPE_CHECKING:  # importing them for real waits until the command runs
    from rich.progress import Progress


def add_study_arguments(parser) -> None:
    """The command's options, added to a parser of jsonargparse."""
    from sdr.study_config import MODELS, SCALES

    parser.add_argument(
        "study",
        type=Literal[tuple(MODELS)],
        help="heldout: one forgery type is left out of training; shortcut: a spatial cue turns round in testing",
    )
    parser.add_argument("--out", type=str, default="sdr_study", help="folder: new, or of one that goes on")
    parser.add_argument("--scale", type=Literal[tuple(SCALES)], default="smallest", help="large is for a GPU")
    parser.add_argument("--workers", type=int | None, help="runs side by side; default: the CPU's cores, one on a GPU")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_study_command(options) -> int:
    """Exit code 130 or 143 where a signal stopped it: the same command goes on."""
    from sdr.study import run_study
    from sdr.study_config import SCALES
    from sdr.study_table import render_markdown, write_study

    require("faces", "prepare", "train", "report")
    device = pick_device(options.device)
    workers = options.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if device.type == "cpu" else 1
    config, out = SCALES[options.scale](), Path(options.out)
    with progress_bars("{task.fields[note]}") as bars, refusals(), stopping() as stop:
        rows = run_study(
            options.study, config, out, device=device, workers=workers, progress=study_bars(bars), stop=stop
        )
    if rows is None:
        again = f"the same command goes on from there: {escape(out.resolve())}"
        print(f"sdr study: stopped, what is done is kept; {again}", file=sys.stderr)
        return stop.code
    paths = write_study(options.study, options.scale, config, rows, out / options.study)
    print(render_markdown(options.study, options.scale, config, rows))
    print(f"written: {', '.join(escape(path.resolve()) for path in paths)}")
    return 0


def study_bars(bars: Progress) -> Callable[[str, int, int], None]:
    """One bar for each thing that is done; the one before goes away, that of the models stays."""
    tasks: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            for name in [name for name in tasks if name != "models"]:
                bars.remove_task(tasks.pop(name))
            tasks[what] = bars.add_task(what, total=total, note="")
        bars.update(tasks[what], completed=done, total=total, note=f"{done} of {total}")

    return report
