"""The logs of a run that is killed and goes on are those of one that was not."""

import csv
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdr import SDRError
from sdr.run_log import LOSSES, RunLog, read_log

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def loss_row(step: int, scale: float = 1.0) -> dict[str, float]:
    """Figures with long decimals; step 3 is one that was skipped."""
    bad = math.nan if step == 3 else 1.0
    figures = {name: scale * bad / (3 * step + i) for i, name in enumerate(LOSSES[1:9])}
    return {"step": step, **figures, "epoch": step / 7, "skipped": int(step == 3)}


def speed_row(step: int) -> dict[str, float]:
    return {"step": step, "seconds": 0.5, "clips_per_second": 8 / step, "memory_gb": 1.5, "skipped_total": step // 3}


def metric_row(step: int) -> dict[str, float]:
    return {"step": step, "epoch": step / 7, "video AUC": 1 - 1 / step, "threshold": 0.5}


def write(log: RunLog, first: int, last: int, scale: float = 1.0) -> None:
    """Losses of every step, two at a time; speed of every second one, metrics of every fourth."""
    for step in range(first, last + 1):
        if step % 2 == 0 or step == last:
            log.losses([loss_row(s, scale) for s in range(max(first, step - (step % 2 == 0)), step + 1)])
            log.throughput(speed_row(step))
        if step % 4 == 0:
            log.validation(metric_row(step))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.csv")}


def events(out: Path):
    accumulator = event_accumulator.EventAccumulator(str(out / "tensorboard"), {event_accumulator.SCALARS: 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture
def whole(tmp_path) -> Path:
    with RunLog(tmp_path / "whole") as log:
        write(log, 1, 12)
    return tmp_path / "whole"


def test_reads_back_every_number(whole):
    rows = read_log(whole / "losses.csv")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert list(row) == list(LOSSES)
        assert row == pytest.approx(loss_row(int(row["step"])), rel=0, abs=0, nan_ok=True)
    assert read_log(whole / "validation.csv") == [metric_row(4), metric_row(8), metric_row(12)]
    assert read_log(whole / "throughput.csv")[0] == speed_row(2)
    with open(whole / "losses.csv", newline="") as file:  # a plain CSV, for anybody's reader
        assert [row["skipped"] for row in csv.DictReader(file)] == list("001000000000")


def test_numbers_of_other_types_are_plain(tmp_path):
    row = {name: np.float64(0.1) for name in LOSSES} | {"step": np.int64(1), "skipped": False, "ce": float("inf")}
    with RunLog(tmp_path) as log:
        log.losses([row])
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[1] == "1,0.1,0.1,0.1,inf,0.1,0.1,0.1,0.1,0"


@pytest.mark.parametrize("step", range(13))
def test_resumed_at_any_step_is_the_same_bytes(whole, tmp_path, step):
    """The run was killed at step 12, after figures that do not count."""
    out = tmp_path / "cut"
    with RunLog(out) as log:
        write(log, 1, step)
        write(log, step + 1, 12, scale=2.0)
    with RunLog(out, step=step) as log:
        write(log, step + 1, 12)
    got, expected = contents(out), contents(whole)
    assert got["losses.csv"] == expected["losses.csv"]
    assert got["validation.csv"] == expected["validation.csv"]


@pytest.mark.parametrize("left", [1, 2, 5, 17, 21])
@pytest.mark.parametrize("name", ["losses.csv", "throughput.csv", "validation.csv"])
def test_a_line_cut_by_kill_9_is_removed(whole, name, left):
    """Of the last line ``left`` bytes are there, the first digits of a step among them."""
    before = (whole / name).read_bytes()
    lines = before.splitlines(keepends=True)
    (whole / name).write_bytes(b"".join(lines[:-1]) + lines[-1][:left])
    rows = read_log(whole / name)
    assert len(rows) == len(lines) - 2  # no half number is ever read
    step = 11 if name == "losses.csv" else int(rows[-1]["step"])
    with RunLog(whole, step=step) as log:
        if name == "losses.csv":
            log.losses([loss_row(12)])
        elif name == "throughput.csv":
            log.throughput(speed_row(12))
        else:
            log.validation(metric_row(12))
    assert (whole / name).read_bytes() == before


def test_killed_for_real(tmp_path):
    """kill -9 of a process that logs; what was synced before is all there."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_run_log import *
log = RunLog({str(tmp_path)!r})
write(log, 1, 8)
log.sync()
write(log, 9, 11)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-9, "")
    with RunLog(tmp_path, step=8) as log:
        write(log, 9, 12)
    assert [row["step"] for row in read_log(tmp_path / "losses.csv")] == list(range(1, 13))
    assert [row["step"] for row in read_log(tmp_path / "throughput.csv")] == [2, 4, 6, 8, 10, 12]


def test_sync_reaches_the_disk_with_every_file(whole, monkeypatch):
    synced = set()
    with RunLog(whole, step=12) as log:
        log.losses([loss_row(13)])
        monkeypatch.setattr(os, "fsync", lambda fd: synced.add(Path(os.readlink(f"/proc/self/fd/{fd}"))))
        log.sync()
    newest = max((whole / "tensorboard").iterdir())
    assert synced == {*whole.glob("*.csv"), newest, newest.parent}


def test_nothing_before_the_first_validation_leaves_no_file(tmp_path):
    with RunLog(tmp_path) as log:
        write(log, 1, 4)
    with RunLog(tmp_path, step=3) as log:
        assert not (tmp_path / "validation.csv").exists()
        log.validation({"step": 4, "epoch": 1.0, "loss": 0.5})  # other metrics: the first row fixes them
    assert read_log(tmp_path / "validation.csv") == [{"step": 4, "epoch": 1.0, "loss": 0.5}]
    assert read_log(tmp_path / "none.csv") == []


def test_started_anew_is_empty(whole):
    with RunLog(whole):
        pass
    assert {name: text.count(b"\n") for name, text in contents(whole).items()} == {"losses.csv": 1, "throughput.csv": 1}
    read = events(whole)
    assert [read.Scalars(tag) for tag in read.Tags()["scalars"]] == [[]] * 13


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_has_the_figures_under_their_names(whole):
    read = events(whole)
    assert set(read.Tags()["scalars"]) == {
        *(f"loss/{name}" for name in ("total", "ce", "mi", "contrastive", "aux")),
        *("lr", "grad_norm", "skipped"),
        *("throughput/clips_per_second", "throughput/memory_gb", "throughput/skipped_total"),
        *("validation/video_AUC", "validation/threshold"),
    }
    total = read.Scalars("loss/total")
    assert [event.step for event in total] == list(range(1, 13))
    assert [event.value for event in total] == pytest.approx([loss_row(s)["total"] for s in range(1, 13)], nan_ok=True)
    assert [(e.step, e.value) for e in read.Scalars("validation/video_AUC")] == [
        (step, pytest.approx(1 - 1 / step)) for step in (4, 8, 12)
    ]


def test_tensorboard_repeats_no_step_and_shows_the_later_figures(whole):
    """Resumed twice, each time further back than it had come, the last time after a record that was cut."""
    with RunLog(whole, step=8) as log:
        write(log, 9, 10, scale=2.0)
    newest = max((whole / "tensorboard").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    with RunLog(whole, step=6) as log:
        write(log, 7, 11, scale=3.0)
    read = events(whole)
    for tag in ("loss/total", "lr"):
        assert [event.step for event in read.Scalars(tag)] == list(range(1, 12))
    values = [event.value for event in read.Scalars("loss/ce")]
    expected = [loss_row(s, 1.0 if s <= 6 else 3.0)["ce"] for s in range(1, 12)]
    assert values == pytest.approx(expected, nan_ok=True)
    assert [event.step for event in read.Scalars("validation/video_AUC")] == [4, 8]
    assert len(list((whole / "tensorboard").iterdir())) == 3


def test_a_validation_that_does_not_count_is_done_again(whole):
    """Killed after the validation of step 8 was logged and before the checkpoint that knows of it."""
    before = contents(whole)
    with RunLog(whole, step=8, validated=4) as log:
        assert read_log(whole / "validation.csv") == [metric_row(4)]
        log.validation(metric_row(8))
        write(log, 9, 12)
    assert contents(whole) == before
    read = events(whole)
    assert [event.step for event in read.Scalars("validation/video_AUC")] == [4, 8, 12]
    assert [event.step for event in read.Scalars("loss/ce")] == list(range(1, 13))
    assert [event.step for event in read.Scalars("throughput/memory_gb")] == [2, 4, 6, 8, 10, 12]


def test_tensorboard_takes_numbers_beyond_float32(tmp_path):
    with RunLog(tmp_path) as log:
        log.losses([loss_row(1) | {"total": 1e300, "ce": -math.inf}])
    read = events(tmp_path)
    assert (read.Scalars("loss/total")[0].value, read.Scalars("loss/ce")[0].value) == (math.inf, -math.inf)


# ---------------------------------------------------------------- refusals


def test_refuses_a_gap(whole):
    with pytest.raises(SDRError, match=r"losses\.csv: ends at step 12, the checkpoint is of step 13"):
        RunLog(whole, step=13)
    lines = (whole / "losses.csv").read_text().splitlines(keepends=True)
    for changed, match in (
        (lines[:5] + lines[6:], "has step 6 after step 4"),
        (lines[:1] + lines[2:], "has step 2 after step 0"),
        (lines[:6] + lines[5:], "has step 5 after step 5"),
        (lines[:1], "ends at step 0, the checkpoint is of step 8"),
        ([], "ends at step 0, the checkpoint is of step 8"),
    ):
        (whole / "losses.csv").write_text("".join(changed))
        with pytest.raises(SDRError, match=rf"losses\.csv: {match}"):
            RunLog(whole, step=8)
        assert (whole / "losses.csv").read_text() == "".join(changed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text.replace("grad_norm", "norm"), "not a log of this version"),
        (lambda text: text.replace("\n4,", "\n4,,"), "damaged in line 5"),
        (lambda text: text.replace("\n4,", "\nfour,"), "damaged in line 5"),
        (lambda text: text.replace("0\n5,", "no\n5,"), "damaged in line 5"),
        (lambda text: text.replace("\n4,", "\n\0\0,"), "damaged in line 5"),
    ],
)
def test_refuses_what_it_did_not_write(whole, change, match):
    path = whole / "losses.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(SDRError, match=rf"losses\.csv: is {match}"):
        RunLog(whole, step=8)


@pytest.mark.parametrize("text", ["step,a\n1,x\n", "step,a\n1\n", "step,a\n1,2,3\n", "step,a\n\xff\0,1\n"])
def test_read_log_refuses_what_is_no_log(tmp_path, text):
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(SDRError, match=r"x\.csv: is not a log"):
        read_log(tmp_path / "x.csv")
    with pytest.raises(SDRError, match="cannot be read: Is a directory"):
        read_log(tmp_path)


def test_refuses_rows_that_make_no_log(tmp_path):
    with RunLog(tmp_path) as log:
        write(log, 1, 4)
        with pytest.raises(ValueError, match=r"step must follow 4 in losses\.csv, got 6"):
            log.losses([loss_row(6)])
        with pytest.raises(ValueError, match=r"step must follow 4 in throughput\.csv, got 4"):
            log.throughput(speed_row(4))
        with pytest.raises(ValueError, match=r"row of losses\.csv must have step, epoch, .*, got step$"):
            log.losses([{"step": 5}])
        with pytest.raises(ValueError, match=r"row of validation\.csv must have step, epoch, video AUC, threshold"):
            log.validation({"step": 8, "epoch": 1.0, "video AUC": 0.5})
    assert len(read_log(tmp_path / "losses.csv")) == 4


@pytest.mark.parametrize("name", ["losses.csv", "events"])
def test_a_full_disk_is_one_line(tmp_path, name):
    """A limit of this process on the size of a file stands for the disk; either file may be the first to meet it."""
    log = RunLog(tmp_path)
    path = tmp_path / name if name == "losses.csv" else next((tmp_path / "tensorboard").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    other_log = log._losses if name == "events" else log._events
    other_log.file.close()
    other_log.file = open(os.devnull, "ab")  # noqa: SIM115, only the file that is tested grows
    if name != "events":
        log._events.records._writer = log._events.file
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SDRError, match=rf"{path.name}: cannot be written: File too large"), log:
            write(log, 1, 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SDRError, match="cannot be made"):
        RunLog(tmp_path / "file" / "run")
    (tmp_path / "run" / "losses.csv").mkdir(parents=True)
    with pytest.raises(SDRError, match=r"losses\.csv: cannot be read: Is a directory"):
        RunLog(tmp_path / "run")


def test_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(SDRError, match=r"tensorboard: is not installed \(pip install 'sdr\[train\]'\)"):
        RunLog(tmp_path)
