"""A video file to frames, in a decoding process with limits; clips out of a track.

The file is opened once, here. Its first bytes choose the demuxer, never its name; the decoder gets the descriptor.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import select
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sdr import decode_worker
from sdr.decode_worker import FRAME, RECORD
from sdr.errors import SDRError, escape

HEAD_BYTES = 4096  # of the file, to tell what it is
PIPE_BYTES = 1 << 20
JSON_BYTES = 1 << 16  # the longest HEADER, END or REFUSAL that is believed
LOG_LINE = 160  # characters of FFmpeg's log that a reason may quote
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one file may cost; each is checked before anything is allocated for it.

    Args:
        max_bytes: size of the file.
        max_pixels: width * height, as stored and as displayed.
        max_frames: frames of the video.
        seconds: total time this process waits for the decoder, over all passes.
        memory: address space of the decoding process, bytes.
    """

    max_bytes: int = 2 * 2**30
    max_pixels: int = 3840 * 2160
    max_frames: int = 4096
    seconds: float = 60.0
    memory: int = 2**30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value!r}")


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
    """An open video file; a context manager. Made by ``open_video``."""

    def __init__(self, path: str | bytes | os.PathLike, fd: int, limits: Limits) -> None:
        self.path, self.limits = path, limits
        self.frames_read = 0
        self.damage = ""
        self._fd = fd
        self._identity = _identity(fd)
        self._waited = 0.0
        self._workers: list[_Worker] = []
        self._demuxer = _demuxer(path, fd)
        self._bytes_missing = _bytes_missing(fd, self._demuxer)
        self._ready: _Worker | None = self._start()
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

    def _start(self) -> "_Worker":
        if _identity(self._open_fd()) != self._identity:
            raise SDRError(self.path, "changed while it was being read")
        worker = _Worker(self.path, self._fd, self._demuxer, self.limits, self._waited)
        self._workers.append(worker)
        try:
            worker.read_header()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: "_Worker") -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            self._waited = max(self._waited, worker.waited)
            worker.close()

    def _damage(self, read: int, worker: "_Worker") -> str:
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


HEADER_FIELDS = {"demuxer": str, "codec": str, "log_bytes": int, "frames": int, "width": int, "height": int}
HEADER_FIELDS |= {"fps": float, "duration": float}
END_FIELDS = {"read": int, "corrupt": int, "failed": int, "stopped": str}
REFUSAL_FIELDS = {"what": str, "hint": str, "log": bool}


