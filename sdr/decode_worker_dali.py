"""DALI's side of the decoding process: NVDEC on a GPU, DALI's own VP8, VP9 and MJPEG decoder without one.

``decode_worker.py`` imports this file where the job names DALI; what goes over the pipe is the same. PyAV reads the
header, the packets and the first picture, DALI gets the same bytes, and a file that DALI would show differently is
refused. Of those there are many, because DALI takes every picture for BT.601, opens whatever its own FFmpeg finds in
the bytes, and gives a picture for each packet, where it could not decode one the memory that happened to be there:

- Several picture streams, pictures never shown, repeated times, fields, damaged packets: refused at the start.
- Bytes that FFmpeg would not take for the container that was vetted: refused.
- One picture in each window is decoded by PyAV too, without a GPU every one, and each window begins with the picture
  that ended the last one: where they differ, and where DALI's FFmpeg logs an error, reading stops there and says so.

NVDEC itself hides damage inside a compressed picture that leaves the packets whole. Without a GPU DALI decodes from the
start of the file for each window, so windows are as long as memory allows: 291 frames of 640x480, 10 of 3840x2160.
Starting DALI takes part of a second, with CUDA seconds.
"""

import os
import resource
from types import SimpleNamespace

from sdr.decode_worker import (
    CONFINED,
    END,
    FRAME,
    FRAMES,
    HEADER,
    ITU709,
    TRANSPOSE,
    UNSPECIFIED,
    Decoder,
    Picture,
    RefusedError,
    SharedFile,
    check_frames,
    describe,
    log_bytes,
    matrix_of,
    open_container,
    open_nothing_more,
    orientation_of,
    select_stream,
    send,
    send_json,
    set_limit,
)

CPU_CODECS = frozenset(("vp8", "vp9", "mjpeg"))
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}
IN_ORDER = CPU_CODECS | {"av1"}  # their packets stand in the order in which the pictures are shown
FORMATS = ("yuv420p", "yuvj420p")
BT601 = (5, 6)  # AVCOL_SPC_BT470BG, AVCOL_SPC_SMPTE170M: the same matrix
FULL_RANGE = 2  # AVCOL_RANGE_JPEG
VP8_SHOWN = 0x10  # of the first byte of a VP8 frame
WINDOW_SHARE = 4  # a window, and the file, take at most this part of the memory
CUDA_MEMORY = 2**31  # of the host, beside the limit: for CUDA's own tables
COLOUR_STEPS = 2.0  # mean difference of two decoders; they round differently and scale chroma differently
NO_MEMORY = ("bad_alloc", "out of memory", "resource temporarily unavailable")  # the last: no room for a thread's stack
SPOT = 8  # every 8th pixel of every 8th row of a picture is compared


class Snapshot(SharedFile):
    """A file's bytes as a file object: what was checked is what DALI gets, whatever happens to the file."""

    def __init__(self, data: bytes) -> None:
        self._data, self._offset, self._size = data, 0, len(data)

    def read(self, size: int) -> bytes:
        piece = self._data[self._offset : self._offset + size]
        self._offset += len(piece)
        return piece


