"""A training run: from a cache to weights, resumed where it was left, seen in logs and a report."""

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sdr.checkpoint import WeightsInfo, check_file, save_weights, say
from sdr.checkpoints import Checkpoints
from sdr.clip_cache import ClipCache
from sdr.datasets import read_json
from sdr.engine import make_fabric, processes
from sdr.errors import SDRError
from sdr.evaluate import (
    ScoredVideos,
    best_threshold,
    clip_scores,
    dataset_name,
    require_classes,
    require_shape,
    video_metrics,
    video_scores,
)
from sdr.files import claim_folder, file_digest, is_temporary, make_folder, remove, sole_writer, write_atomic
from sdr.grouped import why_not_impl
from sdr.loading import Batch, TrainingLoader
from sdr.run_log import RunLog
from sdr.run_results import write_results
from sdr.train_config import TrainConfig, flatten, learning_rate, to_json
from sdr.trainer import FIGURES, Trainer, part_of, refusals

logger = logging.getLogger(__name__)

STAMP, CONFIG, RESULT = "run.json", "config.json", "result.json"
WEIGHTS, BEST, LAST = "model.safetensors", "best.safetensors", "last.safetensors"
# settings that change no number, so that a resumed run may have others
FREE = ("max_bad_steps", "log_every", "checkpoint_every", "keep_last", "loader.readers", "loader.ahead")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the views
Progress = Callable[[int, int, Mapping[str, float]], None]  # updates done, updates in all, the latest figures


class TrainResult(NamedTuple):
    """weights: model.safetensors of the run; metrics: of the validation split; finished: False where it was stopped."""

    weights: Path
    metrics: dict[str, float]
    finished: bool


