"""A clip cache to batches of augmented views: half real, half fake, in an order that is a function of the seed."""

import json
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdr.clip_cache import ClipCache
from sdr.config import TPAConfig, check, check_choice, check_count
from sdr.dali import dali_views
from sdr.errors import SDRError
from sdr.tpa import ViewMaps, augment, draw_maps, send

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderConfig:
    """How clips are drawn, read and augmented.

    Args:
        clips_per_video: of each video in an epoch, drawn anew for every epoch.
        readers: threads that read clips, and of DALI.
        ahead: batches that are read before they are asked for.
        augmentation: ``reference`` is plain PyTorch, ``triton`` one kernel, ``dali`` a DALI pipeline; ``auto`` takes
            DALI on a GPU where it is installed, else Triton there, and the reference on a CPU.
    """

    clips_per_video: int = 1
    readers: int = 2
    ahead: int = 2
    augmentation: Literal["auto", "reference", "triton", "dali"] = "auto"

    def __post_init__(self) -> None:
        for name in ("clips_per_video", "readers", "ahead"):
            check_count(name, getattr(self, name))
        check_choice("augmentation", self.augmentation, ("auto", "reference", "triton", "dali"))


class Batch(NamedTuple):
    """One step's clips, augmented.

    Attributes:
        views: normalised, [B, V, 3, T, S, S] on the loader's device, channels last in memory.
        labels: int64, [B] on the same device, 1 = fake.
        names: of the B clips, for people.
        epoch: of the batch.
        index: of the batch in its epoch.
    """

    views: Tensor
    labels: Tensor
    names: tuple[str, ...]
    epoch: int
    index: int


class BalancedBatches:
    """Which clips stand in which batch: half real, half fake.

    An epoch takes ``clips_per_video`` clips of every video of the larger class, the smaller class as often as it takes.
    The order is a function of the seed and the epoch, whatever the number of processes. A last batch that would not be
    full is left out, unless it is the only one, which is filled up.

    Args:
        labels: [N], 1 = fake.
        videos: [N], number of the video of each clip.
        batch_size: of all processes.
        clips_per_video: at most, of a video in an epoch.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.

    Raises:
        SDRError: a class has no clip.
        ValueError: ``batch_size`` does not give every process as many real clips as fake ones.
    """

    def __init__(
        self,
        labels: Tensor,
        videos: Tensor,
        *,
        batch_size: int,
        clips_per_video: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check(batch_size % (2 * world_size) == 0, "batch_size", f"be a multiple of {2 * world_size}", batch_size)
        check(0 <= rank < world_size, "rank", f"lie in 0..{world_size - 1}", rank)
        self.most, self.seed, self.rank, self.world_size = clips_per_video, seed, rank, world_size
        self.half = batch_size // 2
        order = np.argsort(videos.numpy(), kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(videos.numpy()[order])) + 1)
        self.classes = [[group for group in groups if len(group) and labels[group[0]] == label] for label in (0, 1)]
        if not all(self.classes):
            real, fake = map(len, self.classes)
            raise SDRError("dataset", f"training needs both classes, got {real} real and {fake} fake videos")
        sizes = [sum(min(len(group), self.most) for group in groups) for groups in self.classes]
        self.length = max(*sizes, self.half)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.length // self.half

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Indices of this process's clips in each batch of an epoch, the real ones first."""
        generator = np.random.default_rng((self.seed, epoch))
        real, fake = (self._draw(generator, groups) for groups in self.classes)
        share = self.half // self.world_size
        starts = range(self.rank * share, len(self) * self.half, self.half)
        return [np.concatenate([real[s : s + share], fake[s : s + share]]) for s in starts]

    def _draw(self, generator: np.random.Generator, groups: list[np.ndarray]) -> np.ndarray:
        """``length`` clips of one class: all its videos in random order, then all again."""
        drawn: list[np.ndarray] = []
        while sum(map(len, drawn)) < self.length:
            clips = np.concatenate([generator.permutation(group)[: self.most] for group in groups])
            drawn.append(generator.permutation(clips))
        return np.concatenate(drawn)[: self.length]


