"""Matched-marginals real and fake talking-face videos in a dataset's layout, for tests and the demo.

Every video, real or fake, passes through the same perturbation of the inner face: a shift, a lighting ripple and a
blend with another face, each with one parameter from a fixed distribution. A real video draws the parameters once; a
fake one draws some of them anew for every frame. So one frame of a fake is distributed exactly like one frame of a real
video and only time tells them apart. The codec keeps it so: every frame is coded by itself.

A score on these videos shows that a pipeline works and nothing about real deepfakes.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sdr.datasets import SPLITS, SYNTH_METHODS, SYNTH_SETTINGS
from sdr.files import claim_folder, make_folder, write_atomic
from sdr.portraits import CARPHONE_FRAMES, CLEAR_FACES, PATCH, Base, Role, base_video, grid, invert, smooth, transform
from sdr.synth_layouts import DEFAULT_CRF, LAYOUTS, Film, frame_files, id_pairs, plan_films, split_files, video_list

VARYING = {  # which parameters of a forgery are drawn anew for every frame
    "ShiftJitter": ("shift",),
    "GainFlicker": ("gain",),
    "BlendFlicker": ("blend",),
    "FullJitter": ("shift", "gain", "blend"),
}
MAX_IDENTITIES = len(CLEAR_FACES) + 2  # with carphone and astronaut
MIN_IDENTITIES = 8  # two ids in each split, and the talking face's three windows never paired with each other
VAL_TEST_SHARES = (0.15, 0.25)  # the rest is trained on
MASK_CRF = 10  # of the masks' videos, whose smooth edges need few bits
FORMAT = 1  # part of a folder's settings: raise it when the same seed gives other videos

DETAIL = 10.0  # wavelength below which the face's texture is what the shift and the blend act on
SHIFT_RADIUS = 1.1
GAIN = 0.06
RIPPLE = 8.0  # wavelength of the lighting ripple
BLEND = (0.0, 1.1)


class Perturbation(NamedTuple):
    """Parameters of the inner face, one row per frame."""

    shift: np.ndarray  # [T] direction of a displacement by SHIFT_RADIUS; uniform on the circle
    gain: np.ndarray  # [T] phase of the lighting ripple; uniform on the circle
    blend: np.ndarray  # [T] mixing angle with the donor's face, uniform in BLEND


def draw_perturbation(method: str | None, frames: int, rng: np.random.Generator) -> Perturbation:
    """Parameters of a real video (``method=None``: constant) or of a forgery (some drawn anew for every frame).

    Shift and gain are angles and the blend is a rotation between two textures of equal energy: whatever is drawn, the
    inner face keeps its mean and nearly its variance, so averages over space say little about the parameters. All act
    on wavelengths of a few pixels, so that maxima over space say little either.
    """
    if method is not None and method not in VARYING:
        raise ValueError(f"method must be None or one of {SYNTH_METHODS}, got {method!r}")
    draws = rng.random((3, frames))
    for row, name in zip(draws, Perturbation._fields, strict=True):
        if method is None or name not in VARYING[method]:
            row[:] = row[0]
    return Perturbation(2 * np.pi * draws[0], 2 * np.pi * draws[1], BLEND[0] + (BLEND[1] - BLEND[0]) * draws[2])


# --- the perturbation ------------------------------------------------------------------------------------------------


def _luma(frames: np.ndarray) -> np.ndarray:
    return frames @ np.array([0.299, 0.587, 0.114], np.float32)


def _patches(base: Base) -> np.ndarray:
    """The luminance of the inner face, head motion removed, [T, PATCH, PATCH] float32."""
    return np.stack([transform(f, m, PATCH) for f, m in zip(_luma(base.frames), base.poses, strict=True)])


def inner_mask() -> np.ndarray:
    """Weight of the perturbation: 1 on eyes, nose and mouth, smoothly 0 at the cheeks, [PATCH, PATCH] float32."""
    x, y = grid(PATCH)
    return 1 - smooth(0.7, 0.6, np.hypot(x / 26, y / 29))


def _detail(patches: np.ndarray) -> np.ndarray:
    """The texture of wavelengths below DETAIL, [..., PATCH, PATCH]."""
    squared = np.fft.rfftfreq(PATCH) ** 2 + np.fft.fftfreq(PATCH)[:, None] ** 2
    return np.fft.irfft2(np.fft.rfft2(patches) * (1 - np.exp(-squared * DETAIL**2)), (PATCH, PATCH))


def perturb(patches: np.ndarray, donor: np.ndarray, parameters: Perturbation) -> np.ndarray:
    """The inner face's detail, mixed with the donor's and shifted, and the lighting ripple.

    Args:
        patches: luminance of the inner face, [T, PATCH, PATCH].
        donor: luminance of the other face, [PATCH, PATCH].
        parameters: one row per frame.

    Returns:
        What to add to ``patches``, [T, PATCH, PATCH] float32; 0 outside the mask.
    """
    mask = inner_mask()
    weight = mask / mask.sum()

    def moment(a: np.ndarray) -> np.ndarray:
        return (weight * a).sum((-2, -1), keepdims=True)

    face, other = _detail(patches), _detail(donor)
    # orthogonal to the face and of its energy: a rotation between the two then changes no variance
    other = other - face * moment(face * other) / moment(face * face)
    other = other * np.sqrt(moment(face * face) / moment(other * other))
    angle = parameters.blend[:, None, None]
    mixed = np.cos(angle) * face + np.sin(angle) * other
    # a shift by the Fourier theorem is exact: no fraction of a pixel is sharper than another
    fx, fy = np.fft.rfftfreq(PATCH), np.fft.fftfreq(PATCH)[:, None]
    dx, dy = (SHIFT_RADIUS * f(parameters.shift)[:, None, None] for f in (np.cos, np.sin))
    shifted = np.fft.irfft2(np.fft.rfft2(mixed) * np.exp(-2j * np.pi * (fx * dx + fy * dy)), (PATCH, PATCH))
    x, y = grid(PATCH)
    ripple = np.cos(2 * np.pi * (0.8 * x + 0.6 * y) / RIPPLE + parameters.gain[:, None, None])
    return (mask * (shifted - face + GAIN * moment(patches) * ripple)).astype(np.float32)


def mask_frames(base: Base) -> Iterator[np.ndarray]:
    """Where ``base`` is perturbed: the inner face's mask at the head's pose in each frame, [S, S] uint8, 255 = all."""
    size, mask = base.frames.shape[1], inner_mask().astype(np.float32)
    for inverse in invert(base.poses):
        yield np.clip(255 * transform(mask, inverse, size) + 0.5, 0, 255).astype(np.uint8)


def _apply(base: Base, delta: np.ndarray) -> Iterator[np.ndarray]:
    """The base's frames with ``delta`` [T, PATCH, PATCH] added to the inner face, each [S, S, 3] uint8."""
    size = base.frames.shape[1]
    for frame, inverse, change in zip(base.frames, invert(base.poses), delta, strict=True):
        out = frame + transform(change, inverse, size)[..., None]
        yield np.clip(out + 0.5, 0, 255).astype(np.uint8)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What ``synthesize`` wrote: the folder, the number of real and fake videos, and the ids of each split."""

    out: Path
    real: int
    fake: int
    splits: dict[str, list[str]]


def encode(frames: Sequence[np.ndarray], *, fps: int, crf: int) -> bytes:
    """An mp4 (H.264, every frame coded by itself) of uint8 frames, [H, W, 3] or [H, W]; the same bytes every time."""
    import av

    # A predicted frame's quality depends on how much moved: coded so, a single frame would tell a forgery.
    # qcomp=1 and ipratio=1 also take the rate control's memory of earlier frames away.
    options = {"crf": str(crf), "preset": "veryfast", "x264-params": "keyint=1:scenecut=0:mbtree=0:qcomp=1:ipratio=1"}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        grey = frames[0].ndim == 2
        stream.pix_fmt = "gray" if grey else "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray" if grey else "rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _cast(identities: int, frames: int, seed: int) -> list[Role]:
    """Who plays each video id. Every window of the talking face is an id of one identity, and it is trained on."""
    windows = 3 if frames <= CARPHONE_FRAMES // 3 else 1  # odd, so that identities and ids are both even
    chosen = np.random.default_rng([seed, 0]).permutation(CLEAR_FACES)[: identities - 2]
    names = ["carphone"] * windows + [f"lfw{i}" for i in chosen] + ["astronaut"]
    starts = [frames * window for window in range(windows)] + [0] * (identities - 1)
    val, test = (2 * round(len(names) * share / 2) for share in VAL_TEST_SHARES)
    splits = ["train"] * (len(names) - val - test) + ["val"] * val + ["test"] * test
    return [Role(*role) for role in zip(names, starts, splits, strict=True)]


def _check(settings: dict, workers: int | None) -> None:
    """Raise ValueError for the first argument of ``synthesize`` that breaks its rule."""
    crf, methods, layout = settings["crf"], settings["methods"], settings["layout"]
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    even = {"identities": (MIN_IDENTITIES, MAX_IDENTITIES), "size": (64, 1024)}
    for name, (low, high) in {**even, "frames": (1, CARPHONE_FRAMES), "fps": (1, 120)}.items():
        value = settings[name]
        if not low <= value <= high or (name in even and value % 2):
            raise ValueError(f"{name} must be {'even and ' if name in even else ''}in {low}..{high}, got {value}")
    if not crf or len(set(crf)) != len(crf) or not all(0 <= c <= 51 for c in crf):
        raise ValueError(f"crf must be different values in 0..51, got {crf}")
    if layout != "ffpp" and len(crf) > 1:
        raise ValueError(f"crf must be one value, {layout} has no folders of compression, got {crf}")
    if not methods or len(set(methods)) != len(methods) or not set(methods) <= set(SYNTH_METHODS):
        raise ValueError(f"methods must be different ones of {SYNTH_METHODS}, got {methods}")
    if settings["seed"] < 0:
        raise ValueError(f"seed must not be negative, got {settings['seed']}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def _make(films: Sequence[Film], *, roles: Sequence[Role], settings: dict) -> list[tuple[str, bytes]]:
    """The real video of one id and its forgeries with the donor's face: path and content of each file."""
    frames, size, fps, seed, layout = (settings[key] for key in ("frames", "size", "fps", "seed", "layout"))
    number, donor_number = films[0].number, films[0].donor
    base = base_video(roles[number], frames, size, fps, np.random.default_rng([seed, 1, number]))
    # the donor's face as in the first frame of its own video; a real video has a donor, too
    donor = _patches(base_video(roles[donor_number], 1, size, fps, np.random.default_rng([seed, 1, donor_number])))[0]
    patches = _patches(base)
    files = {}
    for forgery, same in groupby(films, key=lambda film: film.forgery):
        stream = 0 if forgery is None else 1 + SYNTH_METHODS.index(forgery)  # independent of which methods were chosen
        parameters = draw_perturbation(forgery, frames, np.random.default_rng([seed, 2, number, stream]))
        video = list(_apply(base, perturb(patches, donor, parameters)))
        for film in same:
            if layout == "deepfakebench":
                files |= frame_files(film.path, video)
            else:
                files[film.path] = encode(video, fps=fps, crf=film.crf)
    masks = {film.mask for film in films if film.mask}
    if masks:
        files |= dict.fromkeys(sorted(masks), encode(list(mask_frames(base)), fps=fps, crf=MASK_CRF))
    return list(files.items())


