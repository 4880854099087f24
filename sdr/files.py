"""Files written whole or not at all."""

import csv
import io
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sdr.errors import SDRError


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
            with suppress(FileNotFoundError):  # the folder itself may be gone
                os.unlink(temporary)


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Write ``data`` to ``path``, whole or not at all; raises SDRError where :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
