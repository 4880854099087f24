"""The decoding process of one video, as seen by the process that started it."""

import contextlib
import fcntl
import functools
import importlib.util
import json
import logging
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from sdr import decode_worker
from sdr.decode_worker import FRAME, RECORD
from sdr.errors import SDRError, escape

logger = logging.getLogger(__name__)

PIPE_BYTES = 1 << 20
JSON_BYTES = 1 << 16  # the longest HEADER, END or REFUSAL that is believed
LOG_LINE = 160  # characters of FFmpeg's log that a reason may quote
MIB = 2**20

DecoderName = Literal["pyav", "dali", "auto"]
DECODERS = ("pyav", "dali", "auto")

# the decoding process's environment, by how names begin: what the loader, Python and CUDA go by; others may be secrets
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_", "LD_", "PYTHON", "CUDA_", "NVIDIA_", "DALI_")
SET = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}  # an arena costs 64 MiB of addresses, NumPy's threads memory


@dataclass(frozen=True)
class Limits:
    """What one file may cost; each is checked before anything is allocated for it.

    Args:
        max_bytes: size of the file.
        max_pixels: width * height, as stored and as displayed.
        max_frames: frames of the video.
        seconds: total time this process waits for the decoder, over all passes.
        memory: of the decoding process, bytes. With PyAV its address space. With DALI, whose libraries and CUDA need
            far more addresses than memory, the data it may write to, and 2 GiB more where CUDA runs; the file and one
            window of decoded frames then take at most a quarter each. A GPU's own memory has no limit but
            ``max_pixels``.
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


CONFINED_FIELDS = {"unfiltered": str}
HEADER_FIELDS = {"demuxer": str, "codec": str, "log_bytes": int, "frames": int, "width": int, "height": int}
HEADER_FIELDS |= {"fps": float, "duration": float}
END_FIELDS = {"read": int, "corrupt": int, "failed": int, "stopped": str}
REFUSAL_FIELDS = {"what": str, "hint": str, "log": bool, "again": bool}


class Worker:
    """One decoding process and the pipe from it. Everything it sends is checked: it has read a hostile file."""

    def __init__(self, path, fd: int, demuxer: str, limits: Limits, waited: float, decoder: str) -> None:
        self.path, self.limits, self.waited = path, limits, waited
        self.header: dict = {}
        self.end: dict = {}
        self._size = None
        job = {
            "fd": fd,
            "demuxer": demuxer,
            "decoder": decoder,
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
                env=_environment(),
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
        self._expect(kind == decode_worker.CONFINED)
        if unfiltered := self._read_json(size, CONFINED_FIELDS)["unfiltered"]:
            _say_once(escape(unfiltered))
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
            hint = escape("; ".join(filter(None, said)))
            raise SDRError(self.path, escape(refusal["what"]), hint, again=refusal["again"])
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
                raise SDRError(self.path, f"not decoded within {self.limits.seconds:g} s", again=True)
            received = os.readv(self._pipe, [view])
            if not received:
                raise self._death()
            view = view[received:]
        return buffer

    def _death(self) -> SDRError:
        status = self._process.wait()
        if status < 0:
            ended = -status in (signal.SIGKILL, signal.SIGTERM)  # by somebody, not by a fault of its own
            return SDRError(self.path, f"decoder process died (signal {-status})", again=ended)
        if status == decode_worker.OUT_OF_MEMORY:
            reason = f"decoding needs more than {self.limits.memory // MIB} MiB of memory"
            return SDRError(self.path, reason, again=True)
        return SDRError(self.path, f"decoder process failed (status {status})", "".join(self.log()[-1:]))

    def _expect(self, condition: bool) -> None:
        if not condition:
            raise SDRError(self.path, "decoder process sent an impossible record")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    return kept | SET


@functools.cache  # once for this machine, not once per video
def _say_once(unfiltered: str) -> None:
    logger.warning("videos are decoded in a process with limits but without a filter on system calls: %s", unfiltered)


def _displayed(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, 3] as stored to the way it is shown, contiguous; copies only if it must."""
    if orientation & decode_worker.TRANSPOSE:
        pixels = pixels.transpose(1, 0, 2)
    if orientation & decode_worker.FLIP_X:
        pixels = pixels[:, ::-1]
    if orientation & decode_worker.FLIP_Y:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def why_no_dali(*, needs_gpu: bool) -> str:
    """What this machine lacks for DALI, "" if nothing; ``needs_gpu``: its decoder for the CPU does not count."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "it is not installed: pip install 'sdr[dali-cu13]'"
    return "no CUDA GPU" if needs_gpu and not torch.cuda.is_available() else ""
