"""Step "profile": which kernels inference spends its time in, and how far each op is from its floor."""

from functools import partial

import torch
from inputs import random_views
from ledger import Ledger
from machine import Machine
from timings import CLIPS, LIMIT_S, fast_model

from sdr.layers import layers_of
from sdr.profile_kernels import profile_kernels


def profile_model(clips: int, machine: Machine) -> dict[str, object]:
    """Kernels and ops of a forward pass of ``ftcn_released`` in bf16, and how long the GPU was idle in it."""
    config = machine.configs()["ftcn_released"]
    model = fast_model(config, machine)
    call = partial(model, random_views(config, clips, machine.device, machine.half))
    median_s = machine.measure(call, limit_s=LIMIT_S)["median_s"]
    layers = layers_of(config, clips)
    with torch.inference_mode():
        found = profile_kernels(call, machine.device, median_s=median_s, layers=layers, rates=machine.rates)
    return {"clips": clips, "median_us": 1e6 * median_s, **found}


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter the profile of many clips and of one."""
    for clips in (machine.scaled(CLIPS, 2), 1):
        ledger.attempt(f"inference, {clips} clips", partial(profile_model, clips, machine))
