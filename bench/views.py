"""Step "views": TPA's four views of uint8 clips, beside what else makes them in the same run; the loader; NVDEC."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from clips import NoiseClips
from ledger import NOT_MEASURED, Ledger
from machine import ROOT, Machine
from torch import Tensor
from tpa_peers import PEERS, peer_call

from sdr import SDRError, TPAConfig
from sdr.decoding import why_no_dali
from sdr.loading import LoaderConfig, TrainingLoader
from sdr.timing import synchronise
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, augment, draw_maps
from sdr_kernels import clip_views

CLIPS = 16
VIEWS = 4
FRAMES = 32
SIZE = 224
LIMIT_S = 1.0  # of one measurement
VIDEOS = 64  # that the loader reads, of one clip each: 308 MB, which stay in the machine's memory
BATCHES = 20  # that it is timed over
READERS = 8
KEY = {"seed": 0, "epoch": 0, "num_views": VIEWS}


def decoded_clips(clips: int, frames: int, size: int, device: torch.device) -> Tensor:
    """uint8, [B, 3, T, H, W], colours innermost in memory, as decoded frames have them."""
    return torch.randint(0, 256, (clips, frames, size, size, 3), dtype=torch.uint8, device=device).movedim(-1, 1)


def maps_of(clips: Tensor) -> list[Tensor]:
    """One draw of the sampling, colour and hole of each view."""
    drawn = draw_maps(
        TPAConfig(), **KEY, samples=range(len(clips)), num_frames=clips.shape[2], size=tuple(clips.shape[-2:])
    )
    return [torch.from_numpy(array).to(clips.device) for array in drawn]


def with_maps(clips: Tensor) -> Callable[..., Tensor]:
    """``clip_views`` of these clips with one draw of the maps."""
    return partial(clip_views, clips, *maps_of(clips), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def time_views(call: Callable[[], object], clips: Tensor, machine: Machine, *, wall: bool = False) -> dict[str, object]:
    """Seconds of a call, clips per second, and bytes of the clips and of their views in 16 bits."""
    machine.release()
    result = machine.measure(call, limit_s=LIMIT_S, wall=wall)
    moved = clips.numel() * (1 + 2 * VIEWS)
    rate = {"clips": len(clips), "clips_per_s": len(clips) / result["median_s"]}
    return {**rate, "bytes": moved, "bytes_per_s": moved / result["median_s"], **result}


def time_loader(augmentation: str, machine: Machine) -> dict[str, object] | str:
    """Clips per second from shards on disk to batches of views in 16 bits on the device, by wall clock."""
    videos, frames, size = machine.scaled(VIDEOS, 4), machine.scaled(FRAMES, 2), machine.scaled(SIZE, 32)
    batch, batches = machine.scaled(CLIPS, 2), machine.scaled(BATCHES, 2)
    config = LoaderConfig(augmentation=augmentation, readers=READERS, ahead=4)
    key = {"batch_size": batch, "num_views": VIEWS, "device": machine.device, "dtype": machine.half}
    with tempfile.TemporaryDirectory() as folder:
        loader = TrainingLoader(NoiseClips(Path(folder), videos, (frames, size, size, 3)), config, TPAConfig(), **key)
        try:
            with closing(iter(loader)) as source:
                for _ in range(6):  # until the batches made ahead no longer count
                    next(source)
                synchronise(machine.device)
                start = time.perf_counter()
                for _ in range(batches):
                    next(source)
                synchronise(machine.device)
                seconds = time.perf_counter() - start
        except SDRError as error:
            return f"{NOT_MEASURED}{error}"
    return {"clips_per_s": batch * batches / seconds, "batch": batch, "batches": batches, "readers": READERS}


def check_nvdec(machine: Machine) -> dict[str, object] | str:
    """NVDEC through DALI against PyAV on H.264 with B-frames: same frames at same times, and how far the pixels are."""
    if machine.rehearsal:
        return f"{NOT_MEASURED}no GPU decodes in a rehearsal"
    if missing := why_no_dali(needs_gpu=True):
        return f"{NOT_MEASURED}{missing}"
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from video_files import barcode_video, read_barcode
    except ModuleNotFoundError as error:
        return f"{NOT_MEASURED}{error}"
    from sdr.video import open_video

    count, passes = 300, {}  # 276 MB of RGB: more than one window of DALI's
    with tempfile.TemporaryDirectory() as folder:
        path = barcode_video(Path(folder) / "a.mp4", count, (640, 480), options={"g": "48", "bf": "2"})
        for decoder in ("pyav", "dali"):
            with open_video(path, decoder=decoder) as video:
                passes[decoder] = list(video.frames())
                if video.damage:
                    return f"{decoder}: {video.damage}"
    steps = []
    for number, (ours, theirs) in enumerate(zip(passes["dali"], passes["pyav"], strict=True)):
        if ours[0] != theirs[0] or not read_barcode(ours[1]) == read_barcode(theirs[1]) == number % 256:
            return f"frame {number} is another: {ours[0]} s, {read_barcode(ours[1])}"
        steps.append(np.abs(ours[1].astype(int) - theirs[1]))
    return {"frames": count, "mean_step_of_255": float(np.mean(steps)), "largest_step_of_255": int(np.max(steps))}


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
    for augmentation in ("triton", "dali"):
        ledger.attempt(f"loader, {augmentation}", partial(time_loader, augmentation, machine), needs_s=5 * LIMIT_S)
    ledger.attempt("NVDEC against PyAV, H.264", partial(check_nvdec, machine), needs_s=5 * LIMIT_S)
