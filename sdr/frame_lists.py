"""Videos that are folders of pictures, behind the same surface as ``sdr.video.Video``."""

import functools
import hashlib
import io
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sdr.datasets import read_regular
from sdr.decoding import Limits
from sdr.errors import SDRError
from sdr.video import VideoInfo

FPS = 25
MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}  # what a file is, whatever its name says
MODES = ("RGB", "L", "P", "RGBA")  # of 8 bits; of RGBA the colours are taken as they are


class FrameList:
    """Open pictures of one video; a context manager. Made by ``open_frames``."""

    decoder = "frames"

    def __init__(self, path: str | os.PathLike, files: Sequence[Path], limits: Limits) -> None:
        self.path, self.limits = path, limits
        self.frames_read = 0
        self.damage = ""  # always: a picture that cannot be read whole is an error
        self._files = tuple(files)
        self._waited = 0.0
        self._states = [_state(file) for file in files]
        size = sum(state.st_size for state in self._states)
        if size > limits.max_bytes:
            raise SDRError(path, f"{size} bytes are over the limit of {limits.max_bytes}", "--limits.max_bytes")
        kind, width, height = self._read(0, _header)
        self.info = VideoInfo(width, height, FPS, len(files), len(files) / FPS, "frames", kind)

    def __enter__(self) -> "FrameList":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open between two pictures; here for the surface's sake."""

    @functools.cached_property
    def sha256(self) -> str:
        """Of the bytes of all files, in order."""
        digest = hashlib.sha256()
        for number in range(len(self._files)):
            digest.update(self._bytes(number))
        return digest.hexdigest()

    def frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """One pass over the pictures; may be called again.

        Yields:
            Seconds from the start, at 25 pictures a second, and the picture, [H, W, 3] uint8 RGB.

        Raises:
            SDRError: a file is missing, changed, truncated, damaged, no PNG or JPEG, over a limit, or of another size
                than the first. JPEG has no checksum: damage that leaves its structure whole is not seen.
        """
        for number in range(len(self._files)):
            picture = self._read(number, _picture)
            size = picture.shape[1::-1]
            if size != (self.info.width, self.info.height):
                first = (self.info.width, self.info.height)
                raise SDRError(self._files[number], f"picture changes from {first} to {size} pixels")
            yield number / FPS, picture
        self.frames_read = len(self._files)

    def _bytes(self, number: int) -> bytes:
        file, known = self._files[number], self._states[number]
        data = read_regular(file, self.limits.max_bytes)
        now = _state(file)
        if (now.st_size, now.st_mtime_ns) != (known.st_size, known.st_mtime_ns) or len(data) != known.st_size:
            raise SDRError(file, "changed while it was being read")
        return data

    def _read(self, number: int, read):
        """What ``read`` makes of a file, within the time that is left."""
        start = time.monotonic()
        out = read(self._files[number], self._bytes(number), self.limits)
        self._waited += time.monotonic() - start
        if self._waited > self.limits.seconds:
            raise SDRError(self.path, f"not decoded within {self.limits.seconds:g} s")
        return out


def open_frames(folder: str | os.PathLike, frames: Sequence[Path], *, limits: Limits | None = None) -> FrameList:
    """Opens the pictures of one video and reads the first one's header.

    They are decoded in this process: its only guard against a picture that asks for much is ``max_pixels``, which is
    checked before a picture is decoded.

    Args:
        folder: the video's name in messages.
        frames: paths of PNG or JPEG files, in order; told by their first bytes.
        limits: what they may cost together, by default ``Limits()``; ``memory`` is not used.

    Raises:
        SDRError: no frame, one that is missing or no regular file, not a picture, or over a limit.
    """
    limits = limits or Limits()
    if not frames:
        raise SDRError(folder, "has no frames")
    if len(frames) > limits.max_frames:
        raise SDRError(folder, f"{len(frames)} frames are over the limit of {limits.max_frames}", "--limits.max_frames")
    return FrameList(folder, [Path(frame) for frame in frames], limits)


def _state(file: Path) -> os.stat_result:
    """Of a regular file that is not empty; raises SDRError for anything else."""
    try:
        state = os.stat(file)
    except OSError as error:
        raise SDRError(file, error.strerror) from None
    except ValueError as error:  # a null character in the name
        raise SDRError(file, str(error)) from None
    if not stat.S_ISREG(state.st_mode):
        raise SDRError(file, "is not a regular file")
    if state.st_size == 0:
        raise SDRError(file, "empty file")
    return state


def _open(file: Path, data: bytes, limits: Limits):
    """Pillow's picture, its header read; and ``png`` or ``jpeg``. Raises SDRError, or what Pillow raises."""
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        raise SDRError(file, "is neither PNG nor JPEG")
    # the classes themselves: Image.open would load, and try, every format that Pillow knows
    image = {"png": PngImageFile, "jpeg": JpegImageFile}[kind](io.BytesIO(data))
    if image.width * image.height > limits.max_pixels:
        what = f"{image.width} x {image.height} pixels are over the limit of {limits.max_pixels}"
        raise SDRError(file, what, "--limits.max_pixels")
    if image.mode not in MODES:
        raise SDRError(file, f"has pixels of kind {image.mode}, not one of {', '.join(MODES)}")
    return image, kind


def _refusing(read):
    """Whatever Pillow raises becomes an SDRError that names the file: it was given a hostile one."""

    @functools.wraps(read)
    def guarded(file: Path, data: bytes, limits: Limits):
        try:
            return read(file, data, limits)
        except SDRError:
            raise
        except Exception as error:
            raise SDRError(file, f"cannot be decoded: {str(error)[:80]}") from error

    return guarded


@_refusing
def _header(file: Path, data: bytes, limits: Limits) -> tuple[str, int, int]:
    """Kind, width and height."""
    image, kind = _open(file, data, limits)
    return kind, image.width, image.height


@_refusing
def _picture(file: Path, data: bytes, limits: Limits) -> np.ndarray:
    """[H, W, 3] uint8 RGB."""
    image, kind = _open(file, data, limits)
    if kind == "png":
        image.verify()  # the checksums, which reading the pixels does not compare; it leaves the picture unusable
        image, _ = _open(file, data, limits)
    image.load()
    image.info.pop("transparency", None)  # as of RGBA: what is stored, on no ground
    return np.array(image.convert("RGB"))
