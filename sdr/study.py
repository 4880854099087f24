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
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sdr.checkpoint import load_model
from sdr.clip_cache import MANIFEST, ClipCache
from sdr.config import TPA_METHODS, TPAConfig, check, check_choice, check_count, paper, tiny
from sdr.cutting import PrepareConfig
from sdr.datasets import SYNTH_METHODS, read_json
from sdr.errors import SDRError
from sdr.evaluate import best_threshold, score_videos, video_metrics
from sdr.files import claim_folder, make_folder, sole_writer, write_atomic
from sdr.layouts import read_layout
from sdr.loading import LoaderConfig
from sdr.prepare import begin_worker, prepare
from sdr.shortcut import ARRANGEMENTS, Cue, marginal_gap, write_marked
from sdr.synth import synthesize
from sdr.train import train as train_model
from sdr.train_config import TrainConfig, to_json

FORMAT = 1  # part of a study's settings: raise it when the same study gives other figures
STAMP = "settings.json"
CRF = 23  # of the synthetic videos
LARGEST_GAP = 0.02  # of single pixels, between clips with the cue and without
MODELS = {  # of each study
    "heldout": ("FTCN", "SDR", "SDR without TPA", "SDR without TRFI", "SDR without contrastive"),
    "shortcut": ("FTCN", "SDR", "SDR without TPA", "SDR without TRFI", "plain 3D ResNet"),
}
UNSEEN, SEEN = "unseen type", "seen types"  # what a model of the first study is tested on
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, and of how much


@dataclass(frozen=True)
class StudyConfig:
    """How large a study is.

    Args:
        train: of SDR; the other models are made from it.
        seeds: runs of each model, which differ in initialisation, order, augmentation and dropout, not in their data.
        identities: people in the synthetic videos.
        video_frames: of each video.
        video_size: width and height of each video in pixels.
        stride: frames from the start of one clip to the next.
        data_seed: of the synthetic videos.
        cue: of the shortcut.
    """

    train: TrainConfig
    seeds: int = 5
    identities: int = 64
    video_frames: int = 40
    video_size: int = 160
    stride: int = 12
    data_seed: int = 0
    cue: Cue = field(default_factory=Cue)

    def __post_init__(self) -> None:
        for name in ("identities", "video_frames", "video_size", "stride"):
            check_count(name, getattr(self, name))
        enough = type(self.seeds) is int and self.seeds >= 2
        check(enough, "seeds", "be at least 2, or there is no interval", self.seeds)
        check(self.train.architecture == "sdr", "train.architecture", "be sdr", self.train.architecture)


def smallest() -> StudyConfig:
    """The smallest scale at which FTCN and SDR learn the types that they see: minutes on two cores."""
    model = replace(tiny(), num_frames=16, image_size=32, embed_dim=32, head_dim=8, mlp_dim=64)
    often = {
        "validate_every": 8,
        "checkpoint_every": 40,
    }  # validated once, so that the last weights are the tested ones
    return StudyConfig(TrainConfig(model=model, epochs=8, lr=3e-3, loader=LoaderConfig(readers=1), **often))


def large() -> StudyConfig:
    """The paper's model on clips of its size, for a GPU."""
    memory = {"precision": "bf16", "recompute": True, "accumulate": 4}
    config = TrainConfig(model=paper(), epochs=20, validate_every=20, checkpoint_every=100, **memory)
    return StudyConfig(config, video_frames=96, video_size=320, stride=32)


SCALES: Mapping[str, Callable[[], StudyConfig]] = {"smallest": smallest, "large": large}


class Run(NamedTuple):
    """One model to train; ``held_out`` is the forgery type that it never sees, "" where it sees all."""

    model: str
    seed: int
    held_out: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(re.sub(r"\W", "_", part) for part in (self.held_out or "all", self.model, str(self.seed)))


