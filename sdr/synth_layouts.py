"""Where `sdr synth` puts its videos: the names, folders and split files of each dataset."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import PurePosixPath

import numpy as np

from sdr.datasets import SPLITS, SYNTH_METHODS
from sdr.files import to_csv
from sdr.portraits import Role

LAYOUTS = ("ffpp", "celebdf", "dfdc", "deepfakebench")
DEFAULT_CRF = {"ffpp": (23, 40), "celebdf": (23,), "dfdc": (23,), "deepfakebench": (23,)}
FRAME_SET = "MatchedMarginals"  # the data set's name in DeepfakeBench's JSON
DATASET_METHODS = {"celebdf": "Celeb-synthesis", "dfdc": "DFDC"}  # they tell no forgeries apart
CSV_FIELDS = ("path", "label", "split", "method", "identity")
DFDC_NAME = 10  # letters
YOUTUBE_EVERY = 4  # of the real videos of celebdf, one in YouTube-real

Pairs = Mapping[str, Sequence[tuple[str, str]]]  # of ids, by split


@dataclass(frozen=True)
class Film:
    """One video to write.

    Args:
        number: whose video it is, an index of the roles.
        donor: whose face is blended in; a real video has one, too.
        forgery: name of the perturbation, None of a real video.
        crf: H.264 quality factor.
        path: of the video, or of its pictures' folder.
        split: that the layout can express: Celeb-DF-v2 has no val.
        method: by the dataset's own name, real of a real video.
        identity: whose head it is.
        mask: path of the mask's video, shared by the films of all crf; None where there is none.
    """

    number: int
    donor: int
    forgery: str | None
    crf: int
    path: str
    split: str
    method: str
    identity: str
    mask: str | None = None

    @property
    def label(self) -> int:
        return int(self.forgery is not None)


def plan_films(layout: str, roles: Sequence[Role], pairs: Pairs, settings: Mapping) -> list[Film]:
    """Every video of a layout, the real ones first, then by forgery.

    Args:
        layout: one of LAYOUTS.
        roles: who plays each id.
        pairs: ids that swap faces, by split.
        settings: of ``synthesize``.
    """
    partner = {int(a): int(b) for split in pairs.values() for pair in split for a, b in (pair, pair[::-1])}
    films = []
    for forgery, number in product((None, *settings["methods"]), range(len(roles))):
        names = (number, partner[number], forgery)
        path = _NAMES[layout](*names, roles, settings["seed"])
        method = "real" if forgery is None else DATASET_METHODS.get(layout, forgery)
        mask = f"manipulated_sequences/{forgery}/masks/videos/{_ids(*names)}.mp4"
        mask = mask if forgery and layout == "ffpp" else None
        role = roles[number]
        split = "train" if layout == "celebdf" and role.split == "val" else role.split
        for crf in settings["crf"]:
            films.append(Film(*names, crf, path.format(crf=crf), split, method, role.identity, mask))
    return films


def id_pairs(roles: Sequence[Role]) -> Pairs:
    """Per split, the id pairs that swap faces: half of the split with its other half, never an identity with itself."""
    pairs = {}
    for split in SPLITS:
        ids = [f"{i:03d}" for i, role in enumerate(roles) if role.split == split]
        half = len(ids) // 2
        pairs[split] = list(zip(ids[:half], ids[half:], strict=True))
    return pairs


def video_list(films: Sequence[Film]) -> str:
    """videos.csv, the same for every layout."""
    rows = ((film.path, film.label, film.split, film.method, film.identity) for film in films)
    return to_csv((dict(zip(CSV_FIELDS, row, strict=True)) for row in rows), CSV_FIELDS)


def split_files(layout: str, films: Sequence[Film], pairs: Pairs, frames: int) -> dict[str, str]:
    """The files by which the dataset tells labels and splits: name and text."""
    if layout == "ffpp":
        return {f"splits/{split}.json": _to_json(content) for split, content in pairs.items()}
    if layout == "celebdf":
        lines = [f"{1 - film.label} {film.path}\n" for film in films if film.split == "test"]
        return {"List_of_testing_videos.txt": "".join(lines)}
    return _dfdc_metadata(films) if layout == "dfdc" else {f"{FRAME_SET}.json": _frame_list(films, frames)}


def frame_files(folder: str, frames: Sequence[np.ndarray]) -> Iterator[tuple[str, bytes]]:
    """Path and PNG of each frame [H, W, 3] uint8: the frame itself, no coding."""
    from PIL import Image

    for number, frame in enumerate(frames):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        yield f"{folder}/{frame_name(number)}", file.getvalue()


def frame_name(number: int) -> str:
    return f"{number:03d}.png"


def _ids(number: int, donor: int, forgery: str | None) -> str:
    return f"{number:03d}_{donor:03d}" if forgery else f"{number:03d}"


def _ffpp(number: int, donor: int, forgery: str | None, roles: Sequence[Role], seed: int) -> str:
    folder = f"manipulated_sequences/{forgery}" if forgery else "original_sequences/youtube"
    return f"{folder}/c{{crf}}/videos/{_ids(number, donor, forgery)}.mp4"


def _celebdf(number: int, donor: int, forgery: str | None, roles: Sequence[Role], seed: int) -> str:
    """Persons are numbered as they first appear; each take of one has a number, and so has each of its forgeries."""
    persons = list(dict.fromkeys(role.identity for role in roles))
    person, other = (f"id{persons.index(roles[i].identity)}" for i in (number, donor))
    take = [i for i, role in enumerate(roles) if role.identity == roles[number].identity].index(number)
    take *= len(SYNTH_METHODS)
    if forgery:
        return f"Celeb-synthesis/{person}_{other}_{take + SYNTH_METHODS.index(forgery):04d}.mp4"
    if number % YOUTUBE_EVERY == YOUTUBE_EVERY - 1:
        return f"YouTube-real/{number:05d}.mp4"
    return f"Celeb-real/{person}_{take:04d}.mp4"


def _dfdc(number: int, donor: int, forgery: str | None, roles: Sequence[Role], seed: int) -> str:
    """Names tell nothing; a forgery lies beside its original."""
    digest = hashlib.sha256(f"{seed} {number} {forgery}".encode()).digest()
    name = "".join(chr(ord("a") + byte % 26) for byte in digest[:DFDC_NAME])
    return f"dfdc_train_part_{number % 2}/{name}.mp4"


def _deepfakebench(number: int, donor: int, forgery: str | None, roles: Sequence[Role], seed: int) -> str:
    return f"{FRAME_SET}/{forgery or 'real'}/frames/{_ids(number, donor, forgery)}"


_NAMES = {"ffpp": _ffpp, "celebdf": _celebdf, "dfdc": _dfdc, "deepfakebench": _deepfakebench}


def _dfdc_metadata(films: Sequence[Film]) -> dict[str, str]:
    names = {film: PurePosixPath(film.path) for film in films}
    originals = {film.number: path.name for film, path in names.items() if not film.label}
    parts: dict[str, dict] = {}
    for film, path in names.items():
        entry = {"label": "FAKE" if film.label else "REAL", "split": film.split}
        if film.label:
            entry["original"] = originals[film.number]
        parts.setdefault(f"{path.parent}/metadata.json", {})[path.name] = entry
    return {name: _to_json(content) for name, content in parts.items()}


def _frame_list(films: Sequence[Film], frames: int) -> str:
    classes: dict[str, dict[str, dict]] = {}
    for film in films:
        kind = film.method if film.label else f"{FRAME_SET}_real"
        paths = [f"{film.path}/{frame_name(number)}" for number in range(frames)]
        videos = classes.setdefault(kind, {split: {} for split in SPLITS})[film.split]
        videos[PurePosixPath(film.path).name] = {"label": kind, "frames": paths}
    return _to_json({FRAME_SET: classes})


def _to_json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"
