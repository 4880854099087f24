"""One uint8 clip to V augmented, normalised views: flip and crop, colour, normalisation and hole in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdr_kernels._ops import DTYPES, check_shape, needs_gradient, register, select_impl

FILLS = ("mean", "black")
MAX_SIDE = 1 << 24  # of a frame: as many pixels as float32 counts


def taps(scale: Tensor, offset: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels that each output pixel lies between, and the second's weight, [F, size] each.

    The weights are NaN where a scale or an offset is not finite.

    Args:
        scale: of the output's pixel index, [F].
        offset: of the source's pixel index, [F].
        size: pixels of the axis.
    """
    index = torch.arange(size, device=scale.device, dtype=scale.dtype)
    finite = (scale.isfinite() & offset.isfinite())[:, None]
    position = torch.where(finite, scale[:, None] * index + offset[:, None], torch.zeros_like(index))
    position = position.clamp(0, size - 1)
    first = position.floor()
    weight = torch.where(finite, position - first, torch.full_like(index, torch.nan))
    return first.long(), (first + 1).clamp(max=size - 1).long(), weight


def sampled(clip: Tensor, sampling: Tensor) -> Tensor:
    """clip: uint8, [3, T, H, W]; sampling: [F, 4]; bilinear, [3, T, H, W] of sampling's dtype."""
    x = clip
    for axis, (scale, offset) in ((3, sampling[:, :2].unbind(1)), (2, sampling[:, 2:].unbind(1))):
        shape = [1, len(sampling), 1, 1]
        shape[axis] = clip.shape[axis]
        first, second, weight = (tensor.view(shape) for tensor in taps(scale, offset, clip.shape[axis]))
        near = x.gather(axis, first.expand(clip.shape))
        if weight.any():
            near, far = near.to(weight.dtype), x.gather(axis, second.expand(clip.shape))
            near = near + weight * (far - near)
        x = near
    return x.to(sampling.dtype)


def view_reference(
    clip: Tensor, sampling: Tensor, color: Tensor, hole: Tensor, mean: Tensor, std: Tensor, fill: str
) -> Tensor:
    """One view of one clip, [3, T, H, W] of sampling's dtype; a colour map that changes nothing is left out."""
    H, W = clip.shape[-2:]
    x = sampled(clip, sampling) / 255
    if (color != torch.eye(3, 4, device=color.device, dtype=color.dtype)).any():
        x = torch.einsum("fij,jfhw->ifhw", color[:, :, :3].expand(x.shape[1], -1, -1), x)
        x = (x + color[:, :, 3].T[..., None, None]).clamp(0, 1)
    x = (x - mean) / std
    left, right, top, bottom = hole[:, :, None, None].unbind(1)  # [F, 1, 1]
    row, column = torch.arange(H, device=clip.device)[:, None], torch.arange(W, device=clip.device)
    inside = (column >= left) & (column < right) & (row >= top) & (row < bottom)  # [F, H, W]
    return torch.where(inside, -mean / std if fill == "black" else torch.zeros_like(mean), x)