class Job(NamedTuple):
    """What all runs of a study share; ``out`` is the study's folder and ``clips`` the cache without a cue."""

    study: str
    config: StudyConfig
    out: Path
    clips: Path
    device: torch.device
    train: Callable


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """Every model of the studies, made from SDR's configuration."""
    ftcn = replace(config, architecture="ftcn", implementation="reference", tpa=TPAConfig(methods=("none",)))
    mean, loss = replace(config.model, joint_feature="mean"), config.loss
    return {
        "FTCN": ftcn,
        "SDR": config,
        "SDR without TPA": replace(config, tpa=replace(config.tpa, per_frame=frozenset(TPA_METHODS))),
        "SDR without TRFI": replace(config, model=mean, loss=replace(loss, mi=0.0, aux=0.0)),
        "SDR without contrastive": replace(config, loss=replace(loss, contrastive=0.0)),
        "plain 3D ResNet": replace(ftcn, model=replace(config.model, spatial_kernel=3)),
    }


def plan(study: str, config: StudyConfig) -> list[Run]:
    """The runs of a study, seed by seed."""
    held_out = SYNTH_METHODS if study == "heldout" else ("",)
    seeds = range(config.train.seed, config.train.seed + config.seeds)
    return [Run(model, seed, method) for seed in seeds for method in held_out for model in MODELS[study]]


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
) -> list[dict] | None:
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
    with sole_writer(out, "sdr study"):
        clips = make_clips(config, out, workers=workers, progress=progress)
        job = Job(study, config, out / study, clips, torch.device(device), train)
        claim_folder(job.out, STAMP, study_settings(study, config), command="sdr study")
        if study == "shortcut":
            mark_clips(job, progress)
        runs = plan(study, config)
        for folder in ("runs", "results"):
            make_folder(job.out / folder)
        rows = execute_all(runs, job, workers=workers, progress=progress, stop=stop)
    return rows if rows is None else [row for run in runs for row in rows[run]]


def study_settings(study: str, config: StudyConfig) -> dict:
    """All that a study's figures depend on, as values of JSON."""
    return {"format": FORMAT, "study": study, **asdict(config), "train": to_json(config.train)}


def make_clips(config: StudyConfig, out: Path, *, workers: int, progress: Progress) -> Path:
    """The synthetic videos and their clips, made once for all studies of the folder; returns the cache."""
    data, clips, shape = out / "data", out / "clips", config.train.model
    cut = PrepareConfig(num_frames=shape.num_frames, size=shape.image_size, stride=config.stride)
    videos = {"identities": config.identities, "frames": config.video_frames, "size": config.video_size}
    videos |= {"crf": [CRF], "seed": config.data_seed}
    cut_as = {"num_frames": cut.num_frames, "size": cut.size, "stride": cut.stride}
    claim_folder(out, STAMP, {"format": FORMAT, "videos": videos, "clips": cut_as}, command="sdr study")
    if not (clips / MANIFEST).is_file():
        synthesize(data, **videos, workers=workers, progress=lambda done, all_: progress("making videos", done, all_))
        prepare(
            read_layout("ffpp", data, compression=f"c{CRF}"),
            data,
            clips,
            cut,
            layout="ffpp",
            workers=workers,
            synthetic=True,
            progress=lambda done, total, bad: progress("cutting clips", done, total),
        )
    return clips


def marked(job: Job, arrangement: str) -> Path:
    """The cache whose test clips carry the cue in this arrangement; it is aligned in training and validation."""
    return job.out / f"clips_{arrangement}"


def mark_clips(job: Job, progress: Progress) -> None:
    """Write the caches with the cue; raises SDRError where single pixels would tell of it."""
    cue = job.config.cue
    gap = marginal_gap(ClipCache(job.clips), cue)
    if gap > LARGEST_GAP:
        raise SDRError(
            job.clips, f"shows the cue in single pixels: their values differ by {gap:.3f} in total variation"
        )
    for number, arrangement in enumerate(ARRANGEMENTS):
        progress("marking clips", number, len(ARRANGEMENTS))
        learned = {"train": "aligned", "val": "aligned"} if arrangement == "aligned" else {}
        write_marked(job.clips, marked(job, arrangement), cue, learned | {"test": arrangement})


