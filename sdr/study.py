"""Two studies on synthetic videos: forgery types that training never saw, and a shortcut in space that turns round.

data/                          the videos; both studies share them
clips/                         their clips
<study>/clips_<arrangement>/   of the shortcut: the clips with the cue
<study>/runs/<run>/            a folder of `sdr train`
<study>/results/<run>.json     its figures
<study>/study.json, study.md, runs.csv     what sdr.study_table makes of them
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sdr.checkpoint import load_model
from sdr.clip_cache import MANIFEST, ClipCache
from sdr.config import check_choice, check_count
from sdr.cutting import PrepareConfig
from sdr.datasets import read_json
from sdr.errors import SDRError
from sdr.evaluate import best_threshold, score_videos, video_metrics
from sdr.files import claim_folder, make_folder, sole_writer, write_atomic
from sdr.layouts import read_layout
from sdr.prepare import begin_worker, prepare
from sdr.shortcut import ARRANGEMENTS, marginal_gap, write_marked
from sdr.study_config import FORMAT, MODELS, SEEN, UNSEEN, Run, StudyConfig, plan, study_settings, variants
from sdr.synth import synthesize
from sdr.train import train as train_model
from sdr.train_config import flatten

STAMP = "settings.json"
VIDEO_LIST = "videos.csv"  # of sdr synth
CRF = 23  # of the synthetic videos
LARGEST_GAP = 0.02  # in total variation of single pixels, between clips with the cue and without
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, and of how much
Rows = list[dict]
Outcomes = Iterator[tuple[Run, Rows | None]]


class Job(NamedTuple):
    """What all runs of a study share; ``out`` is the study's folder and ``clips`` the cache without a cue."""

    study: str
    config: StudyConfig
    out: Path
    clips: Path
    device: torch.device
    train: Callable

    def marked(self, arrangement: str) -> Path:
        """The cache whose test clips carry the cue in this arrangement."""
        return self.out / f"clips_{arrangement}"

    def result(self, run: Run) -> Path:
        return self.out / "results" / f"{run.name}.json"


def run_study(
    study: str,
    config: StudyConfig,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    workers: int = 1,
    train: Callable = train_model,
    progress: Progress = lambda what, done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Rows | None:
    """Make the data, train and test every model that is not yet; the same call goes on after an interruption.

    Args:
        study: heldout or shortcut.
        config: its scale.
        out: folder: new, or of an earlier call for either study with the same videos.
        device: to train on.
        workers: runs side by side, each in a process of its own; on a CPU each has one thread.
        train: :func:`sdr.train.train`; where there are several workers it must be the top level of a module.
        progress: called as the work goes on.
        stop: asked now and then; once it says True, running trainings write a checkpoint and the call ends.

    Returns:
        One row for each run and test; None where ``stop`` ended the call.

    Raises:
        SDRError: ``out`` is another's or of other settings, or what making the data, training and testing raise.
    """
    check_choice("study", study, tuple(MODELS))
    check_count("workers", workers)
    out = Path(out)
    make_folder(out)

    def report(what: str, done: int, total: int) -> None:
        progress(what, done, total)
        if stop():
            raise StoppedError

    with sole_writer(out, "sdr study"):
        try:
            clips = make_clips(config, out, workers=workers, progress=report)
            job = Job(study, config, out / study, clips, torch.device(device), train)
            claim_folder(job.out, STAMP, flatten(study_settings(study, config)), command="sdr study")
            if study == "shortcut":
                mark_clips(job, report)
        except StoppedError:
            return None
        except SDRError:
            if stop():  # a signal to all processes ends the workers before this one has asked
                return None
            raise
        for folder in ("runs", "results"):
            make_folder(job.out / folder)
        return execute_all(plan(study, config), job, workers=workers, progress=progress, stop=stop)


class StoppedError(Exception):
    """Raised out of the making of data when the study is to end."""


def make_clips(config: StudyConfig, out: Path, *, workers: int, progress: Progress) -> Path:
    """The synthetic videos and their clips, made once for all studies of the folder; returns the cache."""
    data, clips, model = out / "data", out / "clips", config.train.model
    shape = {"num_frames": model.num_frames, "size": model.image_size, "stride": config.stride}
    videos = {"identities": config.identities, "frames": config.video_frames, "size": config.video_size}
    videos |= {"crf": [CRF], "seed": config.data_seed}
    claim_folder(out, STAMP, {"format": FORMAT, "videos": videos, "clips": shape}, command="sdr study")
    if not (clips / MANIFEST).is_file():
        if not (data / VIDEO_LIST).is_file():  # written last
            synthesize(data, **videos, workers=workers, progress=lambda done, of: progress("making videos", done, of))
        prepare(
            read_layout("ffpp", data, compression=f"c{CRF}"),
            data,
            clips,
            PrepareConfig(**shape),
            layout="ffpp",
            workers=workers,
            synthetic=True,
            progress=lambda done, of, bad: progress("cutting clips", done, of),
        )
    return clips


def mark_clips(job: Job, progress: Progress) -> None:
    """Write the caches with the cue, aligned in training; raises SDRError where single pixels would tell of it."""
    cue = job.config.cue
    gap = marginal_gap(ClipCache(job.clips), cue)
    if gap > LARGEST_GAP:
        what = f"shows the cue in single pixels: total variation {gap:.3f}, at most {LARGEST_GAP} is accepted"
        raise SDRError(job.clips, what)
    for number, arrangement in enumerate(ARRANGEMENTS):
        progress("marking clips", number, len(ARRANGEMENTS))
        learned = {"train": "aligned", "val": "aligned"} if arrangement == "aligned" else {}
        write_marked(job.clips, job.marked(arrangement), cue, learned | {"test": arrangement})


def execute_all(
    runs: Sequence[Run], job: Job, *, workers: int, progress: Progress, stop: Callable[[], bool]
) -> Rows | None:
    """The rows of every run; None where ``stop`` ended them."""
    results = {run: read_json(job.result(run)) for run in runs if job.result(run).is_file()}
    todo = [run for run in runs if run not in results]
    progress("models", len(results), len(runs))
    outcomes = execute_here(todo, job, progress, stop) if workers == 1 else execute_apart(todo, job, workers, stop)
    with closing(outcomes):
        for run, rows in outcomes:
            if rows is None:
                return None
            results[run] = rows
            progress("models", len(results), len(runs))
    return [row for run in runs for row in results[run]]


def execute_here(runs: Sequence[Run], job: Job, progress: Progress, stop: Callable[[], bool]) -> Outcomes:
    """The runs one after the other in this process."""
    for run in runs:
        yield run, None if stop() else execute(run, job, stop, progress)


def execute_apart(runs: Sequence[Run], job: Job, workers: int, stop: Callable[[], bool]) -> Outcomes:
    """The runs side by side in processes of their own, in the order in which they end."""
    context = get_context("spawn")
    stopped = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_study_worker, initargs=(stopped,))
    try:
        futures = {pool.submit(execute_in_worker, run, job): run for run in runs}
        while futures:
            for future in wait(futures, timeout=0.2, return_when=FIRST_COMPLETED).done:
                try:
                    yield futures.pop(future), future.result()
                except BrokenProcessPool as error:
                    hint = "fewer --workers; the same command goes on"
                    raise SDRError("workers", "one was killed, most likely for want of memory", hint) from error
            if stop():
                stopped.set()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


