"""Step "views": TPA's four views of uint8 clips, beside its reference and what else makes them in the same run."""

import os
from collections.abc import Callable
from functools import partial

import torch
from ceilings import measure
from ledger import NOT_MEASURED, Ledger
from machine import Machine
from torch import Tensor
from tpa_peers import PEERS, peer_call

from sdr import TPAConfig
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, augment, draw_maps
from sdr_kernels import clip_views

CLIPS = 16
VIEWS = 4
FRAMES = 32
SIZE = 224
LIMIT_S = 1.0  # of one measurement
KEY = {"seed": 0, "epoch": 0, "num_views": VIEWS}


def decoded_clips(clips: int, frames: int, size: int, device: torch.device) -> Tensor:
    """uint8, [B, 3, T, H, W], colours innermost in memory, as decoded frames have them."""
    return torch.randint(0, 256, (clips, frames, size, size, 3), dtype=torch.uint8, device=device).movedim(-1, 1)


def with_maps(clips: Tensor) -> Callable[..., Tensor]:
    """``clip_views`` of these clips with one draw of the maps."""
    drawn = draw_maps(
        TPAConfig(), **KEY, samples=range(len(clips)), num_frames=clips.shape[2], size=tuple(clips.shape[-2:])
    )
    maps = (torch.from_numpy(array).to(clips.device) for array in drawn)
    return partial(clip_views, clips, *maps, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def time_views(call: Callable[[], object], clips: Tensor, machine: Machine, *, wall: bool = False) -> dict[str, object]:
    """Seconds of a call, clips per second, and bytes of the clips and of their views in 16 bits."""
    machine.release()
    result = measure(call, machine.device, limit_s=LIMIT_S, wall=wall)
    moved = clips.numel() * (1 + 2 * VIEWS)
    rate = {"clips": len(clips), "clips_per_s": len(clips) / result["median_s"]}
    return {**rate, "bytes": moved, "bytes_per_s": moved / result["median_s"], **result}


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter every timing of 16 clips; what a peer lacks is the reason why it was not measured."""
    if machine.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # before a launcher imports Triton
    sizes = machine.scaled(CLIPS, 1), machine.scaled(FRAMES, 1), machine.scaled(SIZE, 32)
    clips = decoded_clips(*sizes, machine.device)
    planar = clips.contiguous()
    what, dtype = f"{CLIPS} clips x {VIEWS} views bf16", machine.half
    calls: dict[str, Callable[[], object]] = {
        "clip_views": partial(with_maps(clips), dtype=dtype, impl="triton"),
        "clip_views of planar clips": partial(with_maps(planar), dtype=dtype, impl="triton"),
        "reference": partial(with_maps(clips), dtype=dtype, impl="reference"),
    }
    for name, call in calls.items():
        ledger.attempt(f"{name}, {what}", partial(time_views, call, clips, machine))
    whole = partial(augment, clips, TPAConfig(), **KEY, samples=range(len(clips)), dtype=dtype, impl="triton")
    ledger.attempt(
        f"augment with its draws by wall clock, {what}", partial(time_views, whole, clips, machine, wall=True)
    )
    for name in PEERS:

        def timed(name: str = name) -> dict[str, object] | str:
            try:
                call = peer_call(name, clips, dtype)
            except ModuleNotFoundError as error:
                return f"{NOT_MEASURED}{error}"
            return time_views(call, clips, machine)

        ledger.attempt(f"{name}, {what}", timed, needs_s=LIMIT_S)
