"""Loading against computing: which of the two an update waits for, and what there is to change."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice, repeat

import torch

from sdr.clip_cache import ClipCache
from sdr.evaluate import require_classes, require_shape
from sdr.loading import Batch, TrainingLoader
from sdr.profile_work import ProfileConfig
from sdr.timing import synchronise

WAITS = 0.1  # share of an update from which waiting for the loader is worth a change
ROUND_S, BATCHES, ROUNDS = 1.0, 20, 3  # each part takes its turn in every round


@dataclass(frozen=True)
class Feeding:
    """Clips per second of the parts of training, each on its own and together: medians over rounds.

    Args:
        reading: of clips from the disk alone.
        loader: of the loader, with its augmentation.
        update: of updates whose clips are there already.
        together: of updates that the loader feeds.
        waiting_share: of the time together, what is not the update's own; median over rounds.
    """

    reading: float
    loader: float
    update: float
    together: float
    waiting_share: float

    @property
    def bottleneck(self) -> str:
        """ "loader" where it is slower than the update and not hidden behind it, else "update"."""
        return "loader" if self.waiting_share > WAITS and self.loader < self.update else "update"

    @property
    def reading_share(self) -> float:
        """Of the loader's time."""
        return min(1.0, self.loader / self.reading)

    def as_dict(self) -> dict[str, object]:
        """For JSON: the rates and what follows from them."""
        return asdict(self) | {"bottleneck": self.bottleneck, "reading_share": self.reading_share}


def make_loader(config: ProfileConfig, device: torch.device, clips: int) -> TrainingLoader:
    """The loader that `sdr train` would have; raises SDRError where the cache does not fit the model."""
    cache = ClipCache(config.data, split="train")
    require_shape(cache, config.model)
    require_classes(cache.folder, cache.labels, use="training")
    return TrainingLoader(
        cache,
        config.loader,
        config.tpa,
        batch_size=clips,
        num_views=config.model.num_branches,
        device=device,
        dtype=config.dtype_on(device),
    )


def clips_per_s(batches: Iterator, clips: int, device: torch.device, *, skip: int, use: Callable) -> float:
    """Of batches that come out of an iterator and are used, until a second or 20 batches are over.

    Args:
        batches: of ``clips`` each.
        clips: in a batch.
        device: waited for at both ends.
        skip: batches that are thrown away before the clock starts: those that were read while nobody asked.
        use: of each batch.
    """
    for _ in islice(batches, skip):
        pass
    synchronise(device)
    start, done = time.perf_counter(), 0
    for batch in islice(batches, BATCHES):
        use(batch)
        done += 1
        if time.perf_counter() - start > ROUND_S:
            break
    synchronise(device)
    return done * clips / (time.perf_counter() - start)


def measure_feeding(loader: TrainingLoader, update: Callable[[Batch], object], batch: Batch) -> Feeding:
    """Time reading, the loader, the update, and the last two together, in turns.

    Args:
        loader: of batches like ``batch``.
        update: by a batch.
        batch: to update by where nothing is loaded.
    """
    clips, skip = len(batch.views), loader.config.ahead + 1
    ignore = lambda batch: None  # noqa: E731
    with closing(loader._read_ahead()) as parts, closing(iter(loader)) as batches:
        turns = ((parts, ignore, skip), (batches, ignore, skip), (repeat(batch), update, 0), (batches, update, skip))
        rounds: list[list[float]] = []
        start = time.perf_counter()
        while not rounds or (len(rounds) < ROUNDS and time.perf_counter() - start < len(turns) * ROUNDS * ROUND_S):
            rounds.append([clips_per_s(source, clips, loader.device, skip=n, use=use) for source, use, n in turns])
    waiting = [max(0.0, 1 - together / alone) for _, _, alone, together in rounds]
    return Feeding(*map(statistics.median, zip(*rounds, strict=True)), statistics.median(waiting))
