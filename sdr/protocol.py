"""The paper's experiments as models to train: with which configuration, on which clips, and what each is tested on."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdr.clip_cache import ClipCache, leaks, read_manifest, read_settings
from sdr.config import TPA_METHODS, TPAConfig, check, check_choice
from sdr.errors import SDRError, escape
from sdr.evaluate import require_classes, require_shape
from sdr.files import file_digest
from sdr.published import MANIPULATIONS
from sdr.train import FREE
from sdr.train_config import TrainConfig, flatten, to_json

DATASETS = {"ffpp": "FaceForensics++", "celebdf": "Celeb-DF-v2", "dfdc": "DFDC"}  # by layout
EXPERIMENTS = {  # what each tests on; all train on ffpp
    "table1": ("ffpp",),
    "table2": ("celebdf", "dfdc"),
    "table3": ("celebdf", "dfdc"),
    "figure2": ("celebdf", "dfdc", "ffpp"),
}
BRANCHES = range(1, 7)  # V of Figure 2
DIGEST = 12  # letters of one in a file's name


class Row(NamedTuple):
    """One row of a table; ``learns`` and the tests name the fakes' methods, None is all that there are."""

    label: str
    config: TrainConfig
    learns: tuple[str, ...] | None
    tests: tuple[tuple[str, tuple[str, ...] | None], ...]  # layout and methods


class Run(NamedTuple):
    """A model to train and what it is tested on; ``name`` is that of its folder."""

    name: str
    row: str
    config: TrainConfig
    data: ClipCache
    validation: ClipCache | None
    tests: tuple[ClipCache, ...]


