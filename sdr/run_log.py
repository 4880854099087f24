"""The logs of a training run: CSV files that a resumed run goes on with, without gap or repeat, and TensorBoard's.

losses.csv        every step: its losses, learning rate and gradient
throughput.csv    now and then: how fast, how much memory
validation.csv    every evaluation: the metrics, whose names its first row fixes
tensorboard/      the same figures as events
"""

import csv
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np

from sdr.errors import SDRError
from sdr.files import make_folder, remove, sync_folder, to_csv, write_atomic

LOSSES = ("step", "epoch", "lr", "total", "ce", "mi", "contrastive", "aux", "grad_norm", "skipped")
THROUGHPUT = ("step", "seconds", "clips_per_second", "memory_gb", "skipped_total")
LOSS_PARTS = ("total", "ce", "mi", "contrastive", "aux")


class RunLog:
    """The logs of the run in the folder ``out``, open for writing.

    Two equal runs write the same bytes to losses.csv and validation.csv, also where one was killed and resumed.

    Args:
        out: the run's folder; made when missing.
        step: the last step that counts. Rows of later steps, and a line that was being written when the run was
            killed, are cut off; TensorBoard is told to forget what is later.
        validated: the last step whose validation counts, where it is an earlier one.

    Raises:
        SDRError: a log cannot be written, is not one of these, or lacks a step up to ``step``; TensorBoard is missing.
    """

    def __init__(self, out: str | os.PathLike, *, step: int = 0, validated: int | None = None) -> None:
        out = Path(out)
        make_folder(out)
        with ExitStack() as opened:

            def keep(part):
                return opened.enter_context(closing(part))

            self._losses = keep(_Table(out / "losses.csv", "loss", step, LOSSES, every_step=True))
            self._throughput = keep(_Table(out / "throughput.csv", "throughput", step, THROUGHPUT))
            validated = step if validated is None else validated
            self._validation = keep(_Table(out / "validation.csv", "validation", validated))
            self._events = keep(_Events(out / "tensorboard", step))
            for table in (self._losses, self._throughput, self._validation):
                if step and table.last == step:
                    self._show(table, dict(zip(table.columns, table.last_line.split(","), strict=True)))
            self._opened = opened.pop_all()

    def losses(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log steps: the columns of :data:`LOSSES`, ``skipped`` being 1 where the step changed no weight."""
        self._log(self._losses, rows)

    def throughput(self, row: Mapping[str, float]) -> None:
        """Log the columns of :data:`THROUGHPUT`; ``seconds`` are those since the row before or the start."""
        self._log(self._throughput, [row])

    def validation(self, row: Mapping[str, float]) -> None:
        """Log an evaluation: ``step``, ``epoch``, then metrics, the same in every row."""
        self._log(self._validation, [row])

    def _log(self, table: "_Table", rows: Sequence[Mapping[str, float]]) -> None:
        table.add(rows)
        for row in rows:
            self._show(table, row)
        self._events.flush()

    def _show(self, table: "_Table", row: Mapping[str, float | str]) -> None:
        """The row's figures as TensorBoard's events, whose names it sorts into groups."""
        values = {}
        for name, value in row.items():
            if name not in ("step", "epoch", "seconds"):
                alone = table is self._losses and name not in LOSS_PARTS
                values[name if alone else f"{table.group}/{name.replace(' ', '_')}"] = float(value)
        self._events.add(int(row["step"]), values)

    def sync(self) -> None:
        """Make all that was logged survive a power cut; a checkpoint is written after this."""
        for part in (self._losses, self._throughput, self._validation, self._events):
            part.sync()

    def close(self) -> None:
        """Close the files; raises SDRError where the last of them cannot be written."""
        self._opened.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with suppress(SDRError) if error else nullcontext():  # the first error is the one to tell
            self.close()


def read_log(path: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of a CSV log; none where there is no such file. A line that was cut off while written is left out.

    Raises:
        SDRError: it cannot be read, or holds something other than numbers.
    """
    path = Path(path)
    lines = _whole_lines(path)
    try:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(lines)]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:  # too few cells are None, too many a list
        raise SDRError(path, "is not a log of a training run") from error


def _whole_lines(path: Path) -> list[str]:
    """Without their ends; none where there is no file."""
    try:
        data = path.read_bytes() if os.path.lexists(path) else b""
    except OSError as error:
        raise SDRError(path, f"cannot be read: {error.strerror}") from error
    return data.decode("utf-8", "replace").split("\n")[:-1]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SDRError(path, f"cannot be written: {error.strerror}") from error


