"""A run of scoring that can be killed: every result on disk, found again, and read one at a time.

A file a video, written whole or not at all: NumPy's .npz of plain bytes, which says what was scored and how, and holds
the pictures that a report may show. What counts is whether the video and the settings are the same, so that a run goes
on where it stopped, and one with another threshold, or with more videos, scores only what is new to it.
"""

import hashlib
import json
import logging
import math
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sdr.errors import SDRError, escape
from sdr.files import ZIP_DAMAGE, atomic_file, differences, digest_arrays, is_temporary, make_folder, remove
from sdr.report import pictured
from sdr.score import ClipScore, ScoreConfig, VideoScore, judge

KEPT = "kept"  # folder of the results
FORMAT = 1  # to be raised when the same video, weights and settings give another result
NAME_LENGTH = 60  # characters of a result's name that are the video's own; a hash tells the rest
FREE = ("threshold", "reduce", "batch_size")  # settings that change no clip's score
NO_PICTURES = np.empty((0, 1, 1, 3), np.uint8)  # [0, S, S, 3]
FIELDS = ("reason", "faces", "seconds", "duration", "decoder", "again")
READERS = ("av", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "onnxruntime")  # packages that read a video

logger = logging.getLogger(__name__)
Source = tuple[int, ...]  # bytes, times of change in ns, and number of a file; others mean another video


def find_source(video: str | os.PathLike) -> Source | None:
    """What tells whether a video has changed; None where it is no file."""
    try:
        found = os.stat(video)
    except (OSError, ValueError):
        return None
    # size and time of change can be those of another file that took its place, the time of the swap and the number not
    source = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    return source if stat.S_ISREG(found.st_mode) else None


