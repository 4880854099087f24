"""The layouts in which users have the datasets on disk, read into records.

A reader fails where the dataset or a list of its videos is not there or not sound, never for a listed video that is
missing: that one's record is returned, and who reads the video reports it. A name out of a dataset's list leads nowhere
but into its folder; links that lie in there are the user's own and are followed. The order is always the same.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from sdr.datasets import SPLITS, SYNTH_METHODS, Record, is_path, read_json, read_table, read_text, shorten
from sdr.deepfakebench import frame_number, has_frame_list, read_frame_lists, shown_identity
from sdr.errors import SDRError, escape

LAYOUTS = ("ffpp", "celebdf", "dfdc", "deepfakebench", "csv")
FFPP_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
FFPP_FOLDERS = ("original_sequences", "manipulated_sequences")
CELEBDF_LABELS = {"Celeb-real": 0, "YouTube-real": 0, "Celeb-synthesis": 1}  # by folder
CELEBDF_LIST = "List_of_testing_videos.txt"
DFDC_LISTS = ("labels.csv", "metadata.json")  # the first of them that a folder has
DFDC_DEPTH = 2  # of a list's folder below the dataset's, as in train/dfdc_train_part_0
DFDC_LABELS = {"REAL": 0, "FAKE": 1, "0": 0, "1": 1}
DFDC_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
CSV_LIST = "videos.csv"


def read_layout(
    layout: str,
    root: str | os.PathLike,
    *,
    splits: str | os.PathLike | None = None,
    compression: str = "c23",
    methods: Sequence[str] | None = None,
) -> list[Record]:
    """The records of one dataset.

    Args:
        layout: one of LAYOUTS. ``ffpp``: FaceForensics++, its splits of id pairs; identity is the target's id.
            ``celebdf``: Celeb-DF-v2, test where its list says so, else train; identity is the person that is shown.
            ``dfdc``: metadata.json or labels.csv (test) in each folder; identity is the original. ``deepfakebench``:
            frame lists, see ``sdr.deepfakebench``. ``csv``: path, label and perhaps split, method and identity; split
            is train where it is not given.
        root: the dataset's folder; of ``csv`` also the file.
        splits: where the official split files are if not in ``root``: ffpp's folder of train.json, val.json, test.json,
            celebdf's list or its folder, a list of dfdc or its folder, deepfakebench's JSON or its folder, the CSV.
        compression: c23, c40 or raw; of ffpp and of deepfakebench where it has several.
        methods: manipulations to read; None takes all, of ffpp the paper's four and `sdr synth`'s that are there.

    Raises:
        SDRError: the dataset is not there, a list is missing or broken, or a video is listed twice.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    root, splits = Path(root), None if splits is None else Path(splits)
    _require(root, folder=layout != "csv")
    if splits is not None:
        _require(splits, folder=layout == "ffpp")
    if layout == "ffpp":
        records = list(_ffpp(root, splits, compression, methods))
    elif layout == "deepfakebench":
        records = read_frame_lists(root, splits=splits, compression=compression)
    else:
        records = list({"celebdf": _celebdf, "dfdc": _dfdc, "csv": _csv}[layout](root, splits))
    if methods is not None and layout != "ffpp":
        records = _choose(records, methods, root)
    if not records:
        raise SDRError(root if splits is None else splits, "lists no video")
    _require_distinct(records)
    return records


def other_layouts(root: str | os.PathLike, layout: str) -> list[str]:
    """Names of the datasets, other than that of ``layout``, of which marks stand in ``root``."""
    root = Path(root)
    if not os.path.isdir(root):
        return []

    def any_there(*names: str) -> bool:
        return any(os.path.exists(root / name) for name in names)

    marks = {
        "ffpp": ("FaceForensics++", any_there(*FFPP_FOLDERS)),
        "celebdf": ("Celeb-DF-v2", any_there(*CELEBDF_LABELS, CELEBDF_LIST)),
        "dfdc": ("DFDC", any(os.path.exists(folder / n) for folder in (root, *_folders(root)) for n in DFDC_LISTS)),
        "deepfakebench": ("DeepfakeBench", has_frame_list(root)),
    }
    return [name for key, (name, stands) in marks.items() if key != layout and stands]


def frame_gap_reason(frames: Sequence[Path]) -> str:
    """Why pictures, in this order, are no video for a temporal model, in one phrase; "" where their numbers follow."""
    numbers = [frame_number(frame.name) for frame in frames]
    if not frames or None in numbers:
        return "frames have no numbers, a temporal model needs consecutive ones" if frames else "has no frames"
    steps = [b - a for a, b in pairwise(numbers)]
    if all(step == 1 for step in steps):
        return ""
    if min(steps) < 1:
        return "frames are not in the order of their numbers"
    middle = median(steps)
    if middle > 1:
        return f"frames are {middle:g} apart (median), a temporal model needs consecutive ones"
    gap = next(i for i, step in enumerate(steps) if step > 1)
    return f"frames between {numbers[gap]} and {numbers[gap + 1]} are missing, a temporal model needs consecutive ones"