class Dali:
    """DALI's video decoder on one file's bytes, for any window of its frames."""

    def __init__(self, data: bytes, *, gpu: bool) -> None:
        import numpy as np

        self._bytes, self._gpu = np.frombuffer(data, np.uint8), gpu
        self.failure = ""
        self._pipeline = self._build()

    def frames(self, start: int, stop: int):
        """[N, H, W, 3] uint8, valid until the next call: N = stop - start, fewer where the video ends earlier.

        None where DALI raised or logged an error; ``failure`` says which.
        """
        import numpy as np

        logged = log_bytes()
        self._pipeline.feed_input("encoded", [self._bytes])
        for name, value in (("start_frame", start), ("end_frame", stop)):
            self._pipeline.feed_input(name, [np.array(value, np.int32)])
        try:
            (frames,) = self._pipeline.run()
            frames = frames.as_cpu() if self._gpu else frames
        except RuntimeError as error:
            self.failure = _cause(error)
            self._pipeline = self._build()  # an error leaves a pipeline unusable
            return None
        if log_bytes() > logged:
            self.failure = "its decoder reported an error"
            return None
        return np.asarray(frames[0])

    def _build(self):
        from nvidia.dali import Pipeline, fn

        device = {"device": "mixed", "affine": False} if self._gpu else {"device": "cpu"}
        try:  # a window must wait for its request: no prefetching
            pipeline = Pipeline(batch_size=1, num_threads=1, device_id=0 if self._gpu else None, prefetch_queue_depth=1)
            with pipeline:
                encoded = fn.external_source(name="encoded", no_copy=True)
                window = {name: fn.external_source(name=name) for name in ("start_frame", "end_frame")}
                pipeline.set_outputs(fn.decoders.video(encoded, **window, **device, pad_mode="none"))
            pipeline.build()
        except RuntimeError as error:
            raise refusal(_cause(error), again=True) from None
        return pipeline


def _cause(error: RuntimeError) -> str:
    """The line of DALI's long message that says what happened. Raises MemoryError where that is what is short."""
    if any(phrase in str(error).lower() for phrase in NO_MEMORY):
        raise MemoryError from None
    lines = [line.strip() for line in str(error).rpartition("encountered:")[2].splitlines()]
    return next(filter(None, lines), type(error).__name__)