def synthesize(
    out: str | os.PathLike,
    *,
    layout: Literal["ffpp", "celebdf", "dfdc", "deepfakebench"] = "ffpp",
    identities: int = 40,
    frames: int = 40,
    size: int = 160,
    fps: int = 25,
    crf: Sequence[int] | None = None,
    methods: Sequence[str] = SYNTH_METHODS,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write matched-marginals videos to ``out``: a dataset's folders and split files, and ``videos.csv``.

    Each identity gives one real video (the talking face gives three if they are short enough) and, per method, one fake
    with the face of its partner in the same split. The same arguments write the same bytes, and the same videos in
    every layout. Celeb-DF-v2 has no validation split: there those videos are trained on.

    Args:
        out: a new or empty folder, or one that the same settings wrote; anything else raises SDRError.
        layout: ffpp (FaceForensics++, with videos of the forgeries' masks), celebdf (Celeb-DF-v2), dfdc, or
            deepfakebench (PNG frames and their JSON).
        identities: even number of source faces, 8..64.
        frames: frames of each video.
        size: width and height in pixels, even.
        crf: H.264 quality factors, 23 and 40 by default; each becomes a folder ``c23``, ``c40``... The other layouts
            have no such folders and take one, 23 by default; deepfakebench's frames are not coded, whatever it is.
        methods: forgery types: ShiftJitter, GainFlicker, BlendFlicker, FullJitter.
        workers: threads; None takes the machine's cores.
        progress: called with (videos written, videos in all).
    """
    out = Path(out)
    settings = {"format": FORMAT, "layout": layout, "identities": identities, "frames": frames, "size": size}
    crf = DEFAULT_CRF.get(layout, ()) if crf is None else crf
    settings |= {"fps": fps, "crf": list(crf), "methods": list(methods), "seed": seed}
    _check(settings, workers)
    roles = _cast(identities, frames, seed)
    pairs = id_pairs(roles)
    films = plan_films(layout, roles, pairs, settings)
    claim_folder(out, SYNTH_SETTINGS, settings, command="sdr synth")
    jobs = [[film for film in films if film.number == number] for number in range(len(roles))]
    make = partial(_make, roles=roles, settings=settings)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        for done, files in enumerate(pool.map(make, jobs), 1):
            for path, data in files:
                make_folder((out / path).parent)
                write_atomic(out / path, data)
            progress(done * len(films) // len(roles), len(films))
    finally:
        pool.shutdown(cancel_futures=True)
    for path, text in split_files(layout, films, pairs, frames).items():
        make_folder((out / path).parent)
        write_atomic(out / path, text)
    write_atomic(out / "videos.csv", video_list(films))
    homes = {film.number: film.split for film in films}
    splits = {s: [f"{i:03d}" for i in range(len(roles)) if homes[i] == s] for s in SPLITS}
    fake = sum(film.label for film in films)
    return Summary(out, len(films) - fake, fake, splits)