STOPPED: list[Event] = []  # of a worker process: what asks its training to end


def begin_study_worker(stopped: Event) -> None:
    begin_worker()
    STOPPED.append(stopped)


def execute_in_worker(run: Run, job: Job) -> Rows | None:
    return None if STOPPED[-1].is_set() else execute(run, job, STOPPED[-1].is_set)


def execute(
    run: Run, job: Job, stop: Callable[[], bool], progress: Progress = lambda what, done, total: None
) -> Rows | None:
    """Train and test one model, and keep its rows; None where ``stop`` ended the training."""
    began = time.perf_counter()
    config = replace(variants(job.config.train)[run.model], seed=run.seed)
    cache = job.clips if run.held_out else job.marked("aligned")
    data, validation = (ClipCache(cache, split=split, methods=run.learned) for split in ("train", "val"))
    fakes = ", ".join(run.learned)
    with one_thread(job.device):
        trained = job.train(
            config,
            data,
            validation,
            job.out / "runs" / run.name,
            origin=f"{run.model}, trained on {len(data.records)} synthetic matched-marginals videos, fakes by {fakes}",
            device=job.device,
            progress=lambda step, steps, figures: progress(run.name, step, steps),
            stop=stop,
        )
        if not trained.finished:
            return None
        model = load_model(trained.weights)[0].to(job.device)
        figures = measure(model, run, job, validation)
    machine = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else platform.machine()
    about = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "device": machine}
    about |= {"seconds": round(time.perf_counter() - began, 1)}
    rows = [{**run._asdict(), **row, **about} for row in figures]
    write_atomic(job.result(run), json.dumps(rows, indent=1) + "\n")
    return rows


def measure(model: nn.Module, run: Run, job: Job, validation: ClipCache) -> Rows:
    """Figures of a trained model, a row for each test."""
    options = {"batch_size": job.config.train.batch_size, "device": job.device}
    chosen = score_videos(model, validation, **options)
    threshold = best_threshold(chosen.scores, chosen.labels)
    rows = []
    for test, cache in tests(run, job).items():
        scored = score_videos(model, cache, **options)
        plain, moved = (video_metrics(scored.scores, scored.labels, threshold=t) for t in (0.5, threshold))
        fake = int(scored.labels.sum())
        row = {"test": test, "real": len(scored.labels) - fake, "fake": fake, "AUC": plain["video AUC"]}
        row |= {"ACC": plain["video accuracy"], "ACC at validation threshold": moved["video accuracy"]}
        rows.append(row)
    return rows


def tests(run: Run, job: Job) -> dict[str, ClipCache]:
    """What a run is tested on: people whom it has never seen."""
    if run.held_out:
        types = {UNSEEN: (run.held_out,), SEEN: run.learned}
        return {name: ClipCache(job.clips, split="test", methods=methods) for name, methods in types.items()}
    return {arrangement: ClipCache(job.marked(arrangement), split="test") for arrangement in ARRANGEMENTS}


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One thread on a CPU, so that the figures do not depend on how many runs stand side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
