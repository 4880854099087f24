"""Temporally-Preserved Augmentation (TPA): parameters drawn once per clip and view, used for all its frames.

The draw is a pure function of (seed, epoch, sample, view) through a counter-based generator, so that every backend,
any number of workers and a resumed run see the same parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdr.config import TPAConfig
from sdr_kernels import clip_views

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = np.array([0.299, 0.587, 0.114])  # BT.601, as every colour-jitter implementation uses
# RGB to YIQ: hue is a rotation of (I, Q), which is linear, so that a whole jitter is one 3x4 matrix
RGB_TO_YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
FULL_FRAME = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class ViewParameters:
    """One view's augmentation for each of its T frames; rows are equal unless the method is drawn per frame.

    Args:
        flip: [T] bool.
        crop: [T, 4], left, top, width, height as shares of the frame.
        color: [T, 3, 4], affine matrix on RGB in 0..1.
        cutout: [T, 4], left, top, width, height as shares of the frame; width 0 means no hole.
    """

    flip: np.ndarray
    crop: np.ndarray
    color: np.ndarray
    cutout: np.ndarray


class ViewMaps(NamedTuple):
    """What is done to V views of B clips, ready for a kernel; F is T where a method is drawn per frame, else 1.

    A view is flipped, cropped, colour mapped and clamped, normalised and given its hole, in this order.

    Attributes:
        sampling: [B, V, F, 4] float32, scale and offset in x, then in y: output pixel i reads the source at pixel index
            ``scale * i + offset``, bilinear, clamped to the border; a flip is a negative scale.
        color: [B, V, F, 3, 4] float32, affine map of RGB in 0..1, whose result is clamped to 0..1.
        hole: [B, V, F, 4] int32, first and past-the-last column, then row, in pixels; empty where right <= left.
    """

    sampling: np.ndarray
    color: np.ndarray
    hole: np.ndarray


def draw_view(config: TPAConfig, *, seed: int, epoch: int, sample: int, view: int, num_frames: int) -> ViewParameters:
    """Draw the parameters of one view of one sample; view v uses method ``v % len(methods)``."""
    method = config.methods[view % len(config.methods)]
    draws = num_frames if method in config.per_frame else 1
    mask = 2**64 - 1  # Philox takes unsigned words
    generator = np.random.Generator(
        np.random.Philox(key=[seed & mask, epoch & mask], counter=[0, 0, view & mask, sample & mask])
    )
    flip = np.zeros(draws, bool)
    crop = np.tile(FULL_FRAME, (draws, 1))
    color = np.tile(np.eye(3, 4), (draws, 1, 1))
    cutout = np.zeros((draws, 4))
    for i in range(draws):
        if method == "flip":
            flip[i] = generator.random() < config.flip_probability
        elif method == "crop":
            crop[i] = draw_box(generator, config.crop_area, config.crop_ratio)
        elif method == "cutout":
            cutout[i] = draw_box(generator, config.cutout_area, config.cutout_ratio)
        elif method == "color_jitter":
            color[i] = draw_color(generator, config)
    repeat = num_frames // draws
    return ViewParameters(*(np.repeat(x, repeat, 0) for x in (flip, crop, color, cutout)))


def draw_box(
    generator: np.random.Generator, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[float, float, float, float]:
    """A box inside the unit square: area uniform, ratio log-uniform, position uniform.

    A ratio that does not fit at the drawn area is clipped to the widest or tallest box of that area.
    """
    share = generator.uniform(*area)
    aspect = np.clip(np.exp(generator.uniform(*np.log(ratio))), share, 1 / share)
    width, height = np.sqrt(share * aspect), np.sqrt(share / aspect)
    return generator.uniform(0, 1 - width), generator.uniform(0, 1 - height), width, height


def draw_color(generator: np.random.Generator, config: TPAConfig) -> np.ndarray:
    """Brightness, contrast (about mid-grey), saturation and hue in random order, as one [3, 4] matrix."""
    brightness, contrast, saturation = (
        generator.uniform(1 - s, 1 + s) for s in (config.brightness, config.contrast, config.saturation)
    )
    angle = 2 * np.pi * generator.uniform(-config.hue, config.hue)
    rotation = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    steps = [
        affine(brightness * np.eye(3)),
        affine(contrast * np.eye(3), 0.5 * (1 - contrast)),
        affine(saturation * np.eye(3) + (1 - saturation) * LUMA),
        affine(np.linalg.solve(RGB_TO_YIQ, rotation @ RGB_TO_YIQ)),
    ]
    matrix = np.eye(4)
    for step in generator.permutation(4):
        matrix = steps[step] @ matrix
    return matrix[:3]


def affine(linear: np.ndarray, offset: float = 0.0) -> np.ndarray:
    """[4, 4] homogeneous matrix of x -> linear x + offset."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, offset
    return matrix


