"""Videos of a dataset as records, and the files that list them, read without trust."""

import csv
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdr.errors import SDRError, escape

SPLITS = ("train", "val", "test")
# of `sdr synth`
SYNTH_METHODS = ("ShiftJitter", "GainFlicker", "BlendFlicker", "FullJitter")
SYNTH_SETTINGS = "synth.json"
MAX_LIST_BYTES = 2**30  # of a file that lists videos
NAME_BYTES, PATH_BYTES = 255, 3000  # what Linux takes, less room for the folder before a path


@dataclass(frozen=True)
class Record:
    """One video of a dataset; ``label`` 1 = fake, ``method`` is ``real`` or the manipulation's name.

    Args:
        mask: video of the manipulated region, where the dataset has one.
        frames: pictures of a DeepfakeBench frame list, in order; ``path`` is then the folder that holds them.
    """

    path: Path
    label: int
    split: str
    method: str
    identity: str
    mask: Path | None = None
    frames: tuple[Path, ...] = ()


def read_regular(path: str | Path, most: int = MAX_LIST_BYTES) -> bytes:
    """A file's bytes.

    Raises:
        SDRError: missing, unreadable, not a regular file (which could block or act when it is read), or larger than
            ``most`` bytes.
    """
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise SDRError(path, "is not a regular file")
        with open(path, "rb") as file:
            data = file.read(min(most, state.st_size) + 1)  # which takes the memory before it reads
            while len(data) <= most and (more := file.read(1 << 20)):  # it has grown, or has no size, as in /proc
                data += more
    except OSError as error:
        raise SDRError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character in the name
        raise SDRError(path, f"cannot be read: {error}") from error
    if len(data) > most:
        raise SDRError(path, f"is larger than {most} bytes")
    return data


def read_text(path: str | Path) -> str:
    """A UTF-8 text, with or without a byte order mark; raises SDRError."""
    try:
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SDRError(path, "is not UTF-8 text") from error


def read_json(path: str | Path):
    """A JSON file's content; raises SDRError also where an object has one key twice."""

    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise SDRError(path, f"names {shorten(name)} twice")
        return content

    try:
        return json.loads(read_text(path), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise SDRError(path, f"is not JSON: {str(error)[:80]}") from error


def read_table(path: str | Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Rows of a CSV file, each with the number of its last line.

    Raises:
        SDRError: unreadable, no CSV, a column of ``needed`` is missing or a column is there twice.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        columns = reader.fieldnames or ()
        if missing := [name for name in needed if name not in columns]:
            raise SDRError(path, f"has no column {' and no column '.join(missing)}")
        if len(set(columns)) < len(columns):
            raise SDRError(path, "has two columns of one name")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise SDRError(path, f"line {reader.line_num} is not CSV: {error}") from error


def shorten(value: object) -> str:
    """A value out of a file as a message may quote it: one printable line of bounded length."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and value.bit_length() > 256:  # Python prints none of over 4300 digits
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > 80:
        return f"{value[:77]!a}..."
    return ascii(value)


def is_path(text: object) -> bool:
    """Whether a value out of a file is a path that the file system can take: asking for it raises nothing."""
    try:
        data = os.fsencode(text) if isinstance(text, str) else b""
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return 0 < len(data) <= PATH_BYTES and b"\0" not in data and max(map(len, data.split(b"/"))) <= NAME_BYTES


def read_labels(path: str | Path, *, split: str | None = None) -> dict[str, int]:
    """Known labels by real path, 1 = fake.

    Args:
        path: CSV with the columns path, label and, where ``split`` is given, split; paths relative to its folder.
        split: read only the rows of this split.
    """
    path = Path(path)
    labels: dict[str, int] = {}
    try:
        for line, row in read_table(path, ("path", "label", *(("split",) if split else ()))):
            if split is None or row["split"] == split:
                add_label(labels, path.parent, row, f"line {line}")
    except ValueError as error:
        raise SDRError(path, f"is not a table of known labels: {error}") from error
    return labels


def add_label(labels: dict[str, int], folder: Path, row: dict[str, str | None], where: str) -> None:
    """Put one row into ``labels``; raises ValueError for a label that is not 0 or 1, or that contradicts another."""
    if not is_path(row["path"]) or row["label"] not in ("0", "1"):
        got = f"{shorten(row['path'])} and {shorten(row['label'])}"
        raise ValueError(f"{where} must hold a path and the label 0 or 1, got {got}")
    key = os.path.realpath(folder / row["path"])
    if labels.setdefault(key, int(row["label"])) != int(row["label"]):
        raise ValueError(f"{where} contradicts an earlier label of {escape(row['path'])}")


def is_synthetic(root: str | Path) -> bool:
    """Whether a folder was written by `sdr synth`, which leaves its settings beside the videos."""
    return (Path(root) / SYNTH_SETTINGS).is_file()


def in_two_splits(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """One line for each thing that stands in two splits.

    Args:
        rows: the thing, as it is to be called, its split and its video.
    """
    homes: dict[str, dict[str, str]] = {}
    for thing, split, video in rows:
        homes.setdefault(thing, {}).setdefault(split, video)
    for thing, places in homes.items():
        if len(places) > 1:
            yield escape(
                f"{thing} is in {' and '.join(f'{split} ({video})' for split, video in sorted(places.items()))}"
            )
