"""The whole model: inference, latency, scaling in T, V and batch, and the plain models that it is compared with.

On a CPU two threads, one clip of one branch of ``ftcn_released``; on a GPU the paper's batch. The truth of every row is
the reference in float64 on the same views.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import peers
import pytest
import torch
from answers import matches, optional
from cases import Sizes, of_clips
from inputs import random_model, random_views
from ledger import NOT_MEASURED
from machine import SMALL
from tensorrt_peer import tensorrt_call
from timing import Row, cpu_threads, time_op
from torch import Tensor, nn

from sdr import SDRConfig, SDRModel
from sdr.fast import SDRModel as FastSDRModel
from sdr.layers import layers_of
from sdr.tpa import normalise

KIND = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if KIND == "cuda" else "cpu"
CLIPS = 16 if KIND == "cuda" else 1
THREADS = 2  # of a CPU: what is promised is for two cores, and pairs of runs meet the same guests
PAIRS_S = 40.0  # of the row that README states
GIVEN = {"floats": torch.float32, "uint8": torch.uint8}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDED = "bf16" if KIND == "cuda" else "fp32"  # of latency and scaling
SCALING = {
    "frames": {"cuda": (8, 16, 32, 64, 128), "cpu": (8, 16, 32, 64)},
    "branches": {"cuda": (1, 2, 4, 8, 16), "cpu": (1, 2, 4)},
    "clips": {"cuda": (1, 2, 4, 8, 16, 32), "cpu": (1, 2, 4)},
}
SCALED_SIDE = 112  # pixels on a CPU


def config_of(small: bool) -> SDRConfig:
    """``ftcn_released`` with the branches that this device has the time for."""
    config = Sizes(KIND, small).config()
    return replace(config, blocks=SMALL["blocks"]) if small else config


Tokens = Callable[[Tensor], Tensor]


def tokens_of(model: nn.Module) -> Tokens:
    """A call from views to joint tokens, before the logits, which are too few to tell a right answer from a wrong."""
    return lambda views: model(views)[1]


@lru_cache(1)
def reference_of(config: SDRConfig, device: torch.device) -> SDRModel:
    return random_model(config, device)


def views_of(config: SDRConfig, clips: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As :func:`inputs.random_views`; floats of every dtype hold the same values, so that they have one truth."""
    if dtype == torch.uint8:
        return random_views(config, clips, device, dtype)
    return random_views(config, clips, device, torch.bfloat16).to(dtype)


@lru_cache(1)
@torch.no_grad()
def truth_of(config: SDRConfig, clips: int, device: torch.device, given: str) -> Tensor:
    """Joint tokens of the views in float64, clip by clip, which takes less memory; given: "floats" or "uint8"."""
    model = copy.deepcopy(reference_of(config, device)).double().to(memory_format=torch.channels_last_3d)
    views = normalise(views_of(config, clips, device, GIVEN[given])).double()
    return torch.cat([model(peers.branch_major(clip, channels_last=True)).tokens for clip in views.split(1)])


@lru_cache(2)
@torch.no_grad()
def plain_of(config: SDRConfig, clips: int, device: torch.device, given: str, dtype: torch.dtype) -> Tensor:
    """The same by the eager model in ``dtype``."""
    model = copy.deepcopy(reference_of(config, device)).to(dtype)
    return model(normalise(views_of(config, clips, device, GIVEN[given])).to(dtype)).tokens


def time_model(benchmark, call: Tokens, config: SDRConfig, views: Tensor, dtype: torch.dtype, row: Row, **more) -> None:
    """Time views to tokens, checked against float64 as the eager model in the same dtype errs."""
    device, clips = views.device, len(views)
    work = layers_of(config, clips, dtype.itemsize, views.dtype.itemsize)
    key = config, clips, device, "uint8" if views.dtype == torch.uint8 else "floats"
    with cpu_threads(device, THREADS):
        check = matches(truth_of(*key), plain_of(*key, dtype))
    row = replace(row, work=work, clips=clips, threads=THREADS, dtype=str(dtype).removeprefix("torch."))
    time_op(benchmark, call, None, (views,), row, check=check, **more)


def subject_of(what: str, clips: int, config: SDRConfig) -> str:
    return of_clips(f"{what} ftcn_released", clips, config.num_branches)


def fast_of(config: SDRConfig, device: torch.device, dtype: torch.dtype) -> Tokens:
    return tokens_of(FastSDRModel.from_reference(copy.deepcopy(reference_of(config, device)).to(dtype)).eval())


