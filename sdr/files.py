"""Files written whole or not at all."""

import csv
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sdr.errors import SDRError, escape


class BoundedFile(io.FileIO):
    """A file for reading that gives at most ``most`` bytes at once: a size that stands in it cannot ask for all memory.

    Raises:
        ValueError: from ``read``, where more is asked for.
    """

    def __init__(self, path: str | os.PathLike, most: int) -> None:
        super().__init__(path)
        self.most = most

    def read(self, size: int | None = -1) -> bytes:
        everything = size is None or size < 0
        data = super().read(self.most + 1 if everything else min(size, self.most + 1))
        if len(data) > self.most:
            raise ValueError(f"more than {self.most} bytes are asked for at once")
        return data


# what reading a damaged zip may raise, and what is looked for in it: zipfile has no error of its own for most
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,  # a way to compress that is not known
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def is_temporary(path: Path) -> bool:
    """Whether a file is one that :func:`atomic_file` was writing when it was killed."""
    return re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name) is not None


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write ``path``'s content to, there once the block ends well: temporary file beside it, fsync, rename.

    Raises:
        SDRError: the folder is missing, full or not writable, or ``path`` is something other than a regular file; its
            ``file`` is ``path``. An OSError of the block is taken for one of writing, what else it raises is passed on.
    """
    path = Path(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise SDRError(path, "is not a regular file, so it is not replaced")
    temporary = None
    try:
        name = path.parent / f".{secrets.token_hex(8)}.tmp"
        with open(name, "xb") as file:  # not mkstemp, whose files nobody else may read
            temporary = name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise SDRError(path, f"cannot be written: {error.strerror}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # the first error is the one to tell
                os.unlink(temporary)


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Write ``data`` to ``path``, whole or not at all; raises SDRError where :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def file_digest(path: str | os.PathLike) -> str:
    """sha256 of a file, as sha256sum prints it; raises SDRError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SDRError(path, f"cannot be read: {error.strerror}") from error


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """sha256 of named arrays as [32] uint8: a flipped bit or another's array would else be read in silence."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file that may be there; raises SDRError where that is impossible."""
    try:
        if os.path.lexists(path):  # a disk that cannot be written refuses even what is not there
            path.unlink(missing_ok=True)  # another process may be at it
    except OSError as error:
        raise SDRError(path, f"cannot be removed: {error.strerror}") from error


def append_line(path: Path, line: str) -> None:
    """Add one line to a text file; raises SDRError where it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise SDRError(path, f"cannot be written: {error.strerror}") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing; raises SDRError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SDRError(path, f"cannot be made: {error.strerror}") from error


def to_csv(rows: Iterable[Mapping[str, object]], fields: Sequence[str]) -> str:
    """A CSV text with a header line; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@contextmanager
def sole_writer(out: Path, command: str) -> Iterator[None]:
    """Hold a folder for this process; the lock ends with it, however it ends.

    Raises:
        SDRError: another process of the command holds it, or it cannot be locked.
    """
    descriptor = None
    try:
        try:
            descriptor = os.open(out, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait for it to end, or choose another folder"
            raise SDRError(out, f"another {command} is writing there", hint) from error
        except OSError as error:
            raise SDRError(out, f"cannot be locked: {error.strerror}") from error
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def claim_folder(out: Path, stamp: str, settings: Mapping[str, object], *, command: str, report: str = "") -> None:
    """Make ``out`` the command's own: new, empty, or written by it with the same settings.

    Args:
        out: made where it is missing. One that holds nothing but the stamp and the report is as good as empty.
        stamp: name of the file that keeps the settings.
        settings: values of JSON.
        command: as messages name it.
        report: name of another file that tells nothing of the settings.

    Raises:
        SDRError: the folder is another's or of other settings, which are named; nothing in it has changed then.
    """
    make_folder(out)
    path, text = out / stamp, json.dumps(settings, indent=1) + "\n"
    try:
        held = [p for p in out.iterdir() if p.name not in (stamp, report) and not is_temporary(p)]
        kept = path.read_text(errors="replace") if path.is_file() else None
    except OSError as error:
        raise SDRError(out, f"cannot be used: {error.strerror}") from error
    if held and kept is None:
        raise SDRError(out, f"is not empty and was not written by {command}", "choose a new folder")
    if held and kept != text:
        raise SDRError(out, f"was written with other settings: {differences(kept, settings)}", "choose a new folder")
    if kept != text:
        write_atomic(path, text)


def differences(kept: str, settings: Mapping[str, object]) -> str:
    """Which settings are others than those of a stamp's text, one phrase each."""
    try:
        before = json.loads(kept)
        named = [f"{n} was {before.get(n)}, now {value}" for n, value in settings.items() if before.get(n) != value]
    except (ValueError, AttributeError, RecursionError):
        named = []
    return escape("; ".join(named)) or "they cannot be read"
