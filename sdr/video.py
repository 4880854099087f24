"""A video file to frames, in a decoding process with limits; clips out of a track.

The file is opened once, here. Its first bytes choose the demuxer, never its name; the decoder gets the descriptor.
"""

import functools
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sdr.containers import bytes_missing, demuxer_of
from sdr.decoding import DECODERS, MIB, DecoderName, Limits, Worker, why_no_dali
from sdr.errors import SDRError, escape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoInfo:
    """What the file declares; width and height as displayed. fps, frames_declared and duration (s) are 0 if unknown."""

    width: int
    height: int
    fps: float
    frames_declared: int
    duration: float
    container: str
    codec: str


class Video:
    """An open video file; a context manager. Made by ``open_video``. ``decoder``: which one runs, "pyav" or "dali"."""

    def __init__(self, path: str | bytes | os.PathLike, fd: int, limits: Limits, decoder: DecoderName) -> None:
        self.path, self.limits = path, limits
        self.frames_read = 0
        self.damage = ""
        self._fd = fd
        self._identity = _identity(fd)
        self._waited = 0.0
        self._workers: list[Worker] = []
        self._demuxer = demuxer_of(path, fd)
        self._bytes_missing = bytes_missing(fd, self._demuxer)
        self.decoder = "dali"
        self._ready: Worker | None = None if decoder == "pyav" else self._try_dali(required=decoder == "dali")
        if self._ready is None:
            self.decoder = "pyav"
            self._ready = self._start()
        self.info = VideoInfo(**self._ready.info)

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends every decoding process of this video and closes the file. May be called twice."""
        self._ready = None
        while self._workers:
            self._end(self._workers[-1])
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file's bytes."""
        digest, offset = hashlib.sha256(), 0
        while chunk := os.pread(self._open_fd(), MIB, offset):
            digest.update(chunk)
            offset += len(chunk)
        return digest.hexdigest()

    def frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """One pass over the video; may be called again.

        Yields:
            Seconds from the start (never decreasing) and the displayed picture, [H, W, 3] uint8 RGB.

        Raises:
            SDRError: over a limit, out of time or memory, the decoder died, or the picture's size changes. Damage is no
                error: it stands in ``damage`` and ``frames_read`` once the pass is complete.
        """
        worker, self._ready = self._ready or self._start(), None
        shape = (self.info.height, self.info.width, 3)
        read = 0
        try:
            while (item := worker.next_frame()) is not None:
                if item[1].shape != shape:
                    raise SDRError(self.path, f"picture changes from {shape[1::-1]} to {item[1].shape[1::-1]} pixels")
                read += 1
                yield item
            self.frames_read, self.damage = read, self._damage(read, worker)
        finally:
            self._end(worker)

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise ValueError(f"the video is closed: {escape(self.path)}")
        return self._fd

    def _try_dali(self, *, required: bool) -> Worker | None:
        """A worker that has read the header; without one None and a line in the log, or SDRError if required."""
        missing = why_no_dali(needs_gpu=not required)
        if missing and not required:
            _say_once(missing)
            return None
        try:
            if missing or self._bytes_missing:  # NVDEC would hide what is missing
                damage = f"damaged: the file ends {self._bytes_missing} bytes too early"
                reason = f"not decoded by DALI: {missing or damage}"
                raise SDRError(self.path, reason, "--decoder pyav", again=bool(missing))
            worker = self._start()
        except SDRError as error:
            if required:
                raise
            logger.warning("%s is decoded by PyAV: %s", escape(self.path), error.what)
            return None
        logger.info("%s is decoded by DALI", escape(self.path))
        return worker

    def _start(self) -> Worker:
        if _identity(self._open_fd()) != self._identity:
            raise SDRError(self.path, "changed while it was being read", again=True)
        worker = Worker(self.path, self._fd, self._demuxer, self.limits, self._waited, self.decoder)
        self._workers.append(worker)
        try:
            worker.read_header()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            self._waited = max(self._waited, worker.waited)
            worker.close()

    def _damage(self, read: int, worker: Worker) -> str:
        """One phrase on everything that could not be read, "" if all could."""
        declared, end = self.info.frames_declared, worker.end
        parts = [
            (read < declared, f"{read} of {declared} declared frames could be read"),
            (self._bytes_missing, f"the file ends {self._bytes_missing} bytes too early"),
            (end["stopped"], f"reading stopped after {read} frames: {end['stopped']}"),
            (end["corrupt"], f"damaged frames: {end['corrupt']} of {read}"),
            (end["failed"], f"packets that could not be decoded: {end['failed']}"),
        ]
        log = worker.log(since=worker.header["log_bytes"])
        parts.append((log, f"errors the decoder reported: {len(log)}, the last: {log[-1]}" if log else ""))
        return "; ".join(escape(text) for happened, text in parts if happened)


