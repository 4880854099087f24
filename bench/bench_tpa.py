"""TPA's four views of uint8 clips: this library's and what else makes them, from the same clips.

Every path gives four normalised views in the same dtype. Those of other libraries draw their own parameters, so that
their answer is checked in shape, finiteness and range; ours and DALI's are held to the reference by the tests.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat

import pytest
import torch
from answers import WrongAnswerError, optional
from inputs import tensors_of
from timing import Moved, Row, time_op
from torch import Tensor
from tpa_peers import PEERS, peer_call
from views import VIEWS, decoded_clips

from sdr import TPAConfig
from sdr.dali import dali_views
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, augment, draw_maps

KIND = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if KIND == "cuda" else "reference"  # of clip_views
CLIPS = 16 if KIND == "cuda" else 1
DTYPE = torch.bfloat16 if KIND == "cuda" else torch.float32
# values of black and white after normalisation, and what rounding may add
DARKEST = min(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)) - 0.05
BRIGHTEST = max((1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)) + 0.05


def ours(clips: Tensor) -> Callable[[], Tensor]:
    """Draws and views."""
    key = {"seed": 0, "epoch": 0, "samples": range(len(clips)), "num_views": VIEWS}
    return partial(augment, clips, TPAConfig(), **key, dtype=DTYPE, impl=OURS)


def dali(clips: Tensor) -> Callable[[], Tensor]:
    """A batch at a time through one pipeline on one thread, nothing made ahead; the draws are made before."""
    B, _, T, H, W = clips.shape
    maps = draw_maps(TPAConfig(), seed=0, epoch=0, samples=range(B), num_views=VIEWS, num_frames=T, size=(H, W))
    source = repeat((clips.permute(0, 2, 3, 4, 1).cpu().numpy(), maps))
    sizes = {"num_views": VIEWS, "batch_size": B, "num_frames": T}
    return partial(next, dali_views(source, TPAConfig(), **sizes, prefetch=1, threads=1))


PATHS: dict[str, Callable[[Tensor], Callable[[], object]]] = {
    OURS: ours,
    "dali": dali,
    **{name: partial(peer_call, name, dtype=DTYPE) for name in PEERS},
}


def check_views(clips: Tensor) -> Callable[[object], None]:
    """A check that all views are there, finite, and between black and white."""

    def check(got: object) -> None:
        tensors = list(tensors_of(got))
        if sum(t.numel() for t in tensors) != VIEWS * clips.numel():
            raise WrongAnswerError(f"{[list(t.shape) for t in tensors]} are not {VIEWS} views of {list(clips.shape)}")
        if not all(bool(((t >= DARKEST) & (t <= BRIGHTEST)).all()) for t in tensors):  # NaN is neither
            raise WrongAnswerError("a view's values leave the range from black to white")

    return check


@pytest.mark.parametrize("path", PATHS)
def bench_views(benchmark, path, device, small):
    clips = decoded_clips(*((1, 2, 32) if small else (CLIPS, 32, 224)), device)
    work = [Moved(0, clips.numel() * (1 + VIEWS * DTYPE.itemsize))]
    row = Row(
        f"{VIEWS} views of {len(clips)} clip{'s' * (len(clips) > 1)}", "views", path, work, len(clips), baseline=OURS
    )
    row = replace(row, dtype=str(DTYPE).removeprefix("torch."), wall=path == "dali", limit_s=5.0)
    other = ours(clips)

    def timed() -> None:
        call = PATHS[path](clips)
        check = check_views(clips)
        time_op(benchmark, lambda _: call(), None, (clips,), row, check=check, baseline=lambda _: other())

    if path in PEERS:
        with optional(path):
            timed()
    else:
        timed()
