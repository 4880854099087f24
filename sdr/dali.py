"""TPA as a pipeline of NVIDIA's DALI, on a GPU or on the CPU's threads: the parameters and views of :mod:`sdr.tpa`.

A view runs only the operators of its method, and stays in floats between them: on a CPU it differs from the definition
by at most 0.01 of 255 steps where it is cropped, by 0.0002 elsewhere. Where a method is drawn per frame, DALI is given
single frames for samples: its ``flip`` takes no argument per frame of a clip, and its ``erase`` would ignore one in
silence.
"""

import re
from collections.abc import Generator, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdr.config import TPAConfig, check_count
from sdr.errors import SDRError
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD, ViewMaps

OLDEST = (2, 3)  # earlier releases have published vulnerabilities
INSTALL = "pip install 'sdr[dali-cu13]', or 'sdr[dali-cu12]' for CUDA 12"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_ARGUMENTS = {
    "color_jitter": 1,
    "cutout": 2,
    "flip": 1,
    "crop": 3,
    "none": 0,
}  # arrays that a method's operators are fed
MEAN, STD = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)
BLACK = (-MEAN / STD).tolist()

Batch = tuple[np.ndarray, ViewMaps]


def dali_views(
    batches: Iterable[Batch],
    config: TPAConfig,
    *,
    num_views: int,
    batch_size: int,
    num_frames: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prefetch: int = 2,
    threads: int = 2,
) -> Generator[Tensor, None, None]:
    """The views of each batch of clips, in order, made ahead of the caller.

    ``batches`` is advanced in the caller's thread, DALI works in its own. What ``batches`` raises reaches the caller as
    it was raised, after the views of the batches before it, and ends the views. The generator's ``close``, its end or
    its deletion frees DALI's threads.

    Args:
        batches: clips, uint8 RGB [B, T, H, W, 3] with B from 1 to ``batch_size``, and what ``draw_maps`` drew for them;
            both are copied, so that a source may write over its arrays.
        config: of the draws; view v runs the operators of ``methods[v % len(methods)]``.
        num_views: V.
        batch_size: the most clips of a batch.
        num_frames: T.
        device: of the views and of the work on them.
        dtype: of the views: float32, float16 or bfloat16.
        prefetch: batches in work at once, the returned one included; 1 makes nothing ahead.
        threads: of DALI on the CPU.

    Returns:
        An iterator of normalised views, [B, V, 3, T, H, W], channels last in memory. They are the caller's for good: on
        a GPU tensors of torch, on its current stream; on the CPU mostly buffers of DALI's, which it does not write to
        before the tensor is gone.

    Raises:
        SDRError: DALI is missing, too old or fails, or there is no GPU for ``device``.
        ValueError: an argument, a batch's shape, or maps that ask a view for more than its method.
        TypeError: a dtype is wrong.
    """
    for name, value in {"num_views": num_views, "batch_size": batch_size, "num_frames": num_frames}.items():
        check_count(name, value)
    check_count("prefetch", prefetch)
    check_count("threads", threads)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    dali = import_dali()
    number = device_number(torch.device(device))
    device = torch.device("cpu") if number is None else torch.device("cuda", number)
    methods = [config.methods[view % len(config.methods)] for view in range(num_views)]
    source = _Source(batches, methods, batch_size, num_frames, per_frame=bool(config.per_frame & set(methods)))
    settings = {"num_threads": threads, "prefetch_queue_depth": prefetch, "device_id": number}
    try:
        pipeline = build_pipeline(dali, source, config.cutout_fill, dtype, settings)
    except Exception as error:
        raise SDRError("DALI", f"cannot build the pipeline: {one_line(error)}") from error
    return _deliver(pipeline, source, device, dtype)


def import_dali() -> ModuleType:
    """nvidia.dali with the parts that are used here.

    Raises:
        SDRError: it is missing, cannot be loaded, or has known vulnerabilities.
    """
    try:
        import nvidia.dali.fn
        import nvidia.dali.math
        import nvidia.dali.types
    except ModuleNotFoundError as error:
        raise SDRError("DALI", "is not installed", INSTALL) from error
    except (ImportError, OSError) as error:
        raise SDRError("DALI", f"cannot be loaded: {one_line(error)}", INSTALL) from error
    version = getattr(nvidia.dali, "__version__", "of no version")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise SDRError("DALI", f"{version} is too old: {OLDEST[0]}.{OLDEST[1]} fixes its vulnerabilities", INSTALL)
    return nvidia.dali