def train(
    config: TrainConfig,
    data: ClipCache,
    validation: ClipCache | None,
    out: str | Path,
    *,
    origin: str = "",
    command: Mapping[str, object] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda step, steps, figures: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train in the folder ``out``, from where a run of the same settings and clips was left; nothing where it is done.

    Under torchrun every process calls this; rank 0 writes.

    Args:
        config: of the run.
        data: clips to train on.
        validation: scored now and then: its AUC chooses the weights that are kept. None keeps the last ones.
        out: folder; made when missing.
        origin: one sentence for the weights file: what they were trained on.
        command: what else a command line needs to repeat the run, by option; kept with the settings in config.json.
        device: to train on; under torchrun its type counts.
        progress: called on rank 0 after every update.
        stop: asked after every update; once it says True on any process, a checkpoint is written and the run ends.

    Returns:
        The weights, the best validation's metrics, and whether the run has come to its end.

    Raises:
        SDRError: the named kernels cannot run on the device, the clips are not of the model's size or of one class
            only, a clip cannot be read, ``out`` holds something else, too many updates in a row had no finite loss,
            memory or the disk is full.
    """
    for cache in filter(None, (data, validation)):
        require_shape(cache, config.shape)
        require_classes(cache.folder, cache.labels, use="training" if cache is data else "validation")
    out = Path(out)
    with deterministic(config.deterministic), ExitStack() as held:
        fabric = make_fabric(config, torch.device(device))
        require_kernels(config, fabric.device)
        done: dict | SDRError | None = None
        if fabric.global_rank == 0:
            try:
                done = held.enter_context(claimed(out, config, data, validation, fabric.device, command))
            except SDRError as error:  # every process must hear of it, or they wait for this one
                done = error
        done = fabric.broadcast(done)
        if isinstance(done, SDRError):
            raise done
        if done is not None:
            return TrainResult(out / WEIGHTS, done.get("metrics", {}), finished=True)
        with refusals(config, fabric.device), Run(config, data, validation, out, fabric, origin=origin) as run:
            finished = run(progress, stop)
    return TrainResult(out / WEIGHTS, run.best_metrics, finished)


def require_kernels(config: TrainConfig, device: torch.device) -> None:
    """Raise SDRError where the fast model's named implementation cannot train on the device."""
    impl = config.grouped.impl
    if config.implementation == "fast" and impl in ("cpu", "triton"):
        sideways = "" if config.model.spatial_kernel == 1 else "the kernels are for spatial_kernel 1"
        if reason := sideways or why_not_impl(config.grouped, device):
            raise SDRError("options", f"grouped.impl {impl!r} cannot run: {reason}")


@contextmanager
def claimed(
    out: Path,
    config: TrainConfig,
    data: ClipCache,
    validation: ClipCache | None,
    device: torch.device,
    command: Mapping[str, object] | None,
) -> Iterator[dict | None]:
    """Hold ``out`` as this run's folder; gives what a finished run has left there.

    Raises:
        SDRError: the folder is another's, another process trains there, or a setting was another one, which is named.
    """
    if config.init:
        check_file(config.init, "weights file")
    settings = {name: value for name, value in flatten(to_json(config)).items() if name not in FREE}
    settings |= {"data": identify(data), "validation": identify(validation) if validation else None}
    settings |= {"init_sha256": file_digest(config.init) if config.init else None}
    make_folder(out)
    settings |= {"device": device.type, "processes": processes().world_size}
    with sole_writer(out, "sdr train"):
        done = read_json(out / RESULT) if (out / RESULT).exists() else None
        if done is not None:  # whatever it was trained on
            kept = read_json(out / STAMP)
            settings |= {name: kept.get(name) for name in ("device", "processes")}
        claim_folder(out, STAMP, settings, command="sdr train", report=CONFIG)
        for path in filter(is_temporary, list(out.iterdir())):  # which a kill has left
            remove(path)
        if done is None:
            write_atomic(out / CONFIG, json.dumps({**(command or {}), **to_json(config)}, indent=2) + "\n")
        yield done


def identify(cache: ClipCache) -> str:
    """Which clips these are, for people and for comparison."""
    return f"{len(cache)} clips of {len(cache.records)} videos, digest {cache.digest[:16]}"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms for a while, where they are wanted."""
    before = torch.get_deterministic_debug_mode()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


class StoppedError(Exception):
    """Raised out of a validation when the run is to end."""


class Run:
    """One training run on its way: what was done, and what to do next."""

    def __init__(
        self, config: TrainConfig, data: ClipCache, validation: ClipCache | None, out: Path, fabric, *, origin: str
    ) -> None:
        self.config, self.validation, self.out, self.fabric = config, validation, out, fabric
        self.info = WeightsInfo(origin, bool(data.settings.get("synthetic", False)), {}, to_json(config))
        fakes = sum(record.label for record in data.records)
        self.data = f"{len(data.records) - fakes} real and {fakes} fake videos of {dataset_name(data)}, split train"
        self.main = fabric.global_rank == 0
        self.trainer = Trainer(config, fabric)
        self.loader = TrainingLoader(
            data,
            config.loader,
            config.tpa,
            batch_size=config.batch_size // config.accumulate,
            num_views=config.num_views,
            seed=config.seed,
            device=fabric.device,
            dtype=DTYPES[config.precision],
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        self.steps = max(1, len(self.loader) * config.epochs // config.accumulate)
        self.step, self.validated, self.bad, self.skipped = 0, 0, 0, 0
        self.best_metrics: dict[str, float] = {}
        self.best_scores = torch.empty(0, dtype=torch.float64)  # of the validation videos, by the best weights
        self.best: dict[str, Tensor] = {}  # these weights, on the CPU of rank 0
        self.pending: list[tuple[Tensor, list[str]]] = []  # figures of updates that were not looked at yet, and clips
        self.figures: dict[str, float] = {}
        self.checkpoints = Checkpoints(out / "checkpoints", config.keep_last)
        self._resume()
        self.log = RunLog(out, step=self.step, validated=self.validated) if self.main else None
        self.since = time.perf_counter()
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        if self.log:
            self.log.__exit__(*error)

    def __call__(self, progress: Progress, stop: Callable[[], bool]) -> bool:
        """Train to the end, or until ``stop``; returns whether that is the end."""
        with closing(iter(self.loader)) as batches:
            while True:
                if self._validation_is_due() and not self._validate(stop):
                    return False  # what was before the validation is saved
                if self.step == self.steps:
                    break
                self._update(list(islice(batches, self.config.accumulate)))
                if self.main:
                    progress(self.step, self.steps, self.figures)
                stopping = self._stopping(stop)
                if stopping or self.step % self.config.checkpoint_every == 0 or self._validation_is_due():
                    self._save()
                if stopping:
                    return False
        self._finish()
        return True

    def _epoch(self, step: float) -> float:
        """Passes over the data until after update ``step``."""
        return step * self.config.accumulate / len(self.loader)

    def _update(self, batches: Sequence[Batch]) -> None:
        # the middle of the update: neither end has a learning rate of 0
        figures = self.trainer.step(batches, epoch=self._epoch(self.step + 0.5))
        self.step += 1
        self.pending.append((figures, [name for batch in batches for name in batch.names]))
        if self.step % self.config.log_every == 0 or self.step == self.steps:
            self._look()

    def _look(self) -> None:
        """Bring the pending figures to the host, log them, and stop where too many updates in a row were skipped."""
        if not self.pending:
            return
        table = torch.stack([figures for figures, _ in self.pending]).cpu().tolist()
        first = self.step - len(table)
        rows = []
        for number, values in enumerate(table):
            epoch = self._epoch(first + number + 0.5)
            row = {"step": first + number + 1, "epoch": epoch, "lr": learning_rate(self.config, epoch)}
            rows.append(row | dict(zip(FIGURES, values, strict=True)))
        names = self._all_names() if any(row["skipped"] for row in rows) else [()] * len(rows)
        self.pending.clear()
        seconds = time.perf_counter() - self.since
        self.since += seconds
        if self.log:
            self.log.losses([row | {"skipped": int(row["skipped"])} for row in rows])
        for row, clips in zip(rows, names, strict=True):
            self._count(row, clips)
        memory = torch.cuda.max_memory_allocated(self.fabric.device) if self.fabric.device.type == "cuda" else 0
        speed = {"seconds": seconds, "clips_per_second": len(rows) * self.config.batch_size / max(seconds, 1e-9)}
        speed |= {"memory_gb": memory / 1e9}
        self.figures = rows[-1] | speed
        if self.log:
            self.log.throughput({"step": self.step, **speed, "skipped_total": self.skipped})

    def _all_names(self) -> list[list[str]]:
        """Of each pending update, the clips of all processes."""
        ranks = self.trainer.gather([names for _, names in self.pending])
        return [[name for names in parts for name in names] for parts in zip(*ranks, strict=True)]

    def _count(self, row: Mapping[str, float], clips: Sequence[str]) -> None:
        """Count a skipped update.

        Raises:
            SDRError: ``max_bad_steps`` of them in a row; names the clips.
        """
        self.bad = self.bad + 1 if row["skipped"] else 0
        if not row["skipped"]:
            return
        self.skipped += 1
        named = ", ".join(clips)
        scale = f", at a loss scale that is now {self.trainer.scaler.get_scale():g}" if self.trainer.scaler else ""
        if self.main:
            logger.warning(
                "update %d skipped, its loss or gradient is not finite%s; clips %s", row["step"], scale, named
            )
        if self.bad >= self.config.max_bad_steps:
            what = f"{self.bad} updates in a row had no finite loss or gradient, the last one was {row['step']}{scale}"
            raise SDRError("training", what, f"its clips: {named}")

    def _validation_is_due(self) -> bool:
        if self.validation is None or self.step == self.validated or self.step == 0:
            return False
        before, now = (self._epoch(step) / self.config.validate_every for step in (self.step - 1, self.step))
        return self.step == self.steps or int(now) > int(before)

    @torch.no_grad()
    def _validate(self, stop: Callable[[], bool]) -> bool:
        """Score the validation split by the weights or their moving average, and keep them where they are the best.

        Returns:
            False where ``stop`` ended it before anything was kept or logged.
        """
        self.trainer.share_buffers()
        with self.trainer.averaged():
            scores = self._clip_scores(self.validation, stop)
            if scores is None:
                return False
            scores = video_scores(scores, self.validation)
            labels = [record.label for record in self.validation.records]
            metrics = video_metrics(scores, labels) | {"threshold": best_threshold(scores, labels)}
            # of equal ones the later weights, which have learned for longer
            if metrics["video AUC"] >= self.best_metrics.get("video AUC", 0.0):
                self.best_metrics, self.best_scores = metrics, torch.from_numpy(np.asarray(scores))
                self.best = self.trainer.weights()
        if self.log:
            self.log.validation({"step": self.step, "epoch": self._epoch(self.step), **metrics})
        self._write_weights(BEST, self.best)
        self.validated = self.step
        self.since = time.perf_counter()  # its time is not training's
        return True

    def _clip_scores(self, cache: ClipCache, stop: Callable[[], bool]) -> Tensor | None:
        """Of every clip, [N] float64 on the CPU; each process scores a share, of one size since FSDP's run together.

        None where ``stop`` ended it.
        """
        rank, ranks = self.fabric.global_rank, self.fabric.world_size
        share = [i % len(cache) for i in range(rank, -(-len(cache) // ranks) * ranks, ranks)]
        batch_size = max(1, self.config.batch_size // (self.config.accumulate * ranks))

        def look(done: int, total: int) -> None:
            if self._stopping(stop):
                raise StoppedError

        try:
            scores = clip_scores(
                self._forward, cache, share, batch_size=batch_size, device=self.fabric.device, progress=look
            )
        except StoppedError:
            return None
        return torch.stack(self.trainer.gather(scores), 1).flatten()[: len(cache)]

    def _forward(self, clips: Tensor) -> Tensor:
        # not through DDP, whose forward sends buffers around: a process that runs out of memory repeats it in halves
        self.trainer.objective.eval()
        with self.fabric.autocast():
            if not (self.config.strategy == "fsdp" and self.fabric.world_size > 1):
                return self.trainer.objective(clips)
            with refusals(self.config, self.fabric.device):  # FSDP's processes cannot repeat it alone
                return self.trainer.objective(clips)

    def _write_weights(self, name: str, state: Mapping[str, Tensor]) -> None:
        if self.main:
            save_weights(self.out / name, self.trainer.objective.model, self._info(), state)

    def _info(self) -> WeightsInfo:
        return replace(self.info, metrics={f"validation {name}": value for name, value in self.best_metrics.items()})

    def _stopping(self, stop: Callable[[], bool]) -> bool:
        wanted = stop()
        if self.fabric.world_size == 1:
            return wanted
        flag = torch.tensor(int(wanted))  # by gloo: the GPUs are not waited for
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.trainer.hosts)
        return bool(flag)

    def _save(self) -> None:
        """Write a checkpoint; what was logged until here is on the disk before it."""
        self._look()
        tensors, values = self.trainer.state()
        values |= {"step": self.step, "validated": self.validated, "bad": self.bad, "skipped": self.skipped}
        values |= {"best_metrics": self.best_metrics, "loader": self.loader.state_dict(), "versions": versions()}
        if self.log:
            self.log.sync()
            tensors |= {f"best.{name}": value for name, value in self.best.items()} | {"best_scores": self.best_scores}
            self.checkpoints.save(self.step, tensors, values)
        self.fabric.barrier()
        self.since = time.perf_counter()

    def _resume(self) -> None:
        found = self.checkpoints.load() if self.main else None
        step = self.fabric.broadcast(found[1]["step"] if found else None)  # the disk may look another way elsewhere
        if step is None:
            return
        tensors, values = found or self.checkpoints.load_step(step)
        try:
            self._take_state(tensors, values)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"holds a state that does not fit this run: {say(error)}"
            raise SDRError(self.checkpoints.folder, what, "remove the folder to start anew") from error
        if self.main:
            logger.info("going on after update %d of %d", self.step, self.steps)
            if values["versions"] != versions():
                before, now = values["versions"], versions()
                others = [
                    f"{name} was {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]
                ]
                logger.warning("the run began with other software, its numbers may differ: %s", "; ".join(others))

    def _take_state(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        self.loader.load_state_dict(values["loader"])
        self.trainer.load_state(tensors, values)
        self.step, self.validated = values["step"], values["validated"]
        self.bad, self.skipped = values["bad"], values["skipped"]
        self.best_metrics, self.best_scores = values["best_metrics"], tensors["best_scores"]
        self.best = part_of(tensors, "best")

    def _finish(self) -> None:
        self._look()
        self.trainer.share_buffers()
        with self.trainer.averaged():
            last = self.trainer.weights()
        self._write_weights(LAST, last)
        if self.best:
            self._write_weights(BEST, self.best)  # after a resumption the file may be of updates that were done anew
        self._write_weights(WEIGHTS, self.best or last)
        if self.main:
            self.log.sync()
            self._write_results()
            write_atomic(self.out / RESULT, json.dumps({"steps": self.steps, "metrics": self.best_metrics}, indent=1))
        self.fabric.barrier()

    def _write_results(self) -> None:
        scored = None
        if self.validation is not None:
            records = self.validation.records
            labels = np.array([record.label for record in records])
            methods = tuple(record.method if record.label else "real" for record in records)
            names = tuple(str(record.path) for record in records)
            dataset = dataset_name(self.validation)
            scored = ScoredVideos(dataset, names, self.best_scores.numpy(), labels, methods)
        write_results(
            self.out,
            info=self._info(),
            config=self.trainer.objective.model.config,
            data=self.data,
            scored=scored,
            threshold=self.best_metrics.get("threshold"),
        )


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its settings."""
    import sdr

    return {"sdr": sdr.__version__, "torch": torch.__version__, "python": platform.python_version()}