class _Worker:
    """One decoding process and the pipe from it. Everything it sends is checked: it has read a hostile file."""

    def __init__(self, path, fd: int, demuxer: str, limits: Limits, waited: float) -> None:
        self.path, self.limits, self.waited = path, limits, waited
        self.header: dict = {}
        self.end: dict = {}
        self._size = None
        job = {
            "fd": fd,
            "demuxer": demuxer,
            "max_pixels": limits.max_pixels,
            "max_frames": limits.max_frames,
            "seconds": limits.seconds,
            "memory": limits.memory,
        }
        self._log = os.memfd_create("decoder-log", os.MFD_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                # -P: the script's folder holds modules that must not stand for the standard library's
                [sys.executable, "-P", decode_worker.__file__, json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._log,
                pass_fds=(fd,),
                bufsize=0,
                env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # each further arena costs 64 MiB of address space
            )
        except BaseException:
            os.close(self._log)
            raise
        self._pipe = self._process.stdout.fileno()
        with contextlib.suppress(OSError):  # refused where the user's pipes are many; only speed depends on it
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)

    @property
    def info(self) -> dict:
        h = self.header
        names = ("width", "height", "fps", "duration", "codec")
        return {**{name: h[name] for name in names}, "frames_declared": h["frames"], "container": h["demuxer"]}

    def close(self) -> None:
        """Ends the process, whatever it does, and leaves nothing of it behind."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def log(self, since: int = 0) -> list[str]:
        """FFmpeg's errors from byte ``since`` of the log on, each one printable line."""
        text = os.pread(self._log, decode_worker.LOG_BYTES, since).decode("utf-8", "replace")
        lines = (re.sub(r"^(\[[^]]* @ 0x[0-9a-f]+\] )+", "", line).strip() for line in text.splitlines())
        return [escape(line)[:LOG_LINE] for line in lines if line]

    def read_header(self) -> None:
        kind, size = self._next_record()
        self._expect(kind == decode_worker.HEADER)
        self.header = self._read_json(size, HEADER_FIELDS)

    def next_frame(self) -> tuple[float, np.ndarray] | None:
        """Seconds and [H, W, 3] uint8; None after the last one, when ``end`` is set."""
        kind, size = self._next_record()
        if kind == decode_worker.END:
            self.end = self._read_json(size, END_FIELDS)
            return None
        self._expect(kind == decode_worker.FRAMES)
        seconds, width, height, row_bytes, orientation = FRAME.unpack(self._read(FRAME.size))
        rows = size - FRAME.size
        self._expect(0 < width * height <= self.limits.max_pixels and rows == row_bytes * height)
        self._expect(3 * width <= row_bytes <= 3 * width + PIPE_BYTES)
        pixels = self._read(rows).reshape(height, row_bytes)
        return seconds, _displayed(pixels[:, : 3 * width].reshape(height, width, 3), orientation)

    def _next_record(self) -> tuple[bytes, int]:
        """Kind and payload size of the next record; raises what a REFUSAL says."""
        kind, size = RECORD.unpack(self._read(RECORD.size))
        if kind == decode_worker.REFUSAL:
            refusal = self._read_json(size, REFUSAL_FIELDS)
            said = [refusal["hint"], *(self.log()[:1] if refusal["log"] else [])]
            raise SDRError(self.path, escape(refusal["what"]), escape("; ".join(filter(None, said))))
        return kind, size

    def _read_json(self, size: int, fields: dict[str, type]) -> dict:
        self._expect(size <= JSON_BYTES)
        try:
            record = json.loads(self._read(size).tobytes())
        except (ValueError, RecursionError):
            record = None
        self._expect(isinstance(record, dict) and all(isinstance(record.get(n), kind) for n, kind in fields.items()))
        return record

    def _read(self, size: int) -> np.ndarray:
        """[size] uint8 from the pipe; raises SDRError at the time limit or where the process is gone."""
        if self._process.stdout.closed:
            raise ValueError(f"the video is closed: {escape(self.path)}")
        buffer = np.empty(size, np.uint8)
        view = memoryview(buffer)
        while view:
            start = time.monotonic()
            ready = self._poll.poll(max(0.0, self.limits.seconds - self.waited) * 1000)
            self.waited += time.monotonic() - start
            if not ready:
                raise SDRError(self.path, f"not decoded within {self.limits.seconds:g} s")
            received = os.readv(self._pipe, [view])
            if not received:
                raise self._death()
            view = view[received:]
        return buffer

    def _death(self) -> SDRError:
        status = self._process.wait()
        if status < 0:
            return SDRError(self.path, f"decoder process died (signal {-status})")
        if status == decode_worker.OUT_OF_MEMORY:
            return SDRError(self.path, f"decoding needs more than {self.limits.memory // MIB} MiB of memory")
        return SDRError(self.path, f"decoder process failed (status {status})", "".join(self.log()[-1:]))

    def _expect(self, condition: bool) -> None:
        if not condition:
            raise SDRError(self.path, "decoder process sent an impossible record")


def open_video(path: str | bytes | os.PathLike, *, limits: Limits | None = None) -> Video:
    """Opens a video file and reads its header and first frame in a decoding process.

    Args:
        path: a regular file or a link to one; mp4/mov, mkv/webm, avi, MPEG transport or program stream.
        limits: what it may cost, by default ``Limits()``.

    Raises:
        SDRError: not a readable regular file, not such a video, over a limit, or nothing in it can be decoded.
    """
    limits = limits or Limits()
    fd = _open_regular(path, limits)
    try:
        return Video(path, fd, limits)
    except BaseException:
        os.close(fd)
        raise


def _open_regular(path, limits: Limits) -> int:
    """Descriptor of a regular file within the size limit. Nothing else is even opened: that could block or act."""
    try:
        _require_regular(path, os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError) and os.path.islink(path)
        raise SDRError(path, "link to a missing file" if dangling else error.strerror) from None
    except ValueError as error:  # a null character in the name
        raise SDRError(path, str(error)) from None
    try:
        state = os.fstat(fd)
        _require_regular(path, state.st_mode)
        if state.st_size == 0:
            raise SDRError(path, "empty file")
        if state.st_size > limits.max_bytes:
            raise SDRError(path, f"{state.st_size} bytes are over the limit of {limits.max_bytes}")
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