def device_number(device: torch.device) -> int | None:
    """The GPU's number, None for the CPU."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        raise SDRError("DALI", f"cannot run on {device}: torch sees no such GPU", "use the CPU: device='cpu'")
    return torch.cuda.current_device() if device.index is None else device.index


def one_line(error: Exception) -> str:
    """The core of DALI's message of many lines: without the graph's traceback and the place in its C++."""
    text = str(error).split("encountered:")[-1].split("C++ context")[0]
    return " ".join(text.split()) or type(error).__name__


def build_pipeline(
    dali: ModuleType, source: "_Source", fill: str, dtype: torch.dtype, settings: dict[str, int | None]
) -> Any:
    """A pipeline whose one output holds a sample's views, [V, T, H, W, 3], or [V, H, W, 3] where samples are frames."""
    layout = "HWC" if source.per_frame else "FHWC"
    half = dtype == torch.float16
    finish = {"output_layout": layout, "dtype": dali.types.FLOAT16 if half else dali.types.FLOAT}
    count = 1 + sum(NUM_ARGUMENTS[method] for method in source.methods)
    pipeline = dali.Pipeline(batch_size=source.num_samples, **settings)
    with pipeline:
        clips, *rest = dali.fn.external_source(
            source=source.pull, num_outputs=count, layout=[layout] + [""] * (count - 1)
        )
        clips = clips if settings["device_id"] is None else clips.gpu()
        arguments = iter(rest)
        views = []
        for method in source.methods:
            taken = [next(arguments) for _ in range(NUM_ARGUMENTS[method])]
            views.append(view_graph(dali, method, clips, taken, fill, finish))
        pipeline.set_outputs(dali.fn.stack(*views))
    pipeline.build()
    return pipeline


def view_graph(
    dali: ModuleType, method: str, clips: Any, arguments: list[Any], fill: str, finish: dict[str, Any]
) -> Any:
    """The operators of one view, fed by ``method_arguments``; pixels are 0..255 up to the normalisation."""
    fn, x, mirror = dali.fn, clips, 0
    if method == "flip":
        (mirror,) = arguments
    elif method == "crop":
        start, end, size = arguments
        # without the antialiasing filter this is plain bilinear interpolation, and reads beyond the box where it must
        box = {"roi_start": start, "roi_end": end, "size": size}
        x = fn.resize(x, **box, antialias=False, dtype=dali.types.FLOAT)
    elif method == "color_jitter":
        x = dali.math.clamp(fn.coord_transform(x, MT=arguments[0]), 0.0, 255.0)
    x = fn.crop_mirror_normalize(x, mirror=mirror, mean=MEAN.tolist(), std=STD.tolist(), **finish)
    if method == "cutout":
        anchor, shape = arguments
        value = BLACK if fill == "black" else [0.0, 0.0, 0.0]
        x = fn.erase(x, anchor=anchor, shape=shape, axis_names="HW", fill_value=value)
    return x


class _Source:
    """Batches as DALI's inputs. DALI must not see an exception: it would raise it before the batches made ahead."""

    def __init__(
        self, batches: Iterable[Batch], methods: list[str], batch_size: int, num_frames: int, *, per_frame: bool
    ) -> None:
        self.methods, self.per_frame, self.num_frames = methods, per_frame, num_frames
        self.num_samples = batch_size * (num_frames if per_frame else 1)
        self.failure: Exception | None = None
        self._batches: Iterator[Batch] = iter(batches)
        self._batch_size = batch_size

    def pull(self) -> tuple[np.ndarray, ...]:
        """The samples and the operators' arguments of the next batch; StopIteration at the end or a failure."""
        try:
            clips, maps = next(self._batches)
            self._check(clips, maps)
            return self._inputs(clips, maps)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise StopIteration from None

    def take_failure(self) -> Exception | None:
        """The failure, kept no longer: it holds the frames that hold this source."""
        failure, self.failure = self.failure, None
        return failure

    def _check(self, clips: np.ndarray, maps: ViewMaps) -> None:
        B, T, V, F = len(clips), self.num_frames, len(self.methods), self.num_frames if self.per_frame else 1
        if clips.dtype != np.uint8:
            raise TypeError(f"clips must be uint8, got {clips.dtype}")
        if clips.ndim != 5 or (clips.shape[1], clips.shape[4]) != (T, 3) or not 1 <= B <= self._batch_size:
            raise ValueError(f"clips must be [1 to {self._batch_size}, {T}, H, W, 3], got {list(clips.shape)}")
        for name, shape in {"sampling": (B, V, F, 4), "color": (B, V, F, 3, 4), "hole": (B, V, F, 4)}.items():
            if getattr(maps, name).shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(getattr(maps, name).shape)}")

    def _inputs(self, clips: np.ndarray, maps: ViewMaps) -> tuple[np.ndarray, ...]:
        samples = clips.reshape(-1, *clips.shape[2:]) if self.per_frame else clips
        inputs = [samples]
        for v, method in enumerate(self.methods):
            # one row per sample, which is a clip or a frame
            view = ViewMaps(*(array[:, v].reshape(-1, *array.shape[3:]) for array in maps))
            check_method(view, v, method, clips.shape[3])
            inputs += method_arguments(method, view, clips.shape[2:4])
        return tuple(map(np.ascontiguousarray, inputs))