def _require(path: Path, *, folder: bool) -> None:
    """Raise SDRError for a path that is not there, or is a file where a folder is needed."""
    if not is_path(os.fspath(path)) or not os.path.lexists(path):
        raise SDRError(path, "no such folder" if folder else "no such file or folder")
    if os.path.isdir(path):
        _entries(path)  # raises where it cannot be read
    elif folder:
        raise SDRError(path, "is not a folder")


def _require_distinct(records: Iterable[Record]) -> None:
    seen: dict[str, Path] = {}
    for record in records:
        first = seen.setdefault(os.path.realpath(record.path), record.path)
        if first is not record.path:
            raise SDRError(record.path, f"is listed twice, the first time as {escape(first)}")


def _choose(records: list[Record], methods: Sequence[str], root: Path) -> list[Record]:
    """Real videos and those of ``methods``; raises SDRError for a method of which there is none."""
    known = sorted({record.method for record in records if record.label})
    if unknown := [method for method in methods if method not in known]:
        raise SDRError(root, f"has no method {shorten(unknown[0])}, only {shorten(', '.join(known))}")
    return [record for record in records if not record.label or record.method in methods]


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder by name, without what is hidden or the file system's own."""
    try:
        with os.scandir(folder) as found:
            entries = [e for e in found if not e.name.startswith(".") and e.name != "lost+found"]
            return sorted(entries, key=lambda e: os.fsencode(e.name))
    except OSError as error:
        raise SDRError(folder, f"cannot be read: {error.strerror}") from error


def _folders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _entries(folder) if os.path.isdir(entry.path)]


def _name(source: Path, where: str, name: object) -> str:
    """``name`` if it is one of a file in a folder, no way to another; raises SDRError."""
    if not is_path(name) or "/" in name or name in (".", ".."):
        raise SDRError(source, f"{where} must be the name of a video, got {shorten(name)}")
    return name


def _ffpp(root: Path, splits: Path | None, compression: str, methods: Sequence[str] | None) -> Iterator[Record]:
    """Real videos of the split files' ids, fakes named a_b and b_a."""
    original, manipulated = (root / name for name in FFPP_FOLDERS)
    if not os.path.isdir(original) or not os.path.isdir(manipulated):
        raise SDRError(root, f"is not in FaceForensics++'s layout: no {' or no '.join(FFPP_FOLDERS)}")
    if methods is None:
        methods = [name for name in (*FFPP_METHODS, *SYNTH_METHODS) if os.path.isdir(manipulated / name / compression)]
    sources = {"real": original / "youtube" / compression / "videos"}
    sources |= {method: manipulated / method / compression / "videos" for method in methods}
    for folder in sources.values():
        if not os.path.isdir(folder):
            raise SDRError(folder, "no such folder", f"--compression {compression} and the methods must exist")
    for split in SPLITS:
        for a, b in _pairs(root, splits, split):
            for i in (a, b):
                yield Record(sources["real"] / f"{i}.mp4", 0, split, "real", i)
            for method in methods:
                for name, i in ((f"{a}_{b}.mp4", a), (f"{b}_{a}.mp4", b)):
                    mask = manipulated / method / "masks" / "videos" / name
                    mask = mask if os.path.isfile(mask) else None
                    yield Record(sources[method] / name, 1, split, method, i, mask=mask)


def _pairs(root: Path, splits: Path | None, split: str) -> list[tuple[str, str]]:
    """The id pairs of one split file."""
    folders = (root / "splits", root) if splits is None else (splits,)
    found = [folder / f"{split}.json" for folder in folders if os.path.exists(folder / f"{split}.json")]
    if not found:
        raise SDRError(folders[0] / f"{split}.json", "no such split file")
    pairs = read_json(found[0])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise SDRError(found[0], "is not a JSON list of id pairs")
    return [tuple(_name(found[0], "an id", i) for i in pair) for pair in pairs]


def _celebdf(root: Path, splits: Path | None) -> Iterator[Record]:
    """Videos of the three folders; the label is the folder's, the list's own number is never asked."""
    folders = [folder for folder in CELEBDF_LABELS if os.path.isdir(root / folder)]
    if not folders:
        raise SDRError(root, f"is not in Celeb-DF-v2's layout: no {', no '.join(CELEBDF_LABELS)}")
    test = _celebdf_test(splits if splits and os.path.isfile(splits) else (splits or root) / CELEBDF_LIST)
    there = {(f, e.name) for f in folders for e in _entries(root / f) if e.name.endswith(".mp4")}
    for folder, name in sorted(there | test):
        stem = name.removesuffix(".mp4")
        identity = f"{folder}/{stem}" if folder == "YouTube-real" else shown_identity(stem)
        label, split = CELEBDF_LABELS[folder], "test" if (folder, name) in test else "train"
        yield Record(root / folder / name, label, split, folder if label else "real", identity)


