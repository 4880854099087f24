"""DeepfakeBench's lists of frames, read into records.

A list is JSON: data set, class, split, in FaceForensics++'s sets compression, then video, and there a label and the
paths of pictures. The lists that go round hold what the paths were on their author's machine: with backslashes,
absolute, or below a folder that the user does not have. As many leading folders are left out as it takes, and no more,
until some video's folder is found below the user's root; the same are left out of all other paths. A path that climbs
by ".." is refused, so that none leaves the root.

In the lists of several data sets a video stands in more than one split: Celeb-DF's train holds all of test, DFDC's val
all of train. Such a video is taken once: into test, else into train, so that nothing is trained on and tested on.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sdr.datasets import SPLITS, SYNTH_SETTINGS, Record, is_path, read_json, shorten
from sdr.errors import SDRError

COMPRESSIONS = {"raw", "c23", "c40"}
STRICTEST = ("test", "train", "val")
HEAD_BYTES = 1 << 16  # of a JSON file, enough to tell whether it lists frames
HEAD = re.compile(rb'\s*\{\s*"[^"]*"\s*:\s*\{\s*"[^"]*"\s*:\s*\{\s*"(train|val|test)"\s*:')


def has_frame_list(folder: Path) -> bool:
    """Whether a folder holds a JSON file that begins as a list of frames does."""
    for path in _json_files(folder):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if HEAD.match(file.read(HEAD_BYTES)):
                return True
    return False


def _json_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.json") if p.name != SYNTH_SETTINGS and os.path.isfile(p))


def read_frame_lists(root: Path, *, splits: Path | None, compression: str) -> list[Record]:
    """Records of all lists; ``frames`` by number, ``method`` the class, ``identity`` whose face the video shows.

    Args:
        root: the pictures' folder, and the lists' unless ``splits`` names them.
        splits: a list, or a folder of lists.
        compression: which pictures to take of a set that has several.

    Raises:
        SDRError: no list, a list that is broken, or two lists that contradict each other.
    """
    source = root if splits is None else splits
    paths = _json_files(source) if os.path.isdir(source) else [source]
    if not paths:
        raise SDRError(source, "is not in DeepfakeBench's layout: no JSON file that lists frames")
    records: dict[Path, Record] = {}
    for path in paths:
        for record in _records(_List(path, root), compression):
            known = records.setdefault(record.path, record)
            split = min(known.split, record.split, key=STRICTEST.index)
            if replace(known, split=record.split) != record:
                raise SDRError(path, f"lists {shorten(str(record.path.relative_to(root)))} in two ways")
            records[record.path] = replace(known, split=split)
    return list(records.values())


def frame_number(name: str) -> int | None:
    """The number that a picture's name ends with: 12 of ``012.png`` and of ``frame_12.png``."""
    digits = re.search(r"[0-9]{1,18}$", name.rpartition(".")[0])
    return int(digits[0]) if digits else None


def shown_identity(name: str) -> str:
    """Whose face a video shows: 000 of FaceForensics++'s 000_003, id0 of Celeb-DF's id0_id1_0000, else the video."""
    known = re.match(r"id[0-9]+(?=_)|[0-9]{3}(?=_[0-9]{3}$)", name)
    return known[0] if known else name


@dataclass(frozen=True)
class _List:
    """One JSON file and the folder that its paths are to be found in."""

    path: Path
    root: Path

    def mapping(self, value: object, *where: str) -> dict:
        if not isinstance(value, dict):
            raise self.fault(where, f"must be a JSON object, got {shorten(value)}")
        return value

    def fault(self, where: tuple[str, ...], what: str) -> SDRError:
        return SDRError(self.path, f"{shorten('/'.join(where)) if where else 'content'} {what}")


def _records(source: _List, compression: str) -> Iterator[Record]:
    videos = [(where, *_pictures(source, where, entry)) for where, entry in _videos(source, compression)]
    # of a missing video the last folder's name may be there by chance, but then more is left out
    found = (_surplus(source.root, folder) for _, _, folder, _ in videos)
    prefix = min((surplus for surplus in found if surplus is not None), key=len, default=())
    for where, own, folder, names in videos:
        label = int(not where[1].lower().endswith("real"))
        if int(not own.lower().endswith("real")) != label:
            raise source.fault(where, f"is in a class of label {label}, its own label is {shorten(own)}")
        if folder[: len(prefix)] == prefix != folder:
            folder = folder[len(prefix) :]
        if not names:  # a video without pictures is missing, in a place that no other has
            folder = tuple(re.sub(r"^\.+$|/", "_", part) for part in (*where[:2], where[-1]))
        path = source.root.joinpath(*folder)
        method = where[1] if label else "real"
        frames = tuple(path / name for name in names)
        yield Record(path, label, where[2], method, shown_identity(where[-1]), frames=frames)


def _videos(source: _List, compression: str) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Each video's place, (data set, class, split, video), and its entry."""
    for dataset, classes in source.mapping(read_json(source.path)).items():
        for kind, splits in source.mapping(classes, dataset).items():
            for split, entries in source.mapping(splits, dataset, kind).items():
                where = (dataset, kind, split)
                if split not in SPLITS:
                    raise source.fault(where, f"must be one of {', '.join(SPLITS)}")
                entries = source.mapping(entries, *where)
                if entries and set(entries) <= COMPRESSIONS:
                    if compression not in entries and any(entries.values()):
                        raise source.fault(where, f"has no {shorten(compression)}, only {', '.join(sorted(entries))}")
                    entries = source.mapping(entries.get(compression, {}), *where, compression)
                for video, entry in entries.items():
                    # DFDC's val holds, among its videos, the bare content of one that test lists
                    if video in ("label", "frames") and isinstance(entries.get("frames"), list):
                        continue
                    yield (*where, video), source.mapping(entry, *where, video)


def _pictures(source: _List, where: tuple[str, ...], entry: dict) -> tuple[str, tuple[str, ...], list[str]]:
    """A video's label, the folder of its pictures as the list has it, part by part, and their names by number."""
    frames, label = entry.get("frames"), entry.get("label")
    if not isinstance(label, str):
        raise source.fault(where, f"must have a label, got {shorten(label)}")
    if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
        raise source.fault(where, f"must have a list of frames, got {shorten(frames)}")
    if not all(is_path(part) for part in where):
        raise source.fault(where, "has no name that a file could have")
    split = [frame.replace("\\", "/").rpartition("/") for frame in frames]
    if len(folders := {folder for folder, _, _ in split}) > 1:
        raise source.fault(where, f"has frames in {len(folders)} folders")
    names = [name for _, _, name in split]
    parts = tuple(part for part in "".join(folders).split("/") if part not in ("", "."))
    for path in ("/".join((*parts, "0")), *names):
        if not is_path(path) or ".." in path.split("/") or path == ".":
            raise source.fault(where, f"has a frame that leads out of its folder or nowhere: {shorten(path)}")
    if names and not parts:
        raise source.fault(where, "has frames without a folder")
    if len(set(names)) < len(names):
        raise source.fault(where, "has a frame twice")
    return label, parts, sorted(names, key=lambda name: (-1 if (n := frame_number(name)) is None else n, name))


def _surplus(root: Path, folder: tuple[str, ...]) -> tuple[str, ...] | None:
    """The fewest leading parts without which ``folder`` is there; None where it is nowhere."""
    return next((folder[:n] for n in range(len(folder)) if os.path.isdir(root.joinpath(*folder[n:]))), None)