def installed(package: str) -> str:
    """Its version, "" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


class KeptScores:
    """The results of a run, in a folder of its own.

    Args:
        out: folder of the run; what a kill has left half written is swept from it.
        config: how videos are scored.
        made_by: what else a score depends on, values of JSON by name.

    Raises:
        SDRError: the folder cannot be made, read or written.
    """

    def __init__(self, out: Path, config: ScoreConfig, made_by: Mapping[str, object]) -> None:
        self.folder, self.config = out / KEPT, config
        fields = {name: value for name, value in asdict(config).items() if name not in FREE}
        self.limits = {f"limits.{name}": value for name, value in fields.pop("limits").items()}
        if config.views == "same":
            fields.pop("seed")  # nothing is drawn
        self.software = {name: installed(name) for name in READERS}
        self.settings = {"format": FORMAT, **made_by, **fields}
        make_folder(self.folder)
        for folder in (out, self.folder):
            sweep(folder)

    def path(self, video: Path) -> Path:
        """Where the result of a video is kept: a name for any file system, its own for every file."""
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", video.stem)[:NAME_LENGTH]
        return self.folder / f"{stem}-{hashlib.sha256(os.fsencode(os.path.realpath(video))).hexdigest()[:16]}.npz"

    def keep(self, video: Path, source: Source | None, result: VideoScore) -> None:
        """Write a result.

        Args:
            video: that was scored.
            source: of the video before it was read; a result of a file that has changed since is scored again.
            result: whose path, truth, score and state are not kept: they follow from the clips and the next command.

        Raises:
            SDRError: it cannot be written.
        """
        shown = pictured(result)
        frames = [result.clips[i].thumbnail for i in shown]
        frames += [] if result.top_clip is None else list(result.top_clip)
        pictures = np.stack(frames) if frames else NO_PICTURES  # [N, S, S, 3]
        fields: dict[str, Any] = {name: getattr(result, name) for name in FIELDS}
        fields["again"] = fields["again"] or source is None or source != find_source(video)
        clips = [(c.track, c.start, c.end, c.first_frame, c.last_frame, c.score) for c in result.clips]
        scored = {"scored": result.score is not None, "clips": clips, "shown": shown, "pictures": to_hex(pictures)}
        under = {"settings": self.settings, "limits": self.limits, "software": self.software}
        told = np.frombuffer(json.dumps({**under, "source": source, **fields, **scored}).encode(), np.uint8)
        with atomic_file(self.path(video)) as file:
            np.savez_compressed(file, sha256=digest_arrays({"result": told}), result=told, pictures=pictures)

    def _load(self, video: Path, *, pictures: bool = False) -> tuple[dict, np.ndarray] | None:
        """What was kept of a video and, unless asked for none, its pictures; None where there is nothing.

        Raises:
            SDRError: it cannot be read.
            DamagedError: it is not what was written.
        """
        path = self.path(video)
        try:
            file = open(path, "rb")  # noqa: SIM115  # closed below; only its opening is the file system's
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SDRError(path, f"cannot be read: {error.strerror}") from error
        with file:
            return unpack(file, pictures=pictures)

    def recall(self, video: Path, truth: int | None) -> tuple[VideoScore | None, str]:
        """The kept result of a video that has not changed, else None; and which settings are others than they were.

        Raises:
            SDRError: from the file system.
        """
        source = find_source(video)
        try:
            found = None if source is None else self._load(video)
        except DamagedError as error:
            logger.warning("kept result %s is damaged, the video is scored again: %s", escape(self.path(video)), error)
            found = None
        if found is None or found[0]["source"] != list(source) or found[0]["again"]:
            return None, ""
        told = found[0]
        before, now = told["settings"], self.settings
        # another limit may let a video pass that has no score, and a lower one refuse any
        if not told["scored"] or any(most < told["limits"].get(name, math.inf) for name, most in self.limits.items()):
            before, now = before | told["limits"], now | self.limits
        if told["scored"] and not told["reason"]:  # the video is whole
            before = before | {"allow_damaged": now["allow_damaged"]}
        if not told["scored"]:  # another release may read the video
            before, now = before | told["software"], now | self.software
        if before != now:
            return None, differences(json.dumps(before), now)
        return self._result(*found, video, truth), ""

    def read(self, video: Path, truth: int | None, *, pictures: bool) -> VideoScore:
        """The result of a video that was kept or recalled by this run.

        Raises:
            SDRError: it is gone, or damaged, and gone then, so that the next run scores the video again.
        """
        path, what = self.path(video), "was removed during the run"
        try:
            found = self._load(video, pictures=pictures)
        except DamagedError as error:
            found, what = None, f"is damaged: {error}"
            remove(path)
        if found is None:
            raise SDRError(path, what, "the same command scores the video again")
        return self._result(*found, video, truth)

    def _result(self, told: dict, pictures: np.ndarray, video: Path, truth: int | None) -> VideoScore:
        shown = dict(zip(told["shown"], pictures, strict=False))
        clips = tuple(ClipScore(*values, shown.get(i)) for i, values in enumerate(told["clips"]))
        top = pictures[len(shown) :]
        fields = {name: told[name] for name in FIELDS} | {"clips": clips, "top_clip": top if len(top) else None}
        fields |= judge(clips, self.config) if told["scored"] else {"score": None, "state": "inconclusive"}
        return VideoScore(path=str(video), truth=truth, **fields)


class DamagedError(Exception):
    """A kept result is not what was written; the text is why."""


def sweep(folder: Path) -> None:
    """Remove what a kill has left half written; raises SDRError where the folder cannot be read or written."""
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry.path) for entry in entries if entry.name.startswith(".")]
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SDRError(folder, f"cannot be used: {error.strerror}") from error
    for path in filter(is_temporary, found):
        remove(path)


def unpack(file: BinaryIO, *, pictures: bool) -> tuple[dict, np.ndarray]:
    """What :meth:`KeptScores.keep` wrote, its pictures only where they are asked for; raises DamagedError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = arrays["result"]
            if not np.array_equal(arrays["sha256"], digest_arrays({"result": found})):
                raise ValueError("its checksum is another")
            told = json.loads(found.tobytes())
            shown = arrays["pictures"] if pictures else NO_PICTURES
            if pictures and to_hex(shown) != told["pictures"]:
                raise ValueError("its pictures' checksum is another")
            return told, shown
    except (*ZIP_DAMAGE, MemoryError) as error:  # a damaged header may ask for any size
        raise DamagedError(escape(f"{type(error).__name__}: {error}".splitlines()[0])) from error


def to_hex(pictures: np.ndarray) -> str:
    """Their digest."""
    return digest_arrays({"pictures": pictures}).tobytes().hex()


class Results(Sequence):
    """Results of some videos with their known labels; each is read when it is asked for, and held by nobody."""

    def __init__(self, kept: KeptScores, videos: Sequence[tuple[Path, int | None]], *, pictures: bool) -> None:
        self.kept, self.videos, self.pictures = kept, videos, pictures

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Results(self.kept, self.videos[index], pictures=self.pictures)
        return self.kept.read(*self.videos[index], pictures=self.pictures)
