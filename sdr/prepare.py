"""A dataset on disk to a clip cache.

A video ends as a shard of clips or as the reason why it gave none, each written whole or not at all, so that a run that
was killed goes on where it stopped. What is written depends on the videos and the settings alone: not on the order, the
number of processes or the runs that it took.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from sdr.clip_cache import REPORT, SETTINGS, SHARDS, clip_shape, read_shard, write_manifest
from sdr.config import check
from sdr.cutting import Job, PrepareConfig, cut_record
from sdr.datasets import Record
from sdr.decoding import why_no_dali
from sdr.detectors import load_detector
from sdr.errors import SDRError
from sdr.files import claim_folder, is_temporary, make_folder, remove, sole_writer, to_csv, write_atomic

FORMAT = 1  # part of a cache's settings: raise it when the same videos give other clips
REPORT_FIELDS = ("path", "label", "split", "method", "identity", "reason")


@dataclass(frozen=True)
class Summary:
    """What a finished cache holds; ``unusable`` has the videos that gave no clip, each with the reason."""

    videos: int
    clips: int
    unusable: tuple[tuple[Record, str], ...]


def prepare(
    records: Sequence[Record],
    root: str | os.PathLike,
    out: str | os.PathLike,
    config: PrepareConfig,
    *,
    layout: str,
    detector: str = "centerface",
    weights: str | None = None,
    detections: Path | None = None,
    workers: int = 2,
    max_bad: float = 0.01,
    retry: bool = False,
    synthetic: bool = False,
    progress: Callable[[int, int, int], None] = lambda done, total, bad: None,
) -> Summary:
    """Write the clips of every record to the cache ``out``, or go on where an earlier run stopped.

    Args:
        records: videos of one dataset.
        root: the dataset's folder.
        out: a new or empty folder, or a cache of the same dataset and settings.
        config: how clips are cut.
        layout: of the dataset, for the cache's settings.
        detector: name of the face detector.
        weights: of the detector; None takes its own.
        detections: folder for what the detector found; None keeps none.
        workers: processes, each with one video at a time.
        max_bad: share of the videos that may be missing or unusable; the run stops above it.
        retry: try again what an earlier run found unusable, and cut anew what has changed since.
        synthetic: whether `sdr synth` wrote the videos, for the cache's settings.
        progress: called with the numbers of videos done, of all, and of those that cannot be used.

    Raises:
        SDRError: the folder is in use, not ours or not writable, a video is not what its clips were cut from, or over
            ``max_bad`` of the videos cannot be used. All that was done stays, and the report tells of which video what
            is wrong.
    """
    check(workers >= 1, "workers", "be at least 1", workers)
    check(0 <= max_bad <= 1, "max_bad", "lie in 0..1", max_bad)
    root, out = Path(root), Path(out)
    if config.decoder == "dali" and (missing := why_no_dali(needs_gpu=False)):
        raise SDRError("DALI", missing, "--decoder pyav")
    settings = {"format": FORMAT, "layout": layout, "synthetic": synthetic, **asdict(config)}
    del settings["limits"]  # they change no clip, only which videos have some
    settings["detector"] = load_detector(detector, weights=weights).name
    job = Job(root, out, config, settings, detector, weights, detections)
    make_folder(out)
    with sole_writer(out, "sdr prepare"):
        claim(job, records)
        reasons, todo = survey(job, records, retry=retry)
        done = len(records) - len(todo)
        try:
            require_usable(records, reasons, max_bad)
            progress(done, len(records), len(reasons))
            with closing(cut_all(todo, job, workers)) as results:
                for record, reason in results:
                    if reason:
                        reasons[record] = reason
                    done += 1
                    progress(done, len(records), len(reasons))
                    require_usable(records, reasons, max_bad)
        finally:
            write_report(job, records, reasons)
        clips = write_manifest(out, (row for r in records if r not in reasons for row in rows_of(job, r)))
    unusable = tuple((record, reasons[record]) for record in records if record in reasons)
    return Summary(len(records) - len(unusable), clips, unusable)


def claim(job: Job, records: Sequence[Record]) -> None:
    """Make the cache's folder ours: new, empty, or of the same videos and settings; sweep what a kill cut off."""
    claim_folder(job.out, SETTINGS, job.settings, command="sdr prepare", report=REPORT)
    ours = {job.out / job.shard(record) for record in records}
    for path in sorted((job.out / SHARDS).rglob("*.tar")):
        if path not in ours:
            raise SDRError(path, "is of a video that is not in this dataset or selection", "choose a new folder")
    for path in filter(is_temporary, list(job.out.rglob(".*"))):
        remove(path)


