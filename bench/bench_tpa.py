"""TPA's four views of one clip on a CPU: clips per second of this library and of what else makes them.

Every path has the same input, one uint8 clip whose colours are innermost in memory, and makes four normalised views of
it in float32. A new path is one more entry of ``PATHS``.
"""

from collections.abc import Callable
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import Tensor
from tpa_peers import PEERS, peer_call

from sdr import TPAConfig
from sdr.dali import dali_views
from sdr.tpa import augment, draw_maps

VIEWS = 4


def ours(clips: Tensor) -> Callable[[], Tensor]:
    """Draws and views: on a CPU by the reference of ``clip_views``."""
    return partial(augment, clips, TPAConfig(), seed=0, epoch=0, samples=[0], num_views=VIEWS)


def dali(clips: Tensor) -> Callable[[], Tensor]:
    """A batch at a time through one pipeline on one thread, nothing made ahead; the draws are made before."""
    B, _, T, H, W = clips.shape
    maps = draw_maps(TPAConfig(), seed=0, epoch=0, samples=range(B), num_views=VIEWS, num_frames=T, size=(H, W))
    source = repeat((clips.permute(0, 2, 3, 4, 1).numpy(), maps))
    sizes = {"num_views": VIEWS, "batch_size": B, "num_frames": T}
    return partial(next, dali_views(source, TPAConfig(), **sizes, prefetch=1, threads=1))


def peer(name: str, clips: Tensor) -> Callable[[], list[Tensor]]:
    try:
        return peer_call(name, clips, torch.float32)
    except ModuleNotFoundError as error:
        pytest.skip(f"not measured: {error}")


PATHS: dict[str, Callable[[Tensor], Callable[[], object]]] = {
    "reference": ours,
    "dali": dali,
    **{name: partial(peer, name) for name in PEERS},
}


@pytest.mark.parametrize("path", PATHS)
def bench_views(benchmark, path):
    frames, size = (2, 32) if benchmark.disabled else (32, 224)
    clips = torch.randint(0, 256, (1, frames, size, size, 3), dtype=torch.uint8).movedim(-1, 1)
    call = PATHS[path](clips)
    call()
    benchmark.pedantic(call, rounds=11)
    benchmark.extra_info.update(shape=list(clips.shape), views=VIEWS, threads=torch.get_num_threads())
    if not benchmark.disabled:
        benchmark.extra_info["clips_per_s"] = len(clips) / benchmark.stats.stats.median
