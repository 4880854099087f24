"""Datasets on disk, their layouts and splits, as records."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdr.errors import SDRError

SPLITS = ("train", "val", "test")
FFPP_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
# of `sdr synth`
SYNTH_METHODS = ("ShiftJitter", "GainFlicker", "BlendFlicker", "FullJitter")
SYNTH_SETTINGS = "synth.json"


@dataclass(frozen=True)
class Record:
    """One video of a dataset; ``label`` 1 = fake, ``method`` is ``real`` or the manipulation's name."""

    path: Path
    label: int
    split: str
    method: str
    identity: str


def ffpp_records(root: str | Path, *, compression: str = "c23", methods: Sequence[str] | None = None) -> list[Record]:
    """FaceForensics++'s layout: real videos of the split files' ids, fakes named a_b and b_a.

    Args:
        root: holds original_sequences, manipulated_sequences and splits/{train,val,test}.json, or those json files
            beside them.
        compression: c23, c40 or raw.
        methods: manipulations to read; None takes the paper's four and `sdr synth`'s, of which there is a folder.

    Raises:
        SDRError: a folder, a split file or a listed video is missing; the missing videos are named.
    """
    root = Path(root)
    manipulated = root / "manipulated_sequences"
    if not (root / "original_sequences").is_dir() or not manipulated.is_dir():
        raise SDRError(root, "is not in FaceForensics++'s layout: no original_sequences or manipulated_sequences")
    if methods is None:
        methods = [name for name in (*FFPP_METHODS, *SYNTH_METHODS) if (manipulated / name / compression).is_dir()]
    sources = {"real": root / "original_sequences" / "youtube" / compression / "videos"}
    sources |= {method: manipulated / method / compression / "videos" for method in methods}
    for folder in sources.values():
        if not folder.is_dir():
            raise SDRError(folder, "no such folder", f"--compression {compression} and the methods must exist")
    records = []
    for split in SPLITS:
        for a, b in read_pairs(root, split):
            records += [Record(sources["real"] / f"{i}.mp4", 0, split, "real", i) for i in (a, b)]
            for method in methods:
                records += [Record(sources[method] / f"{i}_{j}.mp4", 1, split, method, i) for i, j in ((a, b), (b, a))]
    missing = [r.path for r in records if not r.path.is_file()]
    if missing:
        raise SDRError(root, f"{len(missing)} videos of the split files are missing, first {missing[0].name}")
    return records


def read_pairs(root: Path, split: str) -> list[tuple[str, str]]:
    """The id pairs of one split file."""
    path = next((p for p in (root / "splits" / f"{split}.json", root / f"{split}.json") if p.is_file()), None)
    if path is None:
        raise SDRError(root / "splits" / f"{split}.json", "no such split file")
    try:
        pairs = json.loads(path.read_text())
    except OSError as error:
        raise SDRError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        pairs = None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise SDRError(path, "is not a JSON list of id pairs")
    return [(str(a), str(b)) for a, b in pairs]


def read_labels(path: str | Path, *, split: str | None = None) -> dict[str, int]:
    """Known labels by real path, 1 = fake.

    Args:
        path: CSV with the columns path, label and, where ``split`` is given, split; paths relative to its folder.
        split: read only the rows of this split.
    """
    path = Path(path)
    needed = ("path", "label", *(("split",) if split else ()))
    labels: dict[str, int] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
                raise SDRError(path, f"has no column {' and no column '.join(missing)}")
            for row in reader:
                if split is None or row["split"] == split:
                    add_label(labels, path.parent, row, f"line {reader.line_num}")
    except OSError as error:
        raise SDRError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise SDRError(path, f"is not a table of known labels: {error}") from error
    return labels


def add_label(labels: dict[str, int], folder: Path, row: dict[str, str | None], where: str) -> None:
    """Put one row into ``labels``; raises ValueError for a label that is not 0 or 1, or that contradicts another."""
    if not row["path"] or row["label"] not in ("0", "1"):
        raise ValueError(f"{where} must hold a path and the label 0 or 1, got {row['path']!r} and {row['label']!r}")
    key = os.path.realpath(folder / row["path"])
    if labels.setdefault(key, int(row["label"])) != int(row["label"]):
        raise ValueError(f"{where} contradicts an earlier label of {row['path']}")


def is_synthetic(root: str | Path) -> bool:
    """Whether a folder was written by `sdr synth`, which leaves its settings beside the videos."""
    return (Path(root) / SYNTH_SETTINGS).is_file()


def check_identities(records: Iterable[Record]) -> None:
    """Raise SDRError when one identity stands in two splits."""
    home: dict[str, str] = {}
    for record in records:
        if home.setdefault(record.identity, record.split) != record.split:
            raise SDRError(
                record.path, f"identity {record.identity} is in both {home[record.identity]} and {record.split}"
            )
