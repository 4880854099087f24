"""`sdr reproduce`: a table or figure of the paper, ours beside the published one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdr.errors import escape
from sdr.stopping import stopping
from sdr.terminal import progress_bars, refusals, require
from sdr.train_command import add_train_arguments, read_train_config, say

if TYPE_CHECKING:  # importing them for real waits until the command runs
    from rich.progress import Progress

    from sdr.reproduce import Result, Stage


def add_reproduce_arguments(parser, argv: Sequence[str] = ()) -> None:
    """The command's options, added to a parser of jsonargparse; ``argv`` is for :func:`add_train_arguments`."""
    from sdr.protocol import EXPERIMENTS

    parser.add_argument("experiment", type=Literal[tuple(EXPERIMENTS)], help="of the paper")
    parser.add_argument(
        "--data",
        type=str,
        nargs="+",
        metavar="CACHE",
        required=True,
        help="clip caches that sdr prepare wrote: of ffpp and, for all but table1, of celebdf and dfdc",
    )
    parser.add_argument("--out", type=str, default="sdr_reproduction", help="folder: new, or of one that goes on")
    add_train_arguments(parser, argv)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_reproduce(options) -> int:
    from sdr.engine import processes
    from sdr.protocol import find_caches
    from sdr.reproduce import reproduce
    from sdr.reproduce_tables import write_result

    config = read_train_config(options)
    require("prepare", "train", "report")
    caches, out, main = find_caches(options.data), Path(options.out), processes().rank == 0
    with progress_bars("{task.fields[note]}") as bars, refusals(), stopping() as stop:
        result = reproduce(
            options.experiment,
            config,
            caches,
            out,
            device=options.device,
            progress=stage_bars(bars, visible=main),
            stop=stop,
        )
    if result is None:
        if main:
            again = f"the same command goes on from there: {escape(out.resolve())}"
            print(f"sdr reproduce: stopped, what is done is kept; {again}", file=sys.stderr)
        return stop.code
    if main:
        paths = write_result(result, out)
        print_result(result)
        print(f"written: {', '.join(escape(path.resolve()) for path in paths)}")
    return 0


def stage_bars(bars: Progress, *, visible: bool) -> Callable[[Stage], None]:
    """One bar of the models, one of what is being done with the present one."""
    models = bars.add_task("models", total=None, visible=False, note="")  # until the plan is found sound
    part = bars.add_task("", total=None, visible=False, note="")

    def report(stage: Stage) -> None:
        done = stage.done / max(stage.total, 1) if stage.doing == "training" else 1.0
        note = f"{stage.number} of {stage.runs}"
        bars.update(models, total=stage.runs, completed=stage.number - 1 + done, visible=visible, note=note)
        name, note = f"{escape(stage.row)}, {stage.doing}", say(stage.figures)
        bars.update(part, description=name, total=stage.total, completed=stage.done, visible=visible, note=note)

    return report


def print_result(result: Result) -> None:
    """AUC and accuracy, narrow enough for a terminal, their scale and the notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sdr.reproduce_tables import PAPER_METRICS, TITLES, notes, scale, table_cells

    header, rows = table_cells(result, PAPER_METRICS)
    table = Table(title=TITLES[result.experiment][0], box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(f"{header[0]}\n{header[1]}")
    for name in header[3:]:
        table.add_column(name.replace("difference", "diff.").replace(", paper", "\npaper"))
    for row, dataset, _, *figures in rows:
        table.add_row(Text(f"{row}\n{dataset}"), *(Text(cell.replace(" (", "\n(")) for cell in figures))
    Console().print(table)
    for name, text in scale(result).items():
        print(f"{name}: {text}")
    for note in notes(result):
        print(note)