def execute_all(
    runs: Sequence[Run], job: Job, *, workers: int, progress: Progress, stop: Callable[[], bool]
) -> dict[Run, list[dict]] | None:
    """The rows of every run; None where ``stop`` ended them."""
    results, todo = {}, []
    for run in runs:
        path = result_path(run, job)
        if path.is_file():
            results[run] = read_json(path)
        else:
            todo.append(run)
    progress("models", len(results), len(runs))
    for run, rows in (execute_here if workers == 1 else execute_apart)(todo, job, workers, stop):
        if rows is None:
            return None
        results[run] = rows
        progress("models", len(results), len(runs))
    return results


def execute_here(
    runs: Sequence[Run], job: Job, workers: int, stop: Callable[[], bool]
) -> Iterator[tuple[Run, list[dict] | None]]:
    """The runs one after the other in this process."""
    for run in runs:
        yield run, None if stop() else execute(run, job, stop)


def execute_apart(
    runs: Sequence[Run], job: Job, workers: int, stop: Callable[[], bool]
) -> Iterator[tuple[Run, list[dict] | None]]:
    """The runs side by side in processes of their own, in the order in which they end."""
    context = get_context("spawn")
    stopped = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_study_worker, initargs=(stopped,))
    try:
        futures = {pool.submit(execute_in_worker, run, job): run for run in runs}
        while futures:
            done, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
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


def execute_in_worker(run: Run, job: Job) -> list[dict] | None:
    return None if STOPPED[-1].is_set() else execute(run, job, STOPPED[-1].is_set)


def result_path(run: Run, job: Job) -> Path:
    return job.out / "results" / f"{run.name}.json"


def execute(run: Run, job: Job, stop: Callable[[], bool]) -> list[dict] | None:
    """Train and test one model, and keep its rows; None where ``stop`` ended the training."""
    began = time.perf_counter()
    config = replace(variants(job.config.train)[run.model], seed=run.seed)
    cache, methods = (job.clips, others(run.held_out)) if run.held_out else (marked(job, "aligned"), None)
    data, validation = (ClipCache(cache, split=split, methods=methods) for split in ("train", "val"))
    origin = f"{run.model}, trained on {len(data.records)} synthetic matched-marginals videos"
    with one_thread(job.device):
        trained = job.train(
            config,
            data,
            validation,
            job.out / "runs" / run.name,
            origin=origin,
            device=job.device,
            progress=lambda step, steps, figures: None,
            stop=stop,
        )
        if not trained.finished:
            return None
        model = load_model(trained.weights)[0].to(job.device)
        rows = test_model(model, run, job, validation)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    machine = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else platform.machine()
    about = {"parameters": parameters, "seconds": round(time.perf_counter() - began, 1), "device": machine}
    rows = [{**run._asdict(), **row, **about} for row in rows]
    write_atomic(result_path(run, job), json.dumps(rows, indent=1) + "\n")
    return rows


def test_model(model: torch.nn.Module, run: Run, job: Job, validation: ClipCache) -> list[dict]:
    """Figures of a trained model, a row for each test."""
    options = {"batch_size": job.config.train.batch_size, "device": job.device}
    chosen = score_videos(model, validation, **options)
    threshold = best_threshold(chosen.scores, chosen.labels)
    rows = []
    for test, cache in test_clips(run, job).items():
        scored = score_videos(model, cache, **options)
        plain = video_metrics(scored.scores, scored.labels)
        at_threshold = video_metrics(scored.scores, scored.labels, threshold=threshold)["video accuracy"]
        figures = {
            "AUC": plain["video AUC"],
            "ACC": plain["video accuracy"],
            "ACC at validation threshold": at_threshold,
        }
        real = int(np.sum(scored.labels == 0))
        rows.append({"test": test, "real": real, "fake": len(scored.labels) - real, **figures})
    return rows


def test_clips(run: Run, job: Job) -> dict[str, ClipCache]:
    """What a run is tested on: people whom it has never seen."""
    if run.held_out:
        types = {UNSEEN: (run.held_out,), SEEN: others(run.held_out)}
        return {name: ClipCache(job.clips, split="test", methods=methods) for name, methods in types.items()}
    return {arrangement: ClipCache(marked(job, arrangement), split="test") for arrangement in ARRANGEMENTS}


def others(held_out: str) -> tuple[str, ...]:
    return tuple(method for method in SYNTH_METHODS if method != held_out)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One thread on a CPU, so that the figures do not depend on how many runs stand side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