class _Table:
    """One CSV file of rows whose steps grow.

    Args:
        path: of the file.
        group: what TensorBoard names its figures by.
        step: the last that counts.
        columns: names; None takes those of the first row, until when there is no file.
        every_step: no step may be missing.
    """

    def __init__(
        self,
        path: Path,
        group: str,
        step: int,
        columns: tuple[str, ...] | None = None,
        *,
        every_step: bool = False,
    ) -> None:
        self.path, self.group, self.columns, self.every_step = path, group, columns, every_step
        self.last, self.file = 0, None
        lines = _whole_lines(path)
        kept = self._cut(lines, step) if lines else []
        self.last_line = kept[-1] if kept else ""
        if every_step and self.last != step:
            raise SDRError(path, f"ends at step {self.last}, the checkpoint is of step {step}", "start in a new folder")
        if columns is None and not kept:
            self.columns = None
            remove(path)
            return
        text = "".join(line + "\n" for line in kept)
        self._start(to_csv([], self.columns) + text)

    def _cut(self, lines: list[str], step: int) -> list[str]:
        """The rows up to ``step``."""
        columns = tuple(next(csv.reader(lines[:1])))
        if columns[:1] != ("step",) or columns != (self.columns or columns):
            raise SDRError(self.path, "is not a log of this version", "start in a new folder")
        self.columns = columns
        for number, line in enumerate(lines[1:]):
            cells = line.split(",")
            if len(cells) != len(columns) or re.fullmatch(r"[0-9]{1,18}", cells[0]) is None or not _numbers(cells):
                raise SDRError(self.path, f"is damaged in line {number + 2}")
            now = int(cells[0])
            if now > step:
                return lines[1 : number + 1]
            if now <= self.last or (self.every_step and now != self.last + 1):
                raise SDRError(self.path, f"has step {now} after step {self.last}", "start in a new folder")
            self.last = now
        return lines[1:]

    def _start(self, text: str) -> None:
        """Leave ``text`` in the file and open it to go on."""
        write_atomic(self.path, text)
        with _writing(self.path):
            self.file = open(self.path, "ab")  # noqa: SIM115, closed by close

    def add(self, rows: Sequence[Mapping[str, float]]) -> None:
        for row in rows:
            columns = self.columns or tuple(row)
            if sorted(row) != sorted(columns) or columns[0] != "step":
                raise ValueError(f"a row of {self.path.name} must have {', '.join(columns)}, got {', '.join(row)}")
            if row["step"] <= self.last or (self.every_step and row["step"] != self.last + 1):
                raise ValueError(f"step must follow {self.last} in {self.path.name}, got {row['step']}")
            line = ",".join(_cell(row[name]) for name in columns) + "\n"
            if self.file is None:
                self.columns = columns
                self._start(to_csv([], columns) + line)
            else:
                with _writing(self.path):
                    self.file.write(line.encode())
            self.last = row["step"]
        with _writing(self.path):
            if self.file:
                self.file.flush()

    def sync(self) -> None:
        if self.file:
            with _writing(self.path):
                self.file.flush()
                os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file:
            with _writing(self.path):
                self.file.close()


def _cell(value: float) -> str:
    """A number from which exactly this one is read back."""
    return str(int(value)) if isinstance(value, int | np.integer) else repr(float(value))


def _numbers(cells: Sequence[str]) -> bool:
    try:
        return [float(cell) for cell in cells] != []
    except ValueError:
        return False


class _Events:
    """One file of TensorBoard's events, numbered after those of the sessions before.

    Written in the caller's thread: torch's SummaryWriter has a thread of its own, in which a full disk is a traceback
    on the screen and the run goes on.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise SDRError("tensorboard", "is not installed", "pip install 'sdr[train]'") from error
        self.event, self.summary = Event, Summary
        make_folder(folder)
        with _writing(folder):
            names = [re.fullmatch(r"events\.out\.tfevents\.(\d+)", name) for name in os.listdir(folder)]
        before = max((int(name[1]) for name in names if name), default=0)
        self.path = folder / f"events.out.tfevents.{before + 1:05d}"
        with _writing(self.path):
            self.file = open(self.path, "xb")  # noqa: SIM115, closed by close
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        # readers forget from this step on; it is logged again, in case its validation does not count
        self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields) -> None:
        with _writing(self.path):
            self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())

    def add(self, step: int, values: Mapping[str, float]) -> None:
        pairs = [self.summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._write(step=step, summary=self.summary(value=pairs))

    def flush(self) -> None:
        with _writing(self.path):
            self.file.flush()

    def sync(self) -> None:
        with _writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            sync_folder(self.path.parent)

    def close(self) -> None:
        with _writing(self.path):
            self.file.close()