def decode(fd: int, job: dict) -> None:
    """Sends the whole video: HEADER, FRAMES, END. Raises RefusedError or MemoryError."""
    gpu = _has_gpu()
    set_limit(resource.RLIMIT_DATA, job["memory"] + CUDA_MEMORY * gpu)
    data = _read(fd, job["memory"] // WINDOW_SHARE)
    dali = Dali(data, gpu=gpu)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if gpu else 0  # CUDA opens its devices again and again
    send_json(CONFINED, {"unfiltered": open_nothing_more(later=files, gpu=gpu)})
    container, stream, info, first = _first_frame(data, job, gpu)
    times, spots = _packets(data, job, info)
    if gpu:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    truth = None if gpu else _second_decoder(data, job)
    reading = Reading(dali, stream, Picture(container, stream, job, info["fps"]), times, spots, truth)
    reading.start(first, job["memory"] // WINDOW_SHARE)
    header = {"demuxer": job["demuxer"], "log_bytes": log_bytes(), **info}
    orientation = orientation_of(first)
    height, width = reading.shape if not orientation & TRANSPOSE else reading.shape[::-1]
    send_json(HEADER, header | {"width": width, "height": height})
    for seconds, pixels in reading.frames():
        send(FRAMES, FRAME.pack(seconds, pixels.shape[1], pixels.shape[0], 3 * pixels.shape[1], orientation), pixels)
    send_json(END, {"read": reading.read, "corrupt": 0, "failed": 0, "stopped": reading.stopped})


def _has_gpu() -> bool:
    try:
        from nvidia.dali import backend
    except ImportError as error:
        raise refusal(f"DALI cannot be imported: {error}", again=True) from None
    return backend.GetCUDADeviceCount() > 0


def refusal(reason: str, *, log: bool = False, again: bool = False) -> RefusedError:
    return RefusedError(f"not decoded by DALI: {reason}", "--decoder pyav", log=log, again=again)


def _read(fd: int, limit: int) -> bytes:
    size = os.fstat(fd).st_size
    if size > limit:
        raise refusal(f"a file of {size} bytes is over its limit of {limit}, a part of --limits.memory")
    source, pieces = SharedFile(fd), []
    while piece := source.read(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def _first_frame(data: bytes, job: dict, gpu: bool):
    """(container, stream, what is declared, the first frame by PyAV); refuses what DALI would show differently."""
    container = open_container(Snapshot(data), job, None)  # as DALI's FFmpeg will: by the bytes
    if job["demuxer"] not in container.format.name.split(","):
        raise refusal(f"it could also be read as {container.format.name}")
    stream = select_stream(container)
    info = describe(container, stream, job)
    if len(container.streams.video) > 1:
        raise refusal("it has several picture streams")
    if info["codec"] not in GPU_CODECS:
        raise refusal(f"{info['codec']} needs another decoder")
    if not gpu and info["codec"] not in CPU_CODECS:
        raise refusal(f"{info['codec']} needs a GPU", again=True)
    frame = next(Decoder(container, stream, job).frames(), None)
    if frame is None:
        raise RefusedError("no frame could be decoded", log=True)
    if reason := _unlike(frame, stream, gpu):
        raise refusal(reason)
    return container, stream, info, frame


def _unlike(frame, stream, gpu: bool) -> str:
    """Why DALI would show this frame differently, "" if it would not."""
    matrix = matrix_of(frame) or frame.colorspace
    full = frame.color_range == FULL_RANGE
    name = "BT.709" if matrix == ITU709 else matrix
    reasons = {
        f"pixels of kind {frame.format.name}": frame.format.name not in FORMATS,
        f"colour matrix {name}, it knows BT.601 alone": matrix not in (*BT601, UNSPECIFIED),
        "full colour range": full and not gpu and not frame.format.name.startswith("yuvj"),
        "pixels that are not square": (stream.sample_aspect_ratio or 1) != 1,
        "interlaced fields": frame.interlaced_frame,
        "an odd width or height": gpu and bool(frame.width % 2 or frame.height % 2),
    }
    return next((reason for reason, happened in reasons.items() if happened), "")


def _packets(data: bytes, job: dict, info: dict) -> tuple[list[int], dict[int, object]]:
    """Timestamps of all frames as they are shown, and the key frames' packets by their place among them."""
    import av

    logged = log_bytes()
    container = open_container(Snapshot(data), job, job["demuxer"])
    packets = []
    try:
        for packet in container.demux(select_stream(container)):
            if packet.size:
                packets.append(SimpleNamespace(pts=packet.pts, key=packet if packet.is_keyframe else None))
                check_frames(len(packets), job, about="at least ")
                if reason := _hidden(packet, info["codec"]):
                    raise refusal(reason)
    except (av.FFmpegError, PermissionError) as error:
        if isinstance(error, MemoryError):
            raise MemoryError from None
        raise refusal(f"damaged: {error.strerror or error}") from None
    if log_bytes() > logged:
        raise refusal("damaged", log=True)
    if info["frames"] not in (0, len(packets)):
        raise refusal(f"damaged: {len(packets)} of {info['frames']} declared frames")
    times = [packet.pts for packet in packets]
    if info["codec"] not in IN_ORDER:
        times = sorted(times)
    if any(after <= before for before, after in zip([-1, *times], times, strict=False)):
        raise refusal("timestamps are repeated, run backwards or are negative")
    place = {time: index for index, time in enumerate(times)}
    return times, {place[packet.pts]: packet.key for packet in packets if packet.key}


def _second_decoder(data: bytes, job: dict) -> Decoder:
    """PyAV on the same bytes, from the start."""
    container = open_container(Snapshot(data), job, job["demuxer"])
    return Decoder(container, select_stream(container), job)


def _hidden(packet, codec: str) -> str:
    """Why a packet is not one picture that is shown, "" if it is."""
    if packet.is_corrupt:
        return "damaged packets"
    if packet.pts is None:
        return "packets without a timestamp"
    if packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & VP8_SHOWN):
        return "pictures that are never shown"
    return "a new description of the pictures midway" if packet.has_sidedata("new_extradata") else ""


class Reading:
    """All frames of one video through DALI, window by window, checked against each other and against PyAV.

    ``truth``: PyAV's decoder at the start of the same video, where all its pictures must be the same to the bit.
    """

    def __init__(
        self, dali: Dali, stream, picture: Picture, times: list[int], spots: dict[int, object], truth=None
    ) -> None:
        self._dali, self._context, self._picture = dali, stream.codec_context, picture
        self._truth, self._true_frames = truth, truth and truth.frames()
        self._times, self._spots = times, spots
        self._last = None  # the frame before the window
        self.shape, self.read, self.stopped = (0, 0), 0, ""

    def start(self, first, memory: int) -> None:
        """Reads the first window; refuses where it is not as PyAV's first frame and its packets say."""
        self.shape = (first.height, first.width)
        total = len(self._times)
        self._size = max(1, min(total, memory // (3 * first.height * first.width)))
        end = [first] if self._size == total else self._dali.frames(total - 1, total + 1)
        if end is None or len(end) != 1:
            raise refusal(self._dali.failure if end is None else f"it finds more than {total} frames")
        self._ahead = self._window(0)
        reason = self._dali.failure if self._ahead is None else self._differs(self._ahead[0], first)
        if reason:
            raise refusal(reason, log=self._ahead is None)

    def frames(self):
        """(seconds, [H, W, 3] uint8) of every frame; ``stopped`` says why they end early."""
        for start in range(0, len(self._times), self._size):
            frames = self._window(start) if start else self._ahead
            if frames is None:
                self.stopped = f"DALI: {self._dali.failure}"
                return
            for pts, frame in zip(self._times[start : start + self._size], frames, strict=True):
                self.read += 1
                yield self._picture.seconds(SimpleNamespace(pts=pts)), frame

    def _window(self, start: int):
        """Frames from ``start`` on, None where they cannot be trusted; then ``failure`` of DALI says why."""
        import numpy as np

        overlap, total = int(start > 0), len(self._times)
        due = min(self._size, total - start) + overlap
        stop = start - overlap + due
        frames = self._dali.frames(start - overlap, stop + (stop == total))  # one more would show
        if frames is None:
            return None
        if len(frames) != due:
            reason = f"it finds {start - overlap + len(frames)} frames or more, there are {total}"
        elif overlap and not np.array_equal(frames[0], self._last):
            reason = f"frame {start - 1} is another picture on a second reading"
        else:
            reason = self._spot(start, frames[overlap:]) or self._untrue(start, frames[overlap:])
        if reason:
            self._dali.failure = reason
            return None
        self._last = frames[-1].copy()
        return frames[overlap:]

    def _spot(self, start: int, frames) -> str:
        """Why the window's first key frame is not the picture that PyAV decodes, "" if it is."""
        from av import FFmpegError

        place = next((place for place in range(start, start + len(frames)) if place in self._spots), None)
        if place is None:
            return ""
        self._context.flush_buffers()
        try:
            found = [*self._context.decode(self._spots[place]), *self._context.decode(None)]
        except FFmpegError as error:
            return f"frame {place} cannot be decoded: {error.strerror}"
        return self._differs(frames[place - start], found[0]) if len(found) == 1 else ""

    def _untrue(self, start: int, frames) -> str:
        """Why the window is not what PyAV decodes in its turn, "" if it is.

        FFmpeg gives up some packets without a message, and DALI then shows old memory.
        """
        for place, ours in enumerate(frames if self._truth else (), start):
            theirs = next(self._true_frames, None)
            if self._truth.failed:
                return f"damaged: packets that could not be decoded: {self._truth.failed}"
            if theirs is None:
                return f"damaged: PyAV decodes {place} frames"
            if (ours != self._picture.rgb(theirs).to_ndarray()).any():
                return f"frame {place} is another picture than PyAV's"
        return ""

    def _differs(self, ours, frame) -> str:
        """Why DALI's [H, W, 3] is not PyAV's frame, "" if it is."""
        if ours.shape[:2] != (frame.height, frame.width) or ours.shape[:2] != self.shape:
            return f"{ours.shape[1]}x{ours.shape[0]} pixels where there are {frame.width}x{frame.height}"
        theirs = self._picture.rgb(frame).to_ndarray()
        steps = abs(ours[::SPOT, ::SPOT].astype("float32") - theirs[::SPOT, ::SPOT]).mean()
        return f"its colours differ by {steps:.1f} steps of 255 on average" if steps > COLOUR_STEPS else ""
