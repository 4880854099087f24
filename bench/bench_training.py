"""A training step, forward, losses and backward, in both schemes and by plain PyTorch; gradients against float64."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial

import peers
import pytest
import torch
from answers import WrongAnswerError, optional
from cases import Sizes, of_clips
from inputs import random_model, random_views
from timing import Row, time_op
from torch import Tensor, nn
from training import compared, compiled, fast_model, gradients, training_step

from sdr import SDRConfig, SDRModel
from sdr.training_passes import training_passes

KIND = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if KIND == "cuda" else "cpu"
DTYPE = torch.bfloat16 if KIND == "cuda" else torch.float32
CLIPS = 16 if KIND == "cuda" else 2
# on a CPU a step of these sizes takes seconds; the checked step, on a GPU too, is one that float64 can hold
CPU_SIZES = {"num_branches": 2, "num_frames": 4, "image_size": 112}
CHECKED = {"num_frames": 8, "image_size": 32}
SMALLEST = {"num_branches": 2, "num_frames": 4, "image_size": 16, "blocks": (1, 2, 1, 1)}


ROWS: dict[str, tuple[str, Callable[[SDRModel], nn.Module]]] = {
    "eager": ("reference", lambda model: model),
    "eager channels_last_3d": ("eager channels_last_3d", peers.ChannelsLast),
    "gram": (f"{OURS} gram", partial(fast_model, scheme="gram", impl=OURS)),
    "fused": (f"{OURS} fused", partial(fast_model, scheme="fused", impl=OURS)),
} | ({"torch.compile": ("torch.compile", compiled)} if KIND == "cuda" else {})


def sizes_of(small: bool) -> tuple[SDRConfig, int]:
    config = Sizes(KIND, small).config()
    if small:
        return replace(config, **SMALLEST), 2
    return replace(config, **CPU_SIZES) if KIND == "cpu" else config, CLIPS


@lru_cache(1)
def exact_of(config: SDRConfig, device: torch.device) -> tuple[SDRModel, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Model, views, and gradients of a step by plain PyTorch in ``DTYPE`` and in float64."""
    model = random_model(config, device).train()
    views = random_views(config, 4, device)
    exact = gradients(copy.deepcopy(model).double(), views.double(), torch.float64)
    return model, views, gradients(model, views, DTYPE), exact


def check_gradients(build: Callable[[SDRModel], nn.Module], config: SDRConfig, device: torch.device) -> None:
    """Raise unless the median parameter's gradient errs at most twice what plain PyTorch's errs."""
    model, views, eager, exact = exact_of(config, device)
    found = gradients(build(copy.deepcopy(model)), views, DTYPE)
    found = {name.removeprefix("model."): gradient for name, gradient in found.items()}
    if not (result := compared(found, eager, exact))["passed"]:
        raise WrongAnswerError(f"gradients err {result['median']:.2f} times what eager's err in the median")


@pytest.mark.parametrize("kind", ROWS)
def bench_step(benchmark, kind, device, small):
    impl, build = ROWS[kind]
    config, clips = sizes_of(small)
    views = random_views(config, clips, device, DTYPE)
    views = peers.branch_major(views, channels_last=kind != "eager")
    model = random_model(config, device).train()
    V, T, side = config.num_branches, config.num_frames, config.image_size
    subject = of_clips("training step ftcn_released", clips, V) + f" of {T} x {side} x {side}"
    ours = impl.startswith(OURS)
    work = training_passes(config, clips, kind, DTYPE.itemsize) if ours else ()
    row = Row(subject, "training step", impl, work, clips, "reference" if ours else "", threads=2, limit_s=5.0)
    row = replace(row, dtype=str(DTYPE).removeprefix("torch."))
    reference = training_step(copy.deepcopy(model), peers.branch_major(views, channels_last=False), DTYPE)
    with nullcontext() if ours else optional(impl):
        check_gradients(build, replace(config, dropout=0.0, **({} if small else CHECKED)), device)
        step = training_step(build(model), views, DTYPE)
        time_op(benchmark, lambda _: step(), None, (views,), row, check=lambda _: None, baseline=lambda _: reference())
