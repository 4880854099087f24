"""A run of scoring that can be killed: every result on disk, found again, and read one at a time.

A file a video, written whole or not at all: NumPy's .npz of plain bytes, which says what was scored and how, and holds
the pictures that a report may show. What counts is whether the video and the settings are the same, so that a run goes
on where it stopped, and one with another threshold, or with more videos, scores only what is new to it.
"""

import hashlib
import json
import logging
import os
import re
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sdr.errors import SDRError, escape
from sdr.files import atomic_file, differences, is_temporary, make_folder, remove
from sdr.report import pictured
from sdr.score import ClipScore, ScoreConfig, VideoScore, judge

KEPT = "videos"  # folder of the results
FORMAT = 1  # to be raised when the same video, weights and settings give another result
NAME_LENGTH = 60  # characters of a result's name that are the video's own; a hash tells the rest
FREE = ("threshold", "reduce", "batch_size")  # settings that change no clip's score
FIELDS = ("reason", "faces", "seconds", "duration", "decoder", "again")
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

logger = logging.getLogger(__name__)
Source = tuple[int, int]  # bytes and time of a file's last change, in ns; another pair means another video


def find_source(video: Path) -> Source | None:
    """What tells whether a video has changed; None where it is no file."""
    try:
        found = os.stat(video)
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


class KeptScores:
    """The results of a run, in a folder that is made with the first of them.

    Args:
        out: folder of the run; what a kill has left half written is swept from it.
        config: how videos are scored.
        made_by: what else a score depends on, values of JSON by name.
    """

    def __init__(self, out: Path, config: ScoreConfig, made_by: Mapping[str, object]) -> None:
        self.folder, self.config = out / KEPT, config
        fields = {name: value for name, value in asdict(config).items() if name not in FREE}
        self.limits = fields.pop("limits")
        self.settings = {"format": FORMAT, **made_by, **fields}
        for folder in filter(os.path.isdir, (out, self.folder)):
            for path in filter(is_temporary, list(folder.iterdir())):
                remove(path)

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
        pictures = [result.clips[i].thumbnail for i in shown]
        pictures += [] if result.top_clip is None else list(result.top_clip)
        fields: dict[str, Any] = {name: getattr(result, name) for name in FIELDS}
        fields["again"] = fields["again"] or source is None or source != find_source(video)
        clips = [(c.track, c.start, c.end, c.first_frame, c.last_frame, c.score) for c in result.clips]
        scored = {"scored": result.score is not None, "clips": clips, "shown": shown}
        told = {"settings": self.settings, "limits": self.limits, "source": source, **fields, **scored}
        arrays = {
            "result": np.frombuffer(json.dumps(told).encode(), np.uint8),
            "pictures": np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8),  # [N, S, S, 3]
        }
        make_folder(self.folder)
        with atomic_file(self.path(video)) as file:
            np.savez_compressed(file, sha256=_digest(arrays), **arrays)

    def _load(self, video: Path) -> tuple[dict, np.ndarray] | None:
        """What was kept of a video and the pictures, or None where there is nothing or nothing sound."""
        path = self.path(video)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("result", "pictures")}
                if not np.array_equal(file["sha256"], _digest(arrays)):
                    raise ValueError("its checksum is another")
            return json.loads(arrays["result"].tobytes()), arrays["pictures"]
        except FileNotFoundError:
            return None
        except Exception as error:  # of the file system, zipfile, zlib, NumPy or JSON: whatever the bytes are
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("kept result %s is damaged, the video is scored again: %s", escape(path), escape(cause))
            return None

    def recall(self, video: Path, truth: int | None) -> tuple[VideoScore | None, str]:
        """The kept result of a video that has not changed, else None; and which settings are others than they were."""
        source = find_source(video)
        found = None if source is None else self._load(video)
        if found is None or found[0]["source"] != list(source) or found[0]["again"]:
            return None, ""
        told = found[0]
        before, now = told["settings"], self.settings
        if not told["scored"]:  # another limit may let the video pass
            before, now = {**before, "limits": told["limits"]}, {**now, "limits": self.limits}
        if before != now:
            return None, differences(json.dumps(before), now)
        return self._result(*found, video, truth), ""

    def read(self, video: Path, truth: int | None) -> VideoScore:
        """The result of a video that was kept or recalled by this run; raises SDRError where it is gone."""
        found = self._load(video)
        if found is None:
            raise SDRError(self.path(video), "was removed or damaged during the run", "give the command again")
        return self._result(*found, video, truth)

    def _result(self, told: dict, pictures: np.ndarray, video: Path, truth: int | None) -> VideoScore:
        shown = dict(zip(told["shown"], pictures, strict=False))
        clips = tuple(ClipScore(*values, shown.get(i)) for i, values in enumerate(told["clips"]))
        top = pictures[len(shown) :]
        fields = {name: told[name] for name in FIELDS} | {"clips": clips, "top_clip": top if len(top) else None}
        fields |= judge(clips, self.config) if told["scored"] else {"score": None, "state": "inconclusive"}
        return VideoScore(path=str(video), truth=truth, **fields)


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """sha256 of shapes and bytes as [32] uint8; a zip's own sum has 32 bits, and its names none."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


class Results(Sequence):
    """Results of some videos with their known labels; each is read when it is asked for, and held by nobody."""

    def __init__(self, kept: KeptScores, videos: Sequence[tuple[Path, int | None]]) -> None:
        self.kept, self.videos = kept, videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> VideoScore:
        return self.kept.read(*self.videos[index])


class Stop:
    """Whether a signal has asked the run to end. While a video is scored, which can be done again, it ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.scoring = False

    def note(self, number: int, frame: object) -> None:
        again, self.signal = self.signal is not None, self.signal or number
        if self.scoring or (again and number == signal.SIGINT):
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Where a signal interrupts."""
        self.check()
        self.scoring = True
        try:
            self.check()  # one may have come in between
            yield
        finally:
            self.scoring = False
        self.check()  # an exception that a signal raised in a callback of C code may have been lost there

    def check(self, *_: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt

    @property
    def code(self) -> int:
        """Exit code of a run that was ended."""
        return EXIT_CODES[self.signal or signal.SIGINT]


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGTERM and the first interrupt end a run between two writes; a second interrupt waits for nothing."""
    stop = Stop()
    before = {number: signal.signal(number, stop.note) for number in EXIT_CODES}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
