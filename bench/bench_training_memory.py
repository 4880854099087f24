"""What an update keeps for its backward pass, counted in saved tensors on a CPU: eager and the two training schemes.

One branch of `ftcn_released` at its full width and image size runs forward in bfloat16. Every storage that autograd
saves counts once, where it is first saved, parameters aside. Bytes are affine in the frames of a clip: what two short
clips keep gives what a clip of 32 frames adds to a batch, and what a step keeps whatever its batch (rounded weights and
small matrices). With ``--benchmark`` the clip has 32 frames itself, and the prediction is held to it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sdr.config import GroupedConfig, ftcn_released
from sdr.ftcn import Backbone
from sdr.grouped import GroupedPass

FRAMES, BRANCHES = 32, 4
SHORT = (2, 4)  # frames
LIMITS = {"fused": 3.3e9, "gram": 1.5e9}  # bytes a clip of four branches adds


class Saved:
    """Bytes of saved storages by the part of the network that saved them first."""

    def __init__(self, backbone: Backbone) -> None:
        self.bytes: Counter[str] = Counter()
        self.part = ""
        self._storages = {p.untyped_storage().data_ptr(): p for p in backbone.parameters()}  # alive: no address twice

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = tensor
            self.bytes[self.part] += storage.nbytes()
        return tensor

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        self.part = part
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            yield


def eager_pass(backbone: Backbone, views: Tensor, saved: Saved) -> None:
    """The reference, as the trainer runs it in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        x = views[:, 0]
        for name in ("stem", *backbone.stages):
            with saved.counting(name):
                x = getattr(backbone, name)(x)
                x = backbone.time_pool(x) if name == backbone.stages[0] else x


def grouped_pass(scheme: str) -> Callable[[Backbone, Tensor, Saved], None]:
    def run(backbone: Backbone, views: Tensor, saved: Saved) -> None:
        grouped = GroupedPass([backbone], GroupedConfig(scheme=scheme, impl="cpu"))
        with saved.counting("stem"):
            x, *_ = grouped.stem(views)
        for name in backbone.stages:
            with saved.counting(name):
                x, *_ = grouped.stage(x, name)

    return run


PASSES = {"eager": eager_pass, "fused": grouped_pass("fused"), "gram": grouped_pass("gram")}


def count(scheme: str, frames: int) -> Counter[str]:
    config = ftcn_released()
    backbone = Backbone(config.branch()).train()
    views = torch.randn(1, 1, 3, frames, config.image_size, config.image_size).bfloat16()
    saved = Saved(backbone)
    PASSES[scheme](backbone, views, saved)
    return saved.bytes


@pytest.mark.parametrize("scheme", PASSES)
def bench_saved_bytes(benchmark, scheme, capsys):
    few, more = (count(scheme, frames) for frames in SHORT)
    a_frame = {part: (more[part] - few[part]) / (SHORT[1] - SHORT[0]) for part in few}
    a_step = {part: few[part] - SHORT[0] * a_frame[part] for part in few}
    clip = {part: BRANCHES * FRAMES * size for part, size in a_frame.items()}
    measured = benchmark.pedantic(count, (scheme, SHORT[1] if benchmark.disabled else FRAMES), rounds=1)
    if not benchmark.disabled:
        for part in a_frame:
            assert measured[part] == pytest.approx(FRAMES * a_frame[part] + a_step[part], rel=1e-3)
    total = sum(clip.values())
    benchmark.extra_info.update(
        subject=f"kept for the backward pass, ftcn_released, a clip of {BRANCHES} branches",
        op="training memory",
        impl="reference" if scheme == "eager" else f"cpu {scheme}",
        dtype="bfloat16",
        device="cpu",
        threads=torch.get_num_threads(),
        bytes_per_clip=clip,
        total=total,
        bytes_per_step=BRANCHES * sum(a_step.values()),
    )
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in clip.items())
    step = BRANCHES * sum(a_step.values()) / 1e9
    with capsys.disabled():
        print(f"\n{scheme}: {total / 1e9:.2f} GB a clip of {BRANCHES} branches ({parts}), {step:.2f} GB of any batch")
    assert total <= LIMITS.get(scheme, float("inf"))