def _celebdf_test(path: Path) -> set[tuple[str, str]]:
    """Folder and name of each listed video."""
    listed = set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        parts = re.fullmatch(r"[01]\s+([^/\s]+)/([^/]+\.mp4)\s*", line)
        if not parts or parts[1] not in CELEBDF_LABELS:
            raise SDRError(path, f"line {number} must be like '1 YouTube-real/00170.mp4', got {shorten(line)}")
        video = parts[1], _name(path, f"line {number}", parts[2])
        if video in listed:
            raise SDRError(path, f"line {number} lists {shorten('/'.join(video))} again")
        listed.add(video)
    return listed


def _dfdc(root: Path, splits: Path | None) -> Iterator[Record]:
    """Videos of every list, which stands beside them; of a list named by ``splits``, in ``root``."""
    lists = [(path.parent, path) for path in _dfdc_lists(root)]
    if splits is not None:
        lists = [(root, path) for path in ([splits] if os.path.isfile(splits) else _dfdc_lists(splits, depth=0))]
    if not lists:
        raise SDRError(splits or root, "is not in DFDC's layout: no metadata.json and no labels.csv")
    for folder, path in lists:
        yield from (_dfdc_metadata if path.suffix == ".json" else _dfdc_labels)(folder, path)


def _dfdc_lists(folder: Path, depth: int = DFDC_DEPTH) -> list[Path]:
    """The lists of a folder and of those below it."""
    found = [folder / name for name in DFDC_LISTS if os.path.exists(folder / name)][:1]
    if depth:
        for below in _folders(folder):
            found += _dfdc_lists(below, depth - 1)
    return found


def _dfdc_metadata(folder: Path, path: Path) -> Iterator[Record]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise SDRError(path, f"must be a JSON object, got {shorten(content)}")
    for name, entry in sorted(content.items()):
        label, split = (entry.get(key) if isinstance(entry, dict) else None for key in ("label", "split"))
        if label not in ("REAL", "FAKE") or split not in tuple(DFDC_SPLITS):
            what = f"{shorten(name)} must have the label REAL or FAKE and a split of {', '.join(DFDC_SPLITS)}"
            raise SDRError(path, f"{what}, got {shorten(label)} and {shorten(split)}")
        yield _dfdc_record(folder, path, name, DFDC_LABELS[label], DFDC_SPLITS[split], entry.get("original"))


def _dfdc_labels(folder: Path, path: Path) -> Iterator[Record]:
    for line, row in read_table(path, ("filename", "label")):
        if row["label"] not in DFDC_LABELS:
            raise SDRError(path, f"line {line} must have the label 0 or 1, got {shorten(row['label'])}")
        yield _dfdc_record(folder, path, row["filename"], DFDC_LABELS[row["label"]], "test", None)


def _dfdc_record(folder: Path, path: Path, name: str, label: int, split: str, original: object) -> Record:
    name = _name(path, "an entry", name)
    original = name if original is None or not label else _name(path, f"the original of {shorten(name)}", original)
    return Record(folder / name, label, split, "DFDC" if label else "real", original.removesuffix(".mp4"))


def _csv(root: Path, splits: Path | None) -> Iterator[Record]:
    """Rows of a table that the user made: its paths may lead anywhere, relative ones from the table's folder on."""
    path = splits or root
    path = path / CSV_LIST if os.path.isdir(path) else path
    labels: dict[str, int] = {}
    for line, row in read_table(path, ("path", "label")):
        name, label, split = row["path"], row["label"], row.get("split") or "train"
        if not is_path(name) or label not in ("0", "1") or split not in SPLITS:
            what = f"line {line} must hold a path, a label 0 or 1 and a split of {', '.join(SPLITS)}"
            raise SDRError(path, f"{what}, got {shorten(name)}, {shorten(label)} and {shorten(split)}")
        known = labels.setdefault(os.path.realpath(path.parent / name), int(label))
        if known != int(label):
            raise SDRError(path, f"line {line} contradicts an earlier label of {shorten(name)}")
        method = row.get("method") or ("fake" if known else "real")
        if known == (method == "real"):
            raise SDRError(path, f"line {line} has the label {known} and the method {shorten(method)}")
        yield Record(path.parent / name, known, split, method, row.get("identity") or name)