def clip_views_reference(
    clips: Tensor,
    sampling: Tensor,
    color: Tensor,
    hole: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    fill: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition, in float32 or ``dtype`` where that is wider, rounded once; view by view, to hold few at once."""
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(x, dtype=wide, device=clips.device).view(3, 1, 1, 1) for x in (mean, std))
    views = empty_views(clips, sampling, dtype)
    for b, clip in enumerate(clips):
        for v in range(sampling.shape[1]):
            maps = sampling[b, v].to(wide), color[b, v].to(wide), hole[b, v]
            views[b, v] = view_reference(clip, *maps, mean, std, fill)
    return views


def empty_views(clips: Tensor, sampling: Tensor, dtype: torch.dtype) -> Tensor:
    """An unwritten [B, V, 3, T, H, W], channels innermost in memory."""
    B, C, T, H, W = clips.shape
    return clips.new_empty((B, sampling.shape[1], T, H, W, C), dtype=dtype).movedim(-1, 2)


_fwd = register(
    "clip_views",
    "clip_views_fwd",
    "(Tensor clips, Tensor sampling, Tensor color, Tensor hole, float[] mean, float[] std, bool black, "
    "ScalarType dtype, str impl) -> Tensor",
    fake=lambda clips, sampling, color, hole, mean, std, black, dtype: empty_views(clips, sampling, dtype),
)


def clip_views(
    clips: Tensor,
    sampling: Tensor,
    color: Tensor,
    hole: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    fill: str = "mean",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """V views of each clip: sampled, colour mapped and clamped, normalised, and a hole filled, in this order.

    The maps may hold any value: what lies outside of a frame reads its border, and a sampling that is not finite gives
    NaN. No implementation has gradients.

    Args:
        clips: uint8 RGB, [B, 3, T, H, W], with T, H and W at least 1; any strides.
        sampling: float32, [B, V, F, 4], F is 1 or T: scale and offset in x, then in y. Output pixel i reads the source
            at pixel index ``scale * i + offset``, bilinear, clamped to the border; a flip is a negative scale.
        color: float32, [B, V, F, 3, 4]: affine map of RGB in 0..1, whose result is clamped to 0..1.
        hole: int32, [B, V, F, 4]: first and past-the-last column, then row, in pixels of the view; empty where they
            do not ascend.
        mean: of each colour, in 0..1: (x - mean) / std is returned.
        std: of each colour, above 0.
        fill: of the hole: "mean" (0 after normalisation) or "black".
        dtype: of the result: float32, float16 or bfloat16 (the reference takes float64 too).
        impl: "auto" (Triton on CUDA, else the reference), "reference" or "triton".

    Returns:
        [B, V, 3, T, H, W] of ``dtype``, computed in float32, channels innermost in memory.

    Raises:
        ValueError: a rank, shape, device, mean, standard deviation or fill is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: the named implementation cannot run here, or a gradient is asked for.
    """
    check_clips_and_maps(clips, sampling, color, hole)
    check_options(mean, std, fill, dtype)
    if reason := needs_gradient(sampling, color):
        raise RuntimeError(f"clip_views cannot run: {reason}")
    impl = select_impl(impl, clips, unfit="dtype must not be float64" if dtype == torch.float64 else "")
    if impl == "reference":
        return clip_views_reference(clips, sampling, color, hole, mean, std, fill, dtype)
    return _fwd(clips, sampling, color, hole, mean, std, fill == "black", dtype, impl)


def check_clips_and_maps(clips: Tensor, sampling: Tensor, color: Tensor, hole: Tensor) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    if clips.dtype != torch.uint8:
        raise TypeError(f"clips must be torch.uint8, got {clips.dtype}")
    if clips.ndim != 5 or clips.shape[1] != 3 or min(clips.shape[2:]) < 1 or max(clips.shape[3:]) > MAX_SIDE:
        raise ValueError(
            f"clips must be [B, 3, T, H, W] with T, H and W at least 1, H and W at most {MAX_SIDE}, "
            f"got {list(clips.shape)}"
        )
    B, T = clips.shape[0], clips.shape[2]
    if sampling.ndim != 4 or sampling.shape[1] < 1 or sampling.shape[2] not in (1, T):
        raise ValueError(
            f"sampling must be [B, V, F, 4] with V at least 1 and F 1 or T = {T}, got {list(sampling.shape)}"
        )
    V, F = sampling.shape[1:3]
    check_shape("sampling", sampling, (B, V, F, 4), "[B, V, F, 4]")
    check_shape("color", color, (B, V, F, 3, 4), "[B, V, F, 3, 4]")
    check_shape("hole", hole, (B, V, F, 4), "[B, V, F, 4]")
    maps = {"sampling": (sampling, torch.float32), "color": (color, torch.float32), "hole": (hole, torch.int32)}
    for name, (value, expected) in maps.items():
        if value.dtype != expected:
            raise TypeError(f"{name} must be {expected}, got {value.dtype}")
        if value.device != clips.device:
            raise ValueError(f"{name} must have clips' device, {clips.device}, got {value.device}")


def check_options(mean: Sequence[float], std: Sequence[float], fill: str, dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError that names the argument, the rule and what came."""
    if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
        raise ValueError(f"mean and std must be three numbers each, those of std above 0, got {mean} and {std}")
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}")
    if dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