def normalise(clip: Tensor) -> Tensor:
    """uint8 RGB, [..., 3, T, H, W], to float32 with ImageNet statistics; floats are returned as they are."""
    if clip.is_floating_point():
        return clip
    if clip.dtype != torch.uint8:
        raise TypeError(f"clip must be uint8 or floating, got {clip.dtype}")
    return standardise(clip.float() / 255)


def standardise(clip: Tensor) -> Tensor:
    """RGB in 0..1, [..., 3, T, H, W], minus ImageNet's mean, over its standard deviation."""
    mean, std = (torch.tensor(x, device=clip.device).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (clip - mean) / std


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, without waiting for what a GPU is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def draw_maps(
    config: TPAConfig,
    *,
    seed: int,
    epoch: int,
    samples: Sequence[int],
    num_views: int,
    num_frames: int,
    size: tuple[int, int],
) -> ViewMaps:
    """The draws of ``num_views`` views of these samples, each by ``draw_view``, in pixels of frames of this size.

    Args:
        config: methods and strengths.
        seed: of the run.
        epoch: of the run.
        samples: B numbers that name the clips.
        num_views: V.
        num_frames: T.
        size: height and width in pixels.
    """
    methods = {config.methods[view % len(config.methods)] for view in range(num_views)}
    draws = num_frames if methods & set(config.per_frame) else 1
    shape = len(samples), num_views, draws
    maps = ViewMaps(
        np.empty((*shape, 4), np.float32), np.empty((*shape, 3, 4), np.float32), np.empty((*shape, 4), np.int32)
    )
    for b, sample in enumerate(samples):
        for v in range(num_views):
            drawn = draw_view(config, seed=seed, epoch=epoch, sample=sample, view=v, num_frames=draws)
            for array, of_view in zip(maps, view_maps(drawn, size), strict=True):
                array[b, v] = of_view
    return maps


def view_maps(drawn: ViewParameters, size: tuple[int, int]) -> ViewMaps:
    """One view's maps in float64, of the drawn shares: [F, 4], [F, 3, 4] and [F, 4]."""
    height, width = size
    left, top, share_x, share_y = drawn.crop.T
    offset_x, offset_y = width * left + (share_x - 1) / 2, height * top + (share_y - 1) / 2  # of pixel centres
    scale_x = np.where(drawn.flip, -share_x, share_x)
    offset_x = np.where(drawn.flip, width - 1 - offset_x, offset_x)
    hole = [*pixels_between(*drawn.cutout.T[::2], width), *pixels_between(*drawn.cutout.T[1::2], height)]
    return ViewMaps(np.stack([scale_x, offset_x, share_y, offset_y], 1), drawn.color, np.stack(hole, 1))


def pixels_between(start: np.ndarray, length: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last of the pixels whose centre lies in [start, start + length), shares of an axis."""
    centres = (np.arange(size) + 0.5) / size
    return np.searchsorted(centres, start), np.searchsorted(centres, start + length)


def augment(
    clips: Tensor,
    config: TPAConfig,
    *,
    seed: int,
    epoch: int,
    samples: Sequence[int],
    num_views: int,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """V views of each clip.

    Args:
        clips: uint8, [B, 3, T, H, W]; any strides.
        config: methods and strengths.
        seed: of the run.
        epoch: of the run.
        samples: B numbers that name the clips; with ``seed``, ``epoch`` and the view they key the draw.
        num_views: V.
        dtype: of the result.
        impl: of ``sdr_kernels.clip_views``.

    Returns:
        Normalised, [B, V, 3, T, H, W] of ``dtype``, channels last in memory: the layout in which (k,1,1) convolutions
        are fast, on the CPU more than twice.
    """
    if clips.ndim != 5:
        raise ValueError(f"clips must be [B, 3, T, H, W], got {list(clips.shape)}")
    if len(samples) != len(clips):
        raise ValueError(f"samples must name {len(clips)} clips, got {len(samples)}")
    T, H, W = clips.shape[2:]
    key = {"seed": seed, "epoch": epoch, "samples": samples, "num_views": num_views}
    drawn = draw_maps(config, **key, num_frames=T, size=(H, W))
    maps = (send(torch.from_numpy(array), clips.device) for array in drawn)
    statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return clip_views(clips, *maps, **statistics, fill=config.cutout_fill, dtype=dtype, impl=impl)