# the reference is in float32 as FTCN runs; in bfloat16 the faster of eager's layouts is what there is to beat
@pytest.mark.parametrize(
    ("dtype", "against"),
    [("fp32", "reference"), ("fp32", "eager channels_last_3d"), ("bf16", "eager channels_last_3d")],
)
def bench_inference(benchmark, dtype, against, device, small):
    config, dtype = config_of(small), DTYPES[dtype]
    clips = 1 if small else CLIPS
    model = reference_of(config, device)
    views = views_of(config, clips, device, dtype)
    other = tokens_of(model)
    given = peers.branch_major(views, channels_last=False)
    if against != "reference":
        other = tokens_of(peers.ChannelsLast(copy.deepcopy(model).to(dtype)))
        given = peers.branch_major(views, channels_last=True)
    limit_s = PAIRS_S if against == "reference" else 15.0
    row = Row(subject_of("inference", clips, config), "model", OURS, baseline=against, limit_s=limit_s)
    call = fast_of(config, device, dtype)
    time_model(benchmark, call, config, views, dtype, row, baseline=lambda _: other(given))


PEERS = {
    "reference": (peers.eager, "fp32", False),
    "eager bf16 NCTHW": (peers.eager, "bf16", False),
    "eager fp32 channels_last_3d": (peers.eager, "fp32", True),
    "eager bf16 channels_last_3d": (peers.eager, "bf16", True),
}
GPU_PEERS = {
    "CUDA graph over eager bf16": (peers.graphed, "bf16", True),
    "torch.func.vmap bf16": (peers.stacked, "bf16", True),
    "torch.compile bf16": (partial(peers.compiled, mode=None, backend="inductor"), "bf16", True),
    "CUDA graph over torch.compile bf16": (partial(peers.compiled_graph, backend="inductor"), "bf16", True),
    "torch.compile max-autotune bf16": (
        partial(peers.compiled, mode="max-autotune-no-cudagraphs", backend="inductor"),
        "bf16",
        True,
    ),
}


@pytest.mark.parametrize("peer", [*PEERS, *GPU_PEERS])
def bench_peer(benchmark, peer, device, small):
    if peer in GPU_PEERS and KIND == "cpu":
        pytest.skip(
            f"{NOT_MEASURED}this peer runs the whole model on a GPU alone; bench_blocks has it of a block on a CPU"
        )
    build, dtype, channels_last = (PEERS | GPU_PEERS)[peer]
    config, dtype = config_of(small), DTYPES[dtype]
    clips = 1 if small else CLIPS
    model = copy.deepcopy(reference_of(config, device)).to(dtype)
    model = peers.ChannelsLast(model) if channels_last else model
    views = peers.branch_major(views_of(config, clips, device, dtype), channels_last=channels_last)
    row = Row(subject_of("inference", clips, config), "model", peer, baseline="", limit_s=6.0)
    with optional(peer):
        with torch.no_grad():
            call = tokens_of(build(model, views))
        time_model(benchmark, call, config, views, dtype, row)


def bench_tensorrt(benchmark, device, small):
    config = config_of(small)
    clips = 1 if small else CLIPS
    views = views_of(config, clips, device, torch.float16).contiguous()
    row = Row(subject_of("inference", clips, config), "model", "TensorRT fp16", baseline="", limit_s=10.0)
    with optional("TensorRT"):
        call = tensorrt_call(copy.deepcopy(reference_of(config, device)).half(), views)
        time_model(benchmark, lambda x: call(x)[1], config, views, torch.float16, row)


@pytest.mark.parametrize("dtype", DTYPES if KIND == "cuda" else ["fp32"])
@pytest.mark.parametrize("given", ["floats", "uint8"] if KIND == "cuda" else ["floats"])  # float64 takes a minute there
def bench_latency(benchmark, given, dtype, device, small):
    """One clip of four branches by the wall clock, head included."""
    config, dtype = replace(config_of(small), num_branches=4), DTYPES[dtype]
    views = views_of(config, 1, device, torch.uint8 if given == "uint8" else dtype)
    row = Row(subject_of("latency", 1, config) + f", {given}", "model", OURS, baseline="", wall=True, limit_s=5.0)
    time_model(benchmark, fast_of(config, device, dtype), config, views, dtype, row)


@pytest.mark.parametrize(
    ("axis", "size"),
    [(axis, size) for axis, sizes in SCALING.items() for size in sizes[KIND]],
    ids=[f"{axis} {size}" for axis, sizes in SCALING.items() for size in sizes[KIND]],
)
def bench_scaling(benchmark, axis, size, device, small):
    config, dtype = config_of(small), DTYPES[ROUNDED]
    if KIND == "cpu" and not small:
        config = replace(config, image_size=SCALED_SIDE)
    if small:
        size = min(size, 4)
    elif axis == "frames":
        config = replace(config, num_frames=size)
    if axis == "branches":
        config = replace(config, num_branches=size)
    clips = size if axis == "clips" else 1 if small or KIND == "cpu" else 4
    views = views_of(config, clips, device, dtype)
    T, V, side = config.num_frames, config.num_branches, config.image_size
    subject = of_clips(f"scaling of {axis}, ftcn_released", clips, V) + f" of {T} x {side} x {side}"
    row = Row(subject, "model", OURS, baseline="", limit_s=2.0)
    time_model(benchmark, fast_of(config, device, dtype), config, views, dtype, row)
