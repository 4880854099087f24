"""The four views of TPA as other libraries make them: the same methods and strengths, drawn once per clip."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sdr import TPAConfig
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD

Views = Callable[[Tensor], list[Tensor]]  # uint8 clips, [B, T, 3, H, W], to the batch of each view, of the same axes


def torchvision_views(config: TPAConfig, size: int, dtype: torch.dtype) -> Views:
    """torchvision.transforms.v2, clip by clip: a call draws once for all that it is given."""
    from torchvision.transforms import v2

    jitter = config.brightness, config.contrast, config.saturation, config.hue
    to_floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    transforms = [
        [v2.ColorJitter(*jitter), *to_floats],
        [*to_floats, v2.RandomErasing(1.0, config.cutout_area, config.cutout_ratio)],
        [v2.RandomHorizontalFlip(config.flip_probability), *to_floats],
        [v2.RandomResizedCrop(size, config.crop_area, config.crop_ratio, antialias=False), *to_floats],
    ]
    views = [v2.Compose(steps) for steps in transforms]
    return lambda clips: [torch.stack([view(clip) for clip in clips]).to(dtype) for view in views]


def kornia_views(config: TPAConfig, size: int, dtype: torch.dtype) -> Views:
    """kornia.augmentation, a batch at a time: each clip has a draw of its own."""
    from kornia import augmentation as K

    jitter = config.brightness, config.contrast, config.saturation, config.hue
    normalise = K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))
    transforms = [
        [K.ColorJitter(*jitter, p=1.0), normalise],
        [normalise, K.RandomErasing(config.cutout_area, config.cutout_ratio, p=1.0)],
        [K.RandomHorizontalFlip(p=config.flip_probability), normalise],
        [K.RandomResizedCrop((size, size), config.crop_area, config.crop_ratio, p=1.0), normalise],
    ]
    views = [K.VideoSequential(*steps, data_format="BTCHW", same_on_frame=True) for steps in transforms]

    def run(clips: Tensor) -> list[Tensor]:
        floats = clips.float() / 255
        return [view(floats).to(dtype) for view in views]

    return run


PEERS: dict[str, Callable[[TPAConfig, int, torch.dtype], Views]] = {
    "torchvision v2": torchvision_views,
    "kornia": kornia_views,
}


def peer_call(name: str, clips: Tensor, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """A call that makes the views of clips, [B, 3, T, H, W], once more.

    Raises:
        ModuleNotFoundError: the peer is not installed.
    """
    views = PEERS[name](TPAConfig(), clips.shape[-1], dtype)
    return partial(views, clips.transpose(1, 2))