def open_video(
    path: str | bytes | os.PathLike, *, limits: Limits | None = None, decoder: DecoderName = "pyav"
) -> Video:
    """Opens a video file and reads its header and first frame in a decoding process.

    ``decoder="dali"`` takes a GPU's video decoder (NVDEC), without a GPU DALI's own for VP8, VP9 and MJPEG, and refuses
    each file that DALI would show differently: colours other than BT.601, pixels that are not square, fields, damage.
    Its frames are PyAV's but for the rounding of colours. Each pass starts DALI anew, which takes part of a second, and
    seconds where CUDA starts with it. What NVDEC cannot decode inside a frame it paints over and does not report:
    where damage must show, take PyAV.

    Args:
        path: a regular file or a link to one; mp4/mov, mkv/webm, avi, MPEG transport or program stream.
        limits: what it may cost, by default ``Limits()``.
        decoder: ``pyav``; ``dali``; or ``auto``, DALI where there is a GPU and it takes the file, else PyAV.
            ``Video.decoder`` says which one runs, the log why it is not DALI.

    Raises:
        SDRError: not a readable regular file, not such a video, over a limit, nothing in it can be decoded, or
            ``decoder="dali"`` and DALI is missing or refuses the file.
        ValueError: no such decoder.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    limits = limits or Limits()
    fd = _open_regular(path, limits)
    try:
        return Video(path, fd, limits, decoder)
    except BaseException:
        os.close(fd)
        raise


@functools.cache  # once for this machine, not once per video
def _say_once(missing: str) -> None:
    logger.warning("videos are decoded by PyAV, not by DALI: %s", missing)


def _open_regular(path, limits: Limits) -> int:
    """Descriptor of a regular file within the size limit. Nothing else is even opened: that could block or act."""
    try:
        _require_regular(path, os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)
        raise SDRError(path, "link to a missing file" if dangling else error.strerror, again=True) from None
    except ValueError as error:  # a null character in the name
        raise SDRError(path, str(error)) from None
    try:
        state = os.fstat(fd)
        _require_regular(path, state.st_mode)
        if state.st_size == 0:
            raise SDRError(path, "empty file")
        if state.st_size > limits.max_bytes:
            raise SDRError(
                path, f"{state.st_size} bytes are over the limit of {limits.max_bytes}", "--limits.max_bytes"
            )
    except SDRError:
        os.close(fd)
        raise
    return fd


def _require_regular(path, mode: int) -> None:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(mode):
        raise SDRError(path, f"not a file but a {kinds.get(stat.S_IFMT(mode), 'device')}")


def _identity(fd: int) -> tuple[int, int]:
    state = os.fstat(fd)
    return state.st_size, state.st_mtime_ns


def sample_clips(length: int, num_frames: int = 32, *, stride: int = 32) -> np.ndarray:
    """Indices of the clips that cover a track.

    Clips start at 0, stride, 2 stride, ...; if frames are left at the end, one more clip ends at the last frame. A
    track shorter than a clip is one clip, mirrored to length without repeating its ends: 0 .. L-1, L-2 .. 0, 1 ...

    Args:
        length: frames of the track, at least 1.
        num_frames: frames of a clip, at least 1.
        stride: frames from one clip's start to the next, at least 1.

    Returns:
        [N, num_frames] int64.
    """
    for name, value in (("length", length), ("num_frames", num_frames), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    steps = np.arange(num_frames, dtype=np.int64)
    if length <= num_frames:
        period = max(1, 2 * (length - 1))
        return np.minimum(steps % period, period - steps % period)[None] if length > 1 else 0 * steps[None]
    starts = np.arange(0, length - num_frames + 1, stride, dtype=np.int64)
    if starts[-1] + num_frames < length:
        starts = np.append(starts, length - num_frames)
    return starts[:, None] + steps