BOX_TYPES = b"ftyp moov mdat moof free skip wide pnot styp sidx emsg uuid".split()
REFUSED = (  # what else a file may be, by its first bytes
    (b"\x89PNG", "PNG image"),
    (b"GIF8", "GIF image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"\x7fELF", "ELF program"),
    (b"MZ", "Windows program"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"%PDF", "PDF document"),
    (b"FLV", "Flash video"),
    (b"OggS", "Ogg file"),
    (b"0&\xb2u\x8ef\xcf\x11", "ASF (wmv, wma) file"),
    (b"RIFF", "RIFF file other than avi"),
    (b"ID3", "MP3 file"),
    (b"fLaC", "FLAC file"),
    (b"#EXTM3U", "HLS playlist"),
    (b"ffconcat", "ffconcat playlist"),
    (b"v=0", "SDP session description"),
    (b"[playlist]", "playlist"),
)
SUPPORTED = "supported: mp4, mov, mkv, webm, avi, MPEG transport and program streams"


def _demuxer(path, fd: int) -> str:
    """FFmpeg's name of the demuxer, by the first bytes alone; raises SDRError with what the file looks like."""
    head = os.pread(fd, HEAD_BYTES, 0)
    if head[4:8] in BOX_TYPES:
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX", b"AVI\x19"):
        return "avi"
    if head.startswith(b"\x00\x00\x01\xba"):
        return "mpeg"
    if _packet_bytes(head):
        return "mpegts"
    raise SDRError(path, f"not a video but {_looks_like(head)}", SUPPORTED)


def _packet_bytes(head: bytes) -> int:
    """Of an MPEG transport stream: 188, 192 with a time before each, 204 with a check sum after each; 0: it is none."""
    for start, step in ((0, 188), (4, 192), (0, 204)):
        if head[start::step][:3] == b"GGG":
            return step
    return 0


def _looks_like(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, kind in REFUSED:
        if start.startswith(magic):
            return f"a file that looks like: {kind}"
    if b"<MPD" in head:
        return "a file that looks like: DASH playlist"
    if not head.strip(b"\0"):
        return "zero bytes"
    text = head.decode("utf-8", "ignore")
    return "text" if text.isprintable() or not re.search(r"[^\s\x20-\U0010ffff]", text) else "unknown data"


def _bytes_missing(fd: int, demuxer: str) -> int:
    """How far the container's own lengths reach beyond the end of the file; 0 where it declares none."""
    if demuxer == "mpegts":
        return -os.fstat(fd).st_size % _packet_bytes(os.pread(fd, HEAD_BYTES, 0))
    walk = {"mov": _last_box_end, "avi": _last_riff_end, "matroska": _segment_end}.get(demuxer)
    return max(0, walk(fd) - os.fstat(fd).st_size) if walk else 0


MAX_CHUNKS = 20_000  # top-level boxes that are walked; two in each fragment


def _last_box_end(fd: int) -> int:
    end = 0
    for _ in range(MAX_CHUNKS):
        head = os.pread(fd, 16, end)
        size = int.from_bytes(head[:4])
        if size == 1:
            size = int.from_bytes(head[8:16])
        if len(head) < 8 or size < 8 or head[4:8] not in BOX_TYPES:
            break
        end += size
    return end


def _last_riff_end(fd: int) -> int:
    end = 0
    for _ in range(MAX_CHUNKS):
        head = os.pread(fd, 8, end)
        if len(head) < 8 or not head.startswith(b"RIFF"):
            break
        end += 8 + int.from_bytes(head[4:], "little")
    return end


def _segment_end(fd: int) -> int:
    head = os.pread(fd, HEAD_BYTES, 0)
    offset = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if not head.startswith(identifier, offset) or offset + 12 > len(head):
            return 0
        length = 9 - head[offset + 4].bit_length()  # of the size field: its leading zero bits + 1
        value = int.from_bytes(head[offset + 4 : offset + 4 + length]) & ((1 << 7 * length) - 1)
        if length > 8 or value == (1 << 7 * length) - 1:  # all ones: unknown, as in a live recording
            return 0
        offset += 4 + length + value
    return offset


def _displayed(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, 3] as stored to the way it is shown, contiguous; copies only if it must."""
    if orientation & decode_worker.TRANSPOSE:
        pixels = pixels.transpose(1, 0, 2)
    if orientation & decode_worker.FLIP_X:
        pixels = pixels[:, ::-1]
    if orientation & decode_worker.FLIP_Y:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


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