def find_caches(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Clip caches by the layout of what they were cut from; raises SDRError for one of no use here, or two of one."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        layout = read_settings(folder).get("layout")
        if not isinstance(layout, str) or layout not in DATASETS:
            raise SDRError(folder, f"is of the layout {layout!r}", f"the experiments use {', '.join(DATASETS)}")
        if layout in found:
            raise SDRError(folder, f"is of the layout {layout}, and so is {escape(found[layout])}", "give one of each")
        found[layout] = folder
    return found


def plan(experiment: str, config: TrainConfig, caches: Mapping[str, Path]) -> list[Run]:
    """The models of an experiment, with the clips that each learns from, is validated on and is tested on.

    Args:
        experiment: table1, table2, table3 or figure2.
        config: of the full model; the other rows are made from it.
        caches: folder of the clip cache, by layout.

    Raises:
        SDRError: a cache is missing, its clips are not of the model's size, a part of it has no real or no fake video,
            or a person or file is in training and test.
        ValueError: ``config`` is not that of a full SDR.
    """
    check_choice("experiment", experiment, tuple(EXPERIMENTS))
    check_full(config)
    if missing := [layout for layout in ("ffpp", *EXPERIMENTS[experiment]) if layout not in caches]:
        raise SDRError("--data", f"{experiment} needs a clip cache of the layout {missing[0]}", "sdr prepare makes one")
    refuse_leaks(caches, EXPERIMENTS[experiment])
    select = functools.cache(functools.partial(select_clips, caches, config))
    methods = ordered_methods(select("ffpp", "train", None))
    return [make_run(row, select) for row in plan_rows(experiment, config, methods)]


def check_full(config: TrainConfig) -> None:
    """Raise ValueError for a configuration that leaves out what a row of Table III adds."""
    check(config.architecture == "sdr", "architecture", "be sdr, of which the rows are made", config.architecture)
    check(not config.tpa.per_frame, "tpa.per_frame", "be empty, it is a row of its own", sorted(config.tpa.per_frame))
    check(
        config.loss.contrastive > 0, "loss.contrastive", "be positive, 0 is a row of its own", config.loss.contrastive
    )


def plan_rows(experiment: str, config: TrainConfig, methods: Sequence[str]) -> Iterator[Row]:
    """The rows of the paper's table; ``methods`` are the fakes that FaceForensics++ has."""
    everything = tuple((layout, None) for layout in EXPERIMENTS[experiment])
    if experiment == "table1":
        if len(methods) < 2:
            raise SDRError("--data", f"table1 leaves one manipulation out, and ffpp has only {escape(methods[0])}")
        for held_out in methods:
            others = tuple(method for method in methods if method != held_out)
            yield Row(held_out, config, others, (("ffpp", (held_out,)),))
    elif experiment == "table2":
        yield Row("SDR", config, None, everything)
    elif experiment == "table3":
        for label, ablation in ablations(config).items():
            yield Row(label, ablation, None, everything)
    else:
        for V in BRANCHES:
            yield Row(f"V = {V}", replace(config, model=replace(config.model, num_branches=V)), None, everything)


def ablations(config: TrainConfig) -> dict[str, TrainConfig]:
    """The rows of Table III, each with what the row before has and one part more."""
    plain = replace(config, loss=replace(config.loss, contrastive=0.0))
    return {
        "FTCN": replace(config, architecture="ftcn", implementation="reference", tpa=TPAConfig(methods=("none",))),
        "+ TRFI": replace(plain, tpa=replace(config.tpa, per_frame=frozenset(TPA_METHODS))),
        "+ TPA": plain,
        "+ contrastive": config,
    }


def ordered_methods(cache: ClipCache) -> list[str]:
    """The fakes' methods, those of the paper first and in its order."""
    there = list(dict.fromkeys(record.method for record in cache.records if record.label))
    paper = [method for method in MANIPULATIONS if method in there]
    return paper + [method for method in there if method not in paper]


def select_clips(
    caches: Mapping[str, Path], config: TrainConfig, layout: str, split: str, methods: tuple[str, ...] | None
) -> ClipCache:
    """One split of a cache, fit for the model and of both classes; raises SDRError where it is not."""
    cache = ClipCache(caches[layout], split=split, methods=methods)
    require_shape(cache, config.model)
    fakes = f" with {escape(', '.join(methods))}" if methods else ""
    labels = [record.label for record in cache.records]
    require_classes(cache.folder, labels, f" in its split {split}{fakes}")
    return cache


def refuse_leaks(caches: Mapping[str, Path], tests: Sequence[str]) -> None:
    """Raise SDRError where a person, or a file, that is learned from or validated on is tested on, in any dataset."""
    names = ("identity", "video_sha256", "split", "video")
    rows = []
    for layout in dict.fromkeys(("ffpp", *tests)):
        splits = [*["train", "val"] * (layout == "ffpp"), *["test"] * (layout in tests)]
        table = read_manifest(caches[layout], names)
        for identity, sha, split, video in zip(*(table[name] for name in names), strict=True):
            if split in splits:
                rows.append((f"{identity} of {layout}", sha, split, video))  # one name is one person in one dataset
    for leak in leaks(dict(zip(names, zip(*rows, strict=True), strict=True))):
        raise SDRError(caches["ffpp"], leak, "its test would say nothing")


def make_run(row: Row, select: Callable[[str, str, tuple[str, ...] | None], ClipCache]) -> Run:
    """A row with its clips; the name is the same wherever the same model is trained on the same clips."""
    data = select("ffpp", "train", row.learns)
    validation = select("ffpp", "val", row.learns) if "val" in data.splits else None
    settings = {name: value for name, value in flatten(to_json(row.config)).items() if name not in FREE}
    facts = [settings, data.digest]  # the digest is of the whole manifest, so of the validation too
    facts += [file_digest(Path(row.config.init))] if row.config.init else []
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:DIGEST]
    tests = tuple(select(layout, "test", methods) for layout, methods in row.tests)
    return Run(f"{describe(row)}-{digest}", row.label, row.config, data, validation, tests)


def describe(row: Row) -> str:
    """What is trained, as a folder may be called."""
    c = row.config
    words = ["ftcn"] if c.architecture == "ftcn" else [f"sdr_v{c.model.num_branches}"]
    if c.architecture == "sdr":
        words += ["per_frame"] * bool(c.tpa.per_frame) + ["no_contrastive"] * (c.loss.contrastive == 0)
    words += ["without", re.sub(r"[^A-Za-z0-9]+", "_", row.label)[:40]] if row.learns else []
    return "_".join(words)
