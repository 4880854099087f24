"""Decodes one video for ``sdr.video`` in a process of its own, so that a hostile file can harm nothing else.

Run as a script: ``python decode_worker.py JOB`` with the opened file's descriptor, the decoder and the limits in JOB as
JSON. It imports PyAV and the standard library only, so that it starts fast and small; ``confinement.py`` beside it does
the same, and DALI's side of it stands in ``decode_worker_dali.py`` and is imported where the job asks for it. Records
go to standard output, each a RECORD head and its payload: one CONFINED (JSON), one HEADER (JSON), FRAMES (a FRAME head,
then rows of RGB bytes), one END (JSON); or one REFUSAL (JSON) in the place of whatever would have followed. FFmpeg logs
its errors to standard error.
"""

import gc
import json
import os
import resource
import signal
import struct
import sys
from types import ModuleType

RECORD = struct.Struct("<cQ")  # kind, bytes of payload
FRAME = struct.Struct("<dIIIB")  # seconds, width, height, bytes per row, orientation
CONFINED, HEADER, FRAMES, END, REFUSAL = b"C", b"H", b"F", b"E", b"R"
TRANSPOSE, FLIP_X, FLIP_Y = 1, 2, 4  # orientation: transpose first, then mirror
OUT_OF_MEMORY = 12  # exit status

THREADS = 2  # of the decoder; each one holds frames of its own
LOG_BYTES = 1 << 16
CPU_PER_WAIT = 20  # the decoder also runs while the reader is busy, so its own clock may run far longer than the wait
MICROSECOND = 1_000_000  # a container's clock, ticks per second
FPS_ASSUMED = 25  # steps the time where a file has neither timestamps nor a rate
ALIGNED_EDGE = 128  # codecs pad a frame to whole blocks; the exact size is checked on each decoded frame

# SWS_BILINEAR | FULL_CHR_H_INT | ACCURATE_RND | BITEXACT: the same pixels on every processor; without FULL_CHR_H_INT
# tables round limited range down, by 1.7 steps on average
INTERPOLATION = 0x2 | 0x2000 | 0x40000 | 0x80000
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
ITU709 = 1  # SWS_CS_ITU709
HD_WIDTH, SD_HEIGHT = 1280, 576
TURNS = {0: 0, 90: TRANSPOSE | FLIP_Y, 180: FLIP_X | FLIP_Y, 270: TRANSPOSE | FLIP_X}  # counter-clockwise degrees


class RefusedError(Exception):
    """The video cannot or may not be decoded; ``log``: FFmpeg's first message says more; ``again``: see SDRError."""

    def __init__(self, what: str, hint: str = "", *, log: bool = False, again: bool = False) -> None:
        super().__init__(what)
        self.record = {"what": what, "hint": hint, "log": log, "again": again}


class SharedFile:
    """The given descriptor as a file object with an offset of its own; the descriptor's is shared with the parent."""

    name = "video"  # all that FFmpeg ever learns about the file's name

    def __init__(self, fd: int) -> None:
        self._fd, self._offset, self._size = fd, 0, os.fstat(fd).st_size

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, size, self._offset)
        self._offset += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}[whence]
        if target < 0:
            return -1  # FFmpeg takes a negative position for an error and goes on
        self._offset = target
        return target

    def tell(self) -> int:
        return self._offset


def confine(job: dict) -> None:
    """Sets the limits of this process: memory, processor time, no core dump, no file longer than the log.

    DALI's libraries alone fill most of an address space of 1 GiB: its side sets a limit on memory of another kind.
    """
    limits = {"CPU": int(job["seconds"] * CPU_PER_WAIT) + 1, "CORE": 0, "FSIZE": LOG_BYTES}
    if job["decoder"] == "pyav":
        limits["AS"] = job["memory"]
    for name, value in limits.items():
        set_limit(getattr(resource, f"RLIMIT_{name}"), value)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process


def set_limit(kind: int, value: int) -> None:
    """``kind``: of RLIMIT_*. The user's own limit stays where it is lower."""
    most = resource.getrlimit(kind)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, value))


def open_nothing_more(later: int = 0, *, gpu: bool = False) -> str:
    """From here on the kernel opens nothing for this process, and does little else (``confinement.restrict``).

    Args:
        later: descriptors that it may ask for again.
        gpu: keep what CUDA needs.

    Returns:
        Why the kernel filters nothing; "" where it does.
    """
    gc.disable()  # nothing that an import makes is garbage
    import av
    import av.subtitles.codeccontext  # PyAV imports these two late, when nothing can be opened any more
    import av.subtitles.stream

    from sdr.confinement import restrict

    av.logging.restore_default_callback()  # plain C: a log through Python can deadlock with the decoder's threads
    av.logging.set_libav_level(av.logging.ERROR)
    gc.freeze()
    gc.enable()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, later))
    return restrict(gpu=gpu)