def survey(job: Job, records: Sequence[Record], *, retry: bool) -> tuple[dict[Record, str], list[Record]]:
    """The videos that cannot be used, each with its reason, and those that are still to be cut.

    Raises:
        SDRError: a video is not the one that its clips were cut from, and is not to be cut anew.
    """
    reasons, todo = {}, []
    for record in records:
        verdict, done = job.verdict(record), (job.out / job.shard(record)).is_file()
        if done:
            remove(verdict)  # a kill came between the clips and its removal
        if not os.path.exists(record.path):
            if not done:
                reasons[record] = "no such file"
        elif done and rows_of(job, record)[0]["source"] == job.source(record):
            continue
        elif done and not retry:
            what = "its file, label, identity, mask or frames are not those that its clips were cut from"
            raise SDRError(record.path, what, "--retry cuts it anew")
        elif not done and not retry and (reason := known_reason(verdict, job.source(record))):
            reasons[record] = reason
        else:
            todo.append(record)
    return reasons, todo


def known_reason(verdict: Path, source: str) -> str:
    """Why an earlier run found this video unusable; "" where it did not, or the video is another now."""
    try:
        found = json.loads(verdict.read_bytes())
        return found["reason"] if found["source"] == source else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def require_usable(records: Sequence[Record], reasons: dict[Record, str], max_bad: float) -> None:
    """Raise SDRError where more than the accepted share of the videos cannot be used; it names the first."""
    if len(reasons) > max_bad * len(records):
        record, reason = next(iter(reasons.items()))
        what = f"{reason}; {len(reasons)} of {len(records)} videos cannot be used, {REPORT} tells why"
        raise SDRError(record.path, what, f"--max_bad {max_bad:g} is the share that is accepted")


def cut_all(records: Sequence[Record], job: Job, workers: int) -> Iterator[tuple[Record, str]]:
    """Each record, as soon as it is done, and why it cannot be used, "" where it can."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin_worker)
    try:
        futures = {pool.submit(cut_record, record, job): record for record in records}
        for future in as_completed(futures):
            record = futures.pop(future)
            try:
                reason = future.result()
            except BrokenProcessPool as error:
                hint = "fewer --workers"
                raise SDRError("workers", "one was killed, most likely for want of memory", hint) from error
            except SDRError:
                raise
            except Exception as error:  # whatever it is, the video at fault is named
                raise SDRError(record.path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
            yield record, reason
    finally:
        pool.shutdown(cancel_futures=True)


def begin_worker() -> None:
    """Ctrl-C is for the main process alone; where that is killed, its workers end too, whatever they are doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process().sentinel

    def end_with_parent() -> None:
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def rows_of(job: Job, record: Record) -> list[dict]:
    """The manifest's rows of a video that was cut."""
    try:
        return read_shard(job.out / job.shard(record), clip_shape(job.settings))
    except SDRError as error:
        raise SDRError(error.file, error.what, "remove it and run sdr prepare again") from error


def write_report(job: Job, records: Sequence[Record], reasons: dict[Record, str]) -> None:
    """Every video that cannot be used, in the dataset's order."""
    rows = []
    for record in records:
        if record in reasons:
            values = (record.label, record.split, record.method, record.identity, reasons[record])
            rows.append(dict(zip(REPORT_FIELDS, (job.name(record), *map(str, values)), strict=True)))
    write_atomic(job.out / REPORT, to_csv(rows, REPORT_FIELDS))