def check_method(view: ViewMaps, v: int, method: str, width: int) -> None:
    """Raise ValueError where the maps of view v, [N, ...], do what its method's operators cannot."""
    sampling, color, hole = view
    mirrored = (sampling == (-1, width - 1, 1, 0)).all(1) & (method == "flip")
    fits = {
        "sampling": method == "crop" or (mirrored | (sampling == (1, 0, 1, 0)).all(1)).all(),
        "color": method == "color_jitter" or (color == np.eye(3, 4)).all(),
        "hole": method == "cutout" or (hole[:, 0] >= hole[:, 1]).all(),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{name} of view {v} must change nothing, as the view's method is {method}")


def method_arguments(method: str, view: ViewMaps, size: tuple[int, int]) -> list[np.ndarray]:
    """What the operators of ``view_graph`` take for N samples of this height and width.

    Args:
        method: of the view.
        view: [N, 4], [N, 3, 4] and [N, 4].
        size: height and width of a frame.

    Raises:
        ValueError: a crop leaves the frame.
    """
    sampling, color, hole = view
    if method == "none":
        return []
    if method == "flip":
        return [(sampling[:, 0] < 0).astype(np.int32)]
    if method == "cutout":
        height, width = size
        left, right, top, bottom = hole.clip(0, (width, width, height, height)).T
        shape = np.stack([bottom - top, right - left], 1).clip(0)
        return [np.stack([top, left], 1).astype(np.float32), shape.astype(np.float32)]
    if method == "color_jitter":
        return [(color * np.array([1, 1, 1, 255])).astype(np.float32)]
    scale, offset = (sampling[:, axis].astype(np.float64) for axis in ([2, 0], [3, 1]))  # [N, 2], rows before columns
    start = offset + 0.5 - scale / 2  # the edge of pixel 0, where pixel centres lie at halves
    end = start + scale * size
    # DALI has crashed on boxes far outside and on NaN; what float32 rounds off is less than a tenth of a pixel
    low, high = np.minimum(start, end), np.maximum(start, end)
    if not ((low >= -0.1) & (high <= np.add(size, 0.1)) & (low < high)).all():
        raise ValueError(f"sampling must read a box inside of the frame, got {sampling.tolist()}")
    return [start.astype(np.float32), end.astype(np.float32), np.tile(np.float32(size), (len(scale), 1))]


def _deliver(pipeline: Any, source: _Source, device: torch.device, dtype: torch.dtype) -> Generator[Tensor, None, None]:
    """Each batch's views; then what ended the source, unless it was its end."""
    frames = source.num_frames if source.per_frame else None
    try:
        while True:
            try:
                (views,) = pipeline.run()
            except StopIteration:
                break
            except Exception as error:
                raise SDRError("DALI", one_line(error)) from error
            yield to_torch(views.as_tensor(), frames, device, dtype)
        if source.failure is not None:
            raise source.take_failure()
    finally:
        pipeline.__del__()  # now: the frames of an exception may hold the pipeline, and with it its threads, for long


def to_torch(views: Any, frames: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Finished views, [B, V, T, H, W, 3], or [B * T, V, H, W, 3] where ``frames`` is T, as [B, V, 3, T, H, W].

    A buffer of the CPU's is lent through DLPack, which keeps it from being written again. On a GPU that would make DALI
    synchronise the device when the tensor is freed, so it is copied, on torch's current stream.
    """
    if device.type == "cpu":
        x = torch.from_dlpack(views)
    else:
        from nvidia.dali.plugin.pytorch import feed_ndarray
        from nvidia.dali.plugin.pytorch.torch_utils import to_torch_type

        x = torch.empty(views.shape(), dtype=to_torch_type[views.dtype], device=device)
        feed_ndarray(views, x, cuda_stream=torch.cuda.current_stream(device))
    if frames is not None:
        x = x.unflatten(0, (-1, frames)).transpose(1, 2)
    return x.to(dtype).contiguous().movedim(-1, 2)