def open_container(file, job: dict, demuxer: str | None):
    """The file object, by the named demuxer or by the one that its bytes suggest, and nothing else."""
    import av

    options = {"protocol_whitelist": "", "enable_drefs": "0", "max_pixels": str(_padded_pixels(job))}
    try:
        return av.open(file, format=demuxer, options=options, metadata_errors="backslashreplace", io_open=_no_file)
    except (av.FFmpegError, PermissionError) as error:
        _stop_without_memory(error)
        raise RefusedError(f"cannot be read as {job['demuxer']}: {error.strerror or error}", log=True) from None


def _no_file(url: str, flags: int, options: dict):
    raise PermissionError("only the given file is read")


def _padded_pixels(job: dict) -> int:
    return job["max_pixels"] * 5 // 4 + ALIGNED_EDGE**2


def _stop_without_memory(error: Exception) -> None:
    """FFmpeg's out-of-memory is also a Python MemoryError; it ends the process, no other error does."""
    if isinstance(error, MemoryError):
        raise MemoryError from None


def select_stream(container):
    """The default, else the largest, moving video stream; cover art and thumbnails are none. Refuses without one."""
    from av.stream import Discard, Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & still]
    if not streams:
        found = ", ".join(sorted({"cover art" if s.type == "video" else s.type for s in container.streams}))
        raise RefusedError(f"no video stream, only {found}" if found else "no video stream")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise RefusedError("no decoder for its video codec", log=True)
    best = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))
    for stream in container.streams:
        if stream is not best:
            stream.discard = Discard.all
    return best


def describe(container, stream, job: dict) -> dict:
    """What the file declares: codec, fps, frames, seconds of duration; refuses what is over a limit."""
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / MICROSECOND
    info = {
        "codec": stream.codec_context.codec.canonical_name,
        "fps": fps,
        "frames": stream.frames,
        "duration": max(0.0, float(seconds)),
    }
    check_pixels(stream.width, stream.height, job)
    check_frames(stream.frames, job)
    if job["demuxer"] in ("mov", "avi") and stream.frames and len(stream.index_entries):
        # mov: what the edit list hides carries the discard flag; avi: the header also counts the empty chunks of a
        # variable rate, the index does not
        check_frames(len(stream.index_entries), job)
        info["frames"] = sum(not entry.is_discard for entry in stream.index_entries)
    if not info["frames"]:
        check_frames(round(info["duration"] * fps), job, about="about ")
    return info


def check_pixels(width: int, height: int, job: dict) -> None:
    if width * height > job["max_pixels"]:
        raise RefusedError(f"{width}x{height} pixels are over the limit of {job['max_pixels']}", "--limits.max_pixels")


def check_frames(frames: int, job: dict, about: str = "") -> None:
    if frames > job["max_frames"]:
        raise RefusedError(f"{about}{frames} frames are over the limit of {job['max_frames']}", "--limits.max_frames")


class Decoder:
    """Reads a stream's packets and counts what could not be read."""

    def __init__(self, container, stream, job: dict) -> None:
        self.container, self.stream, self.job = container, stream, job
        self.context = stream.codec_context
        self.context.thread_count = THREADS
        self.context.thread_type = "SLICE"  # frame threads report an error packets later, and lose frames with it
        self.context.options = {"max_pixels": str(_padded_pixels(job))}
        self.read = self.corrupt = self.failed = 0
        self.stopped = ""

    def packets(self):
        """Packets, then None to drain the decoder. A read error ends the stream and is kept in ``stopped``."""
        import av

        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    yield packet
        except (av.FFmpegError, PermissionError) as error:
            _stop_without_memory(error)
            self.stopped = error.strerror or str(error)
        yield None

    def frames(self):
        """Decoded frames in order of presentation; what cannot be decoded is counted."""
        import av

        for packet in self.packets():
            corrupt_packet = packet is not None and packet.is_corrupt
            try:
                frames = self.context.decode(packet)
            except av.FFmpegError as error:
                _stop_without_memory(error)
                self.failed += packet is not None
                continue
            self.corrupt += max(corrupt_packet, sum(frame.is_corrupt for frame in frames))
            for frame in frames:
                self.read += 1
                check_frames(self.read, self.job, about="at least ")
                yield frame