class TrainingLoader:
    """Endless batches of augmented views, epoch after epoch, from where ``load_state_dict`` says.

    Batches are read and, with DALI, augmented ahead; the state counts those that were given out. What comes is a
    function of the cache, the seed, the augmentation and its parameters: not of ``readers``, ``ahead``, the number of
    processes or where a run was resumed.

    Args:
        cache: the clips.
        config: how they are drawn and read.
        tpa: their augmentation.
        batch_size: clips of a step, over all processes.
        num_views: V.
        seed: of order and augmentation.
        device: of the batches.
        dtype: of their views.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        cache: ClipCache,
        config: LoaderConfig,
        tpa: TPAConfig,
        *,
        batch_size: int,
        num_views: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cache, self.config, self.tpa, self.num_views, self.seed = cache, config, tpa, num_views, seed
        self.device, self.dtype = torch.device(device), dtype
        self.augmentation = pick_augmentation(config.augmentation, self.device)
        self.batches = BalancedBatches(
            cache.labels,
            cache.videos,
            batch_size=batch_size,
            clips_per_video=config.clips_per_video,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self.epoch, self.index = 0, 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.batches)

    def state_dict(self) -> dict:
        """The next batch, and what decides which clips it holds."""
        order = {"seed": self.seed, "batch_size": 2 * self.batches.half, "num_views": self.num_views}
        order |= {"clips_per_video": self.config.clips_per_video, "cache": self.cache.digest}
        order |= {"augmentation": self.augmentation, "dtype": str(self.dtype)}
        order |= {"tpa": json.dumps(asdict(self.tpa), default=sorted)}
        return {"epoch": self.epoch, "index": self.index, "order": order}

    def load_state_dict(self, state: dict) -> None:
        """Go on at the batch after the last one that was given out when ``state`` was taken.

        Raises:
            SDRError: the state is of other clips, settings or another seed; names the field.
        """
        for name, value in self.state_dict()["order"].items():
            before = state["order"].get(name)
            if before != value:
                raise SDRError("loader", f"cannot go on where it was: {name} was {before}, now it is {value}")
        epoch, index = state["epoch"], state["index"]
        if epoch < 0 or not 0 <= index < len(self):
            raise SDRError("loader", f"cannot go on where it was: there is no batch {index} of epoch {epoch}")
        self.epoch, self.index = epoch, index

    def __iter__(self) -> Iterator[Batch]:
        """Raises SDRError that names the clip where one cannot be read; the batches before it are given out first."""
        with closing(self._views()) as batches:
            for batch in batches:
                last = batch.index + 1 == len(self)
                self.epoch, self.index = (batch.epoch + 1, 0) if last else (batch.epoch, batch.index + 1)
                yield batch

    def _views(self) -> Iterator[Batch]:
        if self.augmentation == "dali":
            yield from self._dali_views()
            return
        with closing(self._read_ahead()) as parts:
            for part in parts:
                views = augment(
                    part.clips.to(self.device, non_blocking=True).permute(0, 4, 1, 2, 3),
                    self.tpa,
                    seed=self.seed,
                    epoch=part.epoch,
                    samples=part.samples,
                    num_views=self.num_views,
                    dtype=self.dtype,
                    impl=self.augmentation,
                )
                yield self._batch(views, part)

    def _dali_views(self) -> Iterator[Batch]:
        waiting: deque[Part] = deque()  # read, and not yet given out

        def source() -> Iterator[tuple[np.ndarray, ViewMaps]]:
            with closing(self._read_ahead()) as parts:
                for part in parts:
                    waiting.append(part)
                    yield part.clips.numpy(), self._draw(part)

        pipeline = dali_views(
            source(),
            self.tpa,
            num_views=self.num_views,
            batch_size=2 * self.batches.half // self.batches.world_size,
            num_frames=self.cache.shape[0],
            device=self.device,
            dtype=self.dtype,
            prefetch=self.config.ahead,
            threads=self.config.readers,
        )
        with closing(pipeline) as batches:
            try:
                for views in batches:
                    yield self._batch(views, waiting.popleft())
            except SDRError as error:
                if error.file != "DALI":
                    raise
                clips = ", ".join(map(self.cache.name, waiting[0].indices)) if waiting else ""
                raise SDRError("DALI", error.what, f"in the batch of {clips}") from error

    def _draw(self, part: "Part") -> ViewMaps:
        T, H, W, _ = self.cache.shape
        key = {"seed": self.seed, "epoch": part.epoch, "samples": part.samples, "num_views": self.num_views}
        return draw_maps(self.tpa, **key, num_frames=T, size=(H, W))

    def _batch(self, views: Tensor, part: "Part") -> Batch:
        labels = send(self.cache.labels[part.indices], self.device)
        return Batch(views, labels, tuple(map(self.cache.name, part.indices)), part.epoch, part.index)

    def _read_ahead(self) -> Iterator["Part"]:
        """Clips of each batch from the present one on, read by threads before they are asked for."""
        pool = ThreadPoolExecutor(self.config.readers)
        reading: deque[tuple[Part, list[Future]]] = deque()
        try:
            for part in self._parts():
                reads = [
                    pool.submit(self.cache.read, i, out)
                    for i, out in zip(part.indices, part.clips.numpy(), strict=True)
                ]
                reading.append((part, reads))
                if len(reading) > self.config.ahead:
                    yield finished(*reading.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _parts(self) -> Iterator["Part"]:
        """The batches from the present one on, without their pixels."""
        epoch, start = self.epoch, self.index
        while True:
            for index, indices in enumerate(self.batches.epoch(epoch)[start:], start):
                shape = (len(indices), *self.cache.shape)
                clips = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
                yield Part(clips, indices.tolist(), self.cache.samples[indices].tolist(), epoch, index)
            epoch, start = epoch + 1, 0


class Part(NamedTuple):
    """A batch on its way: clips, uint8 [B, T, S, S, 3], their indices in the cache and the keys of their draws."""

    clips: Tensor
    indices: list[int]
    samples: list[int]
    epoch: int
    index: int


def finished(part: Part, reads: list[Future]) -> Part:
    """The part, once all its clips are read."""
    for read in reads:
        read.result()
    return part


def pick_augmentation(name: str, device: torch.device) -> str:
    """What ``auto`` stands for on this device, said in the log."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "reference"
    name = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "triton"
    logger.info("augmentation by %s", "DALI" if name == "dali" else "Triton, since DALI is not installed")
    return name
