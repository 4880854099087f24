"""Temporally-Preserved Augmentation (TPA): parameters drawn once per clip and view, used for all its frames.

The draw is a pure function of (seed, epoch, sample, view) through a counter-based generator, so that every backend,
any number of workers and a resumed run see the same parameters.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdr.config import TPAConfig

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
        else:
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


def apply_view(clip: Tensor, parameters: ViewParameters, *, fill: str = "mean") -> Tensor:
    """One augmented, normalised view: geometric, photometric, normalise, cutout.

    Args:
        clip: uint8 RGB, [3, T, H, W].
        parameters: of its T frames.
        fill: of the hole: ``mean`` (0 after normalisation) or ``black``.

    Returns:
        float32, [3, T, H, W].
    """
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[:2] != (3, len(parameters.flip)):
        raise ValueError(f"clip must be uint8 [3, {len(parameters.flip)}, H, W], got {clip.dtype} {list(clip.shape)}")
    x = clip.float().transpose(0, 1) / 255  # [T, 3, H, W]
    flip, crop, color, cutout = (
        torch.from_numpy(p).to(x.device)
        for p in (parameters.flip, parameters.crop, parameters.color, parameters.cutout)
    )
    if flip.any():
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    if (parameters.crop != FULL_FRAME).any():
        x = F.grid_sample(x, crop_grid(crop, *x.shape[-2:]), padding_mode="border", align_corners=False)
    if (parameters.color != np.eye(3, 4)).any():
        x = torch.einsum("tij,tjhw->tihw", color[:, :, :3].float(), x) + color[:, :, 3].float()[..., None, None]
        x = x.clamp(0, 1)
    x = standardise(x.transpose(0, 1))
    hole = cutout_mask(cutout, *x.shape[-2:])
    black = standardise(torch.zeros(3, 1, 1, 1, device=x.device))
    return torch.where(hole, black if fill == "black" else torch.zeros_like(black), x)


def crop_grid(crop: Tensor, height: int, width: int) -> Tensor:
    """crop: [T, 4] shares of the frame; to grid_sample's grid, [T, H, W, 2] float32."""
    y, x = (((torch.arange(n, device=crop.device, dtype=crop.dtype) + 0.5) / n) for n in (height, width))
    left, top, w, h = crop[:, :, None].unbind(1)  # [T, 1]
    grid_x = (2 * (left + x * w) - 1)[:, None, :].expand(-1, height, -1)
    grid_y = (2 * (top + y * h) - 1)[:, :, None].expand(-1, -1, width)
    return torch.stack([grid_x, grid_y], -1).float()


def cutout_mask(cutout: Tensor, height: int, width: int) -> Tensor:
    """cutout: [T, 4] shares of the frame; to a mask of the pixels whose centre lies in the hole, [T, H, W]."""
    y, x = (((torch.arange(n, device=cutout.device, dtype=cutout.dtype) + 0.5) / n) for n in (height, width))
    left, top, w, h = cutout[:, :, None].unbind(1)  # [T, 1]
    inside_x, inside_y = (x >= left) & (x < left + w), (y >= top) & (y < top + h)
    return inside_y[:, :, None] & inside_x[:, None, :]


def augment(clips: Tensor, config: TPAConfig, *, seed: int, epoch: int, samples: list[int], num_views: int) -> Tensor:
    """V views of each clip.

    Args:
        clips: uint8, [B, 3, T, H, W].
        config: methods and strengths.
        seed: of the run.
        epoch: of the run.
        samples: B numbers that name the clips; with ``seed``, ``epoch`` and the view they key the draw.
        num_views: V.

    Returns:
        float32, normalised, [B, V, 3, T, H, W], channels last in memory.
    """
    if len(samples) != len(clips):
        raise ValueError(f"samples must name {len(clips)} clips, got {len(samples)}")
    B, C, T, H, W = clips.shape
    # channels_last_3d in memory: the layout in which (k,1,1) convolutions are fast, on the CPU more than twice
    views = torch.empty(B, num_views, T, H, W, C, device=clips.device).permute(0, 1, 5, 2, 3, 4)
    for b, (clip, sample) in enumerate(zip(clips, samples, strict=True)):
        for v in range(num_views):
            parameters = draw_view(config, seed=seed, epoch=epoch, sample=sample, view=v, num_frames=T)
            views[b, v] = apply_view(clip, parameters, fill=config.cutout_fill)
    return views