class Picture:
    """Decoded frames to displayed RGB: colour matrix, square pixels, orientation, seconds from the start."""

    def __init__(self, container, stream, job: dict, fps: float) -> None:
        from av import FFmpegError
        from av.video.reformatter import VideoReformatter

        self.failure = FFmpegError
        self.stream, self.job = stream, job
        self.start = (container.start_time or 0) / MICROSECOND
        self.step = 1 / (fps or FPS_ASSUMED)
        self.reformat = VideoReformatter().reformat
        self.aspect = stream.sample_aspect_ratio or 1
        self.time = None
        self.size = None

    def seconds(self, frame) -> float:
        """From the container's start. Never runs backwards; a frame without a timestamp follows at the frame rate."""
        ticks = frame.dts if frame.pts is None else frame.pts
        if ticks is None:
            time = 0.0 if self.time is None else self.time + self.step
        else:
            time = float(ticks * self.stream.time_base) - self.start
        self.time = time if self.time is None else max(time, self.time)
        return self.time

    def rgb(self, frame):
        """[H, W, 3] as a plane of RGB rows, pixels square. Refuses sizes over the limit or that change."""
        size = (frame.width, frame.height)
        if self.size not in (None, size):
            raise RefusedError(f"frame size changes from {self.size[0]}x{self.size[1]} to {size[0]}x{size[1]}")
        self.size = size
        width = max(1, round(frame.width * self.aspect))
        check_pixels(*size, self.job)
        check_pixels(width, frame.height, self.job)
        try:
            return self.reformat(
                frame,
                width,
                frame.height,
                "rgb24",
                src_colorspace=matrix_of(frame),
                interpolation=INTERPOLATION,
                threads=1,
            )
        except self.failure as error:
            _stop_without_memory(error)
            kind = f"{frame.format.name}, colour matrix {frame.colorspace}"
            raise RefusedError(f"no way to RGB from {kind}: {error.strerror}") from None


def matrix_of(frame):
    """The colour matrix where the frame names none: BT.709 from HD size on, as players take it; None: the frame's."""
    if frame.colorspace == UNSPECIFIED and (frame.width >= HD_WIDTH or frame.height > SD_HEIGHT):
        return ITU709
    return None


def orientation_of(frame) -> int:
    """TRANSPOSE, FLIP_X, FLIP_Y bits of the display matrix, to the nearest quarter turn; 0 without one."""
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows no name for another kind of side data on this frame: the angle is all there is
        return TURNS[round(frame.rotation / 90) * 90 % 360]
    if side_data is None:
        return 0
    # x' = a x + c y, y' = b x + d y; the matrix is a b u, c d v, x y w
    a, b, _, c, d = struct.unpack_from("=5i", bytes(side_data))
    if abs(b) + abs(c) > abs(a) + abs(d):
        return TRANSPOSE | FLIP_X * (c < 0) | FLIP_Y * (b < 0)
    return FLIP_X * (a < 0) | FLIP_Y * (d < 0)


def send(kind: bytes, *parts) -> None:
    """One record to standard output, without copying its parts together."""
    views = [memoryview(part).cast("B") for part in parts]
    for view in (memoryview(RECORD.pack(kind, sum(map(len, views)))), *views):
        while view:
            view = view[os.write(1, view) :]


def log_bytes() -> int:
    """Length of FFmpeg's log so far; 0 where standard error is no file. The filter leaves no ``fstat``."""
    try:
        return os.lseek(2, 0, os.SEEK_CUR)
    except OSError:
        return 0


def send_json(kind: bytes, record: dict) -> None:
    send(kind, json.dumps(record).encode())


def decode(fd: int, job: dict) -> None:
    """Sends the whole video: HEADER, FRAMES, END. Raises RefusedError or MemoryError."""
    file = SharedFile(fd)
    send_json(CONFINED, {"unfiltered": open_nothing_more()})
    container = open_container(file, job, job["demuxer"])
    stream = select_stream(container)
    header = {"demuxer": job["demuxer"], "log_bytes": log_bytes(), **describe(container, stream, job)}
    decoder = Decoder(container, stream, job)
    picture = Picture(container, stream, job, header["fps"])
    gc.freeze()
    for frame in decoder.frames():
        seconds, orientation, plane = picture.seconds(frame), orientation_of(frame), picture.rgb(frame).planes[0]
        if header:
            width, height = (plane.height, plane.width) if orientation & TRANSPOSE else (plane.width, plane.height)
            send_json(HEADER, {**header, "width": width, "height": height})
            header = None
        send(FRAMES, FRAME.pack(seconds, plane.width, plane.height, plane.line_size, orientation), plane)
        gc.collect()  # a frame whose side data was read is part of a cycle: hundreds of them would stay
    if header:
        raise RefusedError("no frame could be decoded", decoder.stopped, log=True)
    send_json(END, {name: getattr(decoder, name) for name in ("read", "corrupt", "failed", "stopped")})


def decode_with_dali(fd: int, job: dict) -> None:
    """As ``decode``, by DALI."""
    from sdr.decode_worker_dali import decode

    decode(fd, job)


def main() -> None:
    job = json.loads(sys.argv[1])
    package = ModuleType("sdr")  # stands for the real one, whose own module imports torch
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules |= {"sdr": package, "sdr.decode_worker": sys.modules[__name__]}
    try:
        confine(job)
        {"pyav": decode, "dali": decode_with_dali}[job["decoder"]](job["fd"], job)
    except RefusedError as refusal:
        send_json(REFUSAL, refusal.record)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    os._exit(0)  # without teardown: freeing a decoder may wait for its threads


if __name__ == "__main__":
    main()
