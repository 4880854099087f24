"""The clip cache that `sdr prepare` writes and training reads: one tar of uint8 clips for each video, and a manifest.

A tar, because everything opens it, webdataset and DALI's reader among them; a clip is one read at a known offset, and
NumPy's own format inside says its shape and type. One for each video, because a video is what is written whole or not
at all, resumed, checked and replaced. Pixels are not compressed: a lossy codec would change what the model looks at,
and a lossless one costs more time than reading.

    prepare.json             the settings that the clips were cut with
    shards/<split>/<method>/<video>.tar     <clip>.npy, uint8 [T, S, S, 3], and <clip>.json, its row of the manifest
    shards/<split>/<method>/<video>.json    in its place, where a video gave no clip: the reason
    manifest.parquet         one row a clip; written last
    unusable.csv             every video that gave none, and why
"""

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from sdr.config import MAX_CLIP_PIXELS, check, check_count
from sdr.datasets import SPLITS, Record, in_two_splits, read_json
from sdr.errors import SDRError, escape
from sdr.files import BoundedFile, atomic_file

SETTINGS, MANIFEST, REPORT, SHARDS = "prepare.json", "manifest.parquet", "unusable.csv", "shards"
MANIFEST_ROWS = 65536  # of a row group
VALUES, VALUES_PER_BYTE = 1 << 22, 16  # of a manifest at most: so many, and so many more for each of its bytes
ROW_LEAST_BYTES = 16  # of a large manifest for each row: every clip has its own sha256
ROW_BYTES = 1 << 20  # of a clip's JSON, and of what else a tar holds between clips, at most
COLUMNS = {  # of the manifest, and PyArrow's name of their type
    "video": "string",
    "label": "int8",
    "method": "string",
    "split": "string",
    "identity": "string",
    "video_sha256": "string",
    "clip": "int32",
    "frames": "list<int32>",
    "track": "int32",
    "tracks": "int32",
    "chosen_by": "string",
    "left_out": "int32",
    "transform": "list<float64>",
    "detector": "string",
    "decoder": "string",
    "settings": "string",
    "source": "string",
    "sha256": "string",
    "shard": "string",
    "offset": "int64",
}


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What NumPy writes before a uint8 array of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def write_shard(path: Path, clips: Iterable[tuple[dict, np.ndarray]]) -> None:
    """Write the clips of one video to a tar.

    Args:
        path: of the tar; its folder is there.
        clips: row of the manifest without sha256 and offset, and uint8 [T, S, S, 3].

    Raises:
        SDRError: the tar cannot be written; its ``file`` is then ``path``. What ``clips`` raises is passed on.
    """
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (row, clip) in enumerate(clips):
            pixels = clip.tobytes()
            key = f"{path.stem}_{number:05d}"
            add_member(tar, f"{key}.npy", npy_header(clip.shape) + pixels)
            add_member(tar, f"{key}.json", json.dumps(row | {"sha256": hashlib.sha256(pixels).hexdigest()}).encode())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of a tar without time, owner or anything else that two runs would write differently."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read_shard(path: Path, shape: tuple[int, ...]) -> list[dict]:
    """The rows of a shard's clips with the offset of their pixels.

    Args:
        path: of the tar.
        shape: that its clips must have, [T, S, S, 3].

    Raises:
        SDRError: it cannot be read, or is not what ``write_shard`` wrote.
    """
    header, rows = npy_header(shape), []
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise SDRError(path, "is not a regular file")
        with BoundedFile(path, ROW_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = iter(tar)  # not all at once: a small file can hold very many that are empty
            for clip, row in zip(members, members, strict=True):
                if not (clip.isreg() and row.isreg() and row.size <= ROW_BYTES):
                    raise ValueError(f"{clip.name} or {row.name} is no file of ours")
                if clip.size != len(header) + math.prod(shape) or tar.extractfile(clip).read(len(header)) != header:
                    raise ValueError(f"{clip.name} is no clip of {list(shape)}")
                rows.append(json.load(tar.extractfile(row)) | {"offset": clip.offset_data + len(header)})
            if not rows:
                raise ValueError("it is empty")
    except OSError as error:
        raise SDRError(path, f"cannot be read: {error.strerror or error}") from error
    except (tarfile.TarError, ValueError, TypeError, RecursionError) as error:
        raise SDRError(path, f"is no shard of clips: {escape(str(error)[:200])}") from error
    return rows


def write_manifest(folder: Path, rows: Iterable[dict]) -> int:
    """One row a clip, as Parquet with checksums; returns their number. Memory: of MANIFEST_ROWS rows."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(list(arrow_types().items()))
    rows, count = iter(rows), 0
    with (
        atomic_file(folder / MANIFEST) as file,
        parquet.ParquetWriter(file, schema, write_page_checksum=True) as writer,
    ):
        while part := list(islice(rows, MANIFEST_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))
            count += len(part)
    return count


def read_manifest(folder: Path, columns: Sequence[str] | None = None) -> dict[str, list]:
    """Columns of the manifest by name; raises SDRError where there is none or it is damaged."""
    import pyarrow
    from pyarrow import parquet

    path = folder / MANIFEST
    if not path.is_file():
        hint = "sdr prepare has not ended there" if (folder / SETTINGS).is_file() else "sdr prepare makes one"
        raise SDRError(folder, f"is no clip cache: it has no {MANIFEST}", hint)
    require_inside(os.path.realpath(folder), path)
    names, types = list(columns or COLUMNS), arrow_types()
    texts = [name for name in names if types[name] == pyarrow.string()]
    try:
        with open(path, "rb") as opened:  # PyArrow takes no name that is not UTF-8
            metadata = parquet.read_metadata(opened)
        check_sizes(path, metadata)
        found = {field.name: field.type for field in metadata.schema.to_arrow_schema()}
        check_types(path, {name: types[name] for name in names}, found)
        # a text that stands in many rows stays one: without that, a small file could fill the memory
        with (
            open(path, "rb") as opened,
            parquet.ParquetFile(opened, read_dictionary=texts, page_checksum_verification=True) as file,
        ):
            table = file.read(columns=names)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SDRError(path, f"cannot be read: {escape((str(error).splitlines() or ['damaged'])[0][:200])}") from error
    content = {name: [value for chunk in table[name].chunks for value in values_of(chunk)] for name in names}
    check_manifest(path, content)
    return content


def arrow_types() -> dict:
    """PyArrow's type of each column."""
    import pyarrow

    lists = {"list<int32>": pyarrow.list_(pyarrow.int32()), "list<float64>": pyarrow.list_(pyarrow.float64())}
    return {name: lists.get(kind) or getattr(pyarrow, kind)() for name, kind in COLUMNS.items()}


def check_sizes(path: Path, metadata) -> None:
    """Raise SDRError for a Parquet file that says it holds more than one of its size could, before it is read."""
    size = path.stat().st_size
    if not 0 <= metadata.num_rows <= max(MANIFEST_ROWS, size // ROW_LEAST_BYTES):
        raise SDRError(path, f"is damaged: {metadata.num_rows} rows do not fit into {size} bytes")
    left = VALUES + VALUES_PER_BYTE * size
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        for number in range(part.num_columns):
            column = part.column(number)
            if column.compression not in ("SNAPPY", "UNCOMPRESSED"):  # others can make a thousand bytes of one
                raise SDRError(path, f"is compressed by {column.compression}, which sdr prepare never does")
            left -= column.num_values
            if column.num_values < 0 or left < 0:
                raise SDRError(path, f"is damaged: it says that it has more values than fit into {size} bytes")


def check_types(path: Path, wanted: dict, found: dict) -> None:
    """Raise SDRError where a manifest lacks a column, or has one of another type."""
    if missing := set(wanted) - set(found):
        raise SDRError(path, f"has no column {', '.join(sorted(missing))}")
    for name, kind in wanted.items():
        if found[name] != kind:
            raise SDRError(path, f"is damaged: its column {name} is of the type {escape(str(found[name])[:80])}")


def values_of(chunk) -> list:
    """The values of a chunk of a column."""
    import pyarrow

    if not pyarrow.types.is_dictionary(chunk.type):
        return chunk.to_pylist()
    words = chunk.dictionary.to_pylist()
    return [None if index is None else words[index] for index in chunk.indices.to_pylist()]


def check_manifest(path: Path, table: dict[str, list]) -> None:
    """Raise SDRError where a column holds what `sdr prepare` never writes; a shard must lie in the cache."""
    sound = {
        "label": lambda value: value in (0, 1),
        "split": lambda value: value in SPLITS,
        "shard": lambda value: value.startswith(f"{SHARDS}/") and ".." not in value.split("/") and "\0" not in value,
        "offset": lambda value: value >= 0,
    }
    for name, values in table.items():
        rule = sound.get(name, lambda value: True)
        if not all(value is not None and rule(value) for value in values):
            raise SDRError(path, f"is damaged: its column {name} holds what sdr prepare never writes")


def leaks(table: dict[str, list], splits: Sequence[str] = SPLITS) -> Iterator[str]:
    """One line for each person, and each file, that is in two of these splits."""
    for column, what in {"identity": "identity", "video_sha256": "the file of sha256"}.items():
        rows = zip(table[column], table["split"], table["video"], strict=True)
        yield from in_two_splits((f"{what} {value}", split, video) for value, split, video in rows if split in splits)


def read_settings(folder: Path) -> dict:
    """What ``prepare.json`` holds; raises SDRError where it is missing or broken."""
    path = folder / SETTINGS
    if not path.exists():
        what = f"is no clip cache: it has no {SETTINGS}" if os.path.isdir(folder) else "no such folder"
        raise SDRError(folder, what, "sdr prepare makes a cache")
    require_inside(os.path.realpath(folder), path)
    found = read_json(path)
    try:
        for name in ("num_frames", "size"):
            check_count(name, found[name])
        pixels = math.prod(clip_shape(found)) // 3
        check(pixels <= MAX_CLIP_PIXELS, "num_frames * size**2", f"not pass {MAX_CLIP_PIXELS}", pixels)
    except (KeyError, TypeError, ValueError) as error:
        raise SDRError(path, f"is damaged: {error}") from error
    return found


class ClipCache:
    """The clips of some splits and methods of a cache, in the order of its manifest.

    Args:
        folder: that `sdr prepare` wrote.
        split: whose clips to take; None takes all.
        methods: of the fakes to take; real videos always are. None takes all.

    Attributes:
        shape: of every clip, (T, S, S, 3).
        labels: [N] int64, 1 = fake.
        videos: [N] int64, index into ``records``.
        records: one for each video, in the order of its first clip.
        splits: all that the cache has, whatever is selected.
        samples: [N] int64, row of each clip in the manifest, whatever is selected: the key of its augmentation.

    Raises:
        SDRError: there is no finished cache, it is damaged, or the selection is empty.
    """

    def __init__(
        self, folder: str | os.PathLike, *, split: str | None = None, methods: Sequence[str] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self.shape = clip_shape(self.settings)
        names = ("video", "label", "method", "split", "identity", "clip", "shard", "offset")
        table = read_manifest(self.folder, names)
        if unknown := set(methods or ()) - set(table["method"]):
            there = escape(", ".join(sorted(set(table["method"]) - {"real"})))
            what = f"has no clip of the method {escape(', '.join(sorted(unknown)))}"
            raise SDRError(self.folder, what, f"it has {there}")
        self.splits = frozenset(table["split"])
        rows = [
            i
            for i, (home, label, method) in enumerate(zip(table["split"], table["label"], table["method"], strict=True))
            if split in (None, home) and (methods is None or label == 0 or method in methods)
        ]
        if not rows:
            place = "" if split is None else f" of the split {split!r}"
            raise SDRError(self.folder, f"has no clip{place}", f"it has {', '.join(sorted(self.splits))}")
        self._places = [(table["shard"][i], table["offset"][i], table["clip"][i]) for i in rows]
        numbers = {name: n for n, name in enumerate(dict.fromkeys(table["shard"][i] for i in rows))}
        records = {}
        for i in rows:
            values = (table[name][i] for name in ("label", "split", "method", "identity"))
            records.setdefault(table["shard"][i], Record(Path(table["video"][i]), *values))
        self.records = tuple(records.values())
        self.labels = torch.tensor([table["label"][i] for i in rows])
        self.videos = torch.tensor([numbers[table["shard"][i]] for i in rows])
        self.samples = torch.tensor(rows)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """The clip's video and number, for people."""
        return f"{escape(self.records[self.videos[index]].path)} clip {self._places[index][2]}"

    @cached_property
    def _home(self) -> str:
        """The folder without links, which no clip may lie outside of."""
        return os.path.realpath(self.folder)

    @cached_property
    def digest(self) -> str:
        """Of the manifest and the selection: another one means other clips, or in another order."""
        manifest = hashlib.sha256((self.folder / MANIFEST).read_bytes())
        return hashlib.sha256(manifest.digest() + self.samples.numpy().tobytes()).hexdigest()

    def read(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Clip ``index``, [T, S, S, 3] uint8, into ``out`` where that is given; safe in threads.

        Raises:
            SDRError: its shard is missing, cut off or not the one that the manifest describes; names the clip.
        """
        shard, offset, _ = self._places[index]
        clip = np.empty(self.shape, np.uint8) if out is None else out
        header = npy_header(self.shape)
        require_inside(self._home, self.folder / shard)
        try:
            with open(self.folder / shard, "rb") as file:
                file.seek(offset - len(header))
                whole = file.read(len(header)) == header and file.readinto(memoryview(clip).cast("B")) == clip.nbytes
        except OSError as error:
            raise SDRError(self.folder / shard, f"cannot be read for {self.name(index)}: {error.strerror}") from error
        if not whole:
            raise SDRError(self.folder / shard, f"does not hold {self.name(index)}", "sdr prepare --check tells more")
        return clip


def require_inside(home: str, path: Path) -> None:
    """Raise SDRError where a file of a cache is a link out of it, or a pipe or device, which to open could block.

    Args:
        home: real path of the cache.
        path: of the file.
    """
    if not os.path.realpath(path).startswith(os.path.join(home, "")):
        raise SDRError(path, "lies outside of the cache", "a cache may be a link as a whole, no part of it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise SDRError(path, "is not a regular file")


def clip_shape(settings: dict) -> tuple[int, int, int, int]:
    """[T, S, S, 3] of the clips that these settings cut."""
    return settings["num_frames"], settings["size"], settings["size"], 3
