"""`sdr train`: a clip cache in; weights, logs, a report and a model card out."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Literal

from sdr.errors import SDRError, escape
from sdr.settings_file import read_settings_file
from sdr.stopping import stopping
from sdr.terminal import SYNTHETIC_NOTE, pick_device, progress_bars, require, settings

DEFAULT_PRESET = "tiny"
SECTIONS = ("model", "loader", "grouped", "loss", "tpa")  # of a configuration file


def files_first(argv: Sequence[str]) -> list[str]:
    """The command line with its configuration files before its options, which so go before what the files say."""
    files, rest, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            files += [word, *islice(words, 1)]
        else:
            (files if word.startswith("--config=") else rest).append(word)
    return [*rest[:1], *files, *rest[1:]]


def find_preset(argv: Sequence[str]) -> object:
    """The preset that a command line, or the last configuration file on it that has one, names.

    A wrong name is left to the parser, which reads them again.

    Raises:
        SDRError: a file is not one of plain settings.
    """
    preset: object = DEFAULT_PRESET
    for number, word in enumerate(argv):
        name, given, value = word.partition("=")
        value = value if given else next(iter(argv[number + 1 :]), "")
        if name == "--preset":
            preset = value
        elif name == "--config":
            preset = read_settings_file(value, SECTIONS).get("preset", preset)
    return preset


def add_train_arguments(parser, argv: Sequence[str] = ()) -> None:
    """What every command that trains takes: a file, a preset and each field of TrainConfig, in the order of precedence.

    Args:
        parser: of jsonargparse.
        argv: the command line, whose preset gives the fields' defaults.
    """
    from sdr.train_config import TRAIN_PRESETS, TrainConfig, to_json

    parser.add_argument("--config", action="config", help="YAML or JSON file of settings; --print_config writes one")
    parser.add_argument(
        "--preset",
        type=Literal[tuple(TRAIN_PRESETS)],
        default=DEFAULT_PRESET,
        help="of the model and its training; gives every setting below that is not given",
    )
    parser.add_class_arguments(TrainConfig)
    preset = find_preset(argv)
    if isinstance(preset, str) and preset in TRAIN_PRESETS:
        parser.set_defaults({"preset": preset, **to_json(TRAIN_PRESETS[preset]())})


def read_train_config(options):
    """The run's TrainConfig out of a command's options."""
    from sdr.train_config import TrainConfig

    return settings(TrainConfig, options)


def add_train_data_arguments(parser) -> None:
    parser.add_argument("--data", type=str, required=True, help="cache that sdr prepare wrote")
    parser.add_argument("--out", type=str, required=True, help="folder of the run: new, or of one that goes on")
    parser.add_argument(
        "--methods",
        type=list[str] | None,
        help="manipulations to train on, as '[Deepfakes,FaceSwap]'; default: all there are",
    )


def run_train(options) -> int:
    from sdr.clip_cache import ClipCache
    from sdr.engine import processes
    from sdr.train import train

    config = read_train_config(options)
    device = pick_device(options.device)
    require("prepare", "train", "report")
    data = ClipCache(options.data, split="train", methods=options.methods)
    validation = ClipCache(options.data, split="val", methods=options.methods) if "val" in data.splits else None
    main = processes().rank == 0
    if validation is None and main:
        print("note: the cache has no split val: nothing is validated, the last weights are kept", file=sys.stderr)
    refuse_leaks(options.data)
    with training_bars(visible=main) as progress, stopping() as stop:
        trained = False

        def report(step: int, steps: int, figures: Mapping[str, float]) -> None:
            nonlocal trained
            trained = True
            progress(step, steps, figures)

        result = train(
            config,
            data,
            validation,
            options.out,
            origin=describe(options.preset, config, data),
            command={"preset": options.preset, "methods": options.methods},
            device=device,
            progress=report,
            stop=stop,
        )
    if not result.finished:
        if main:
            again = f"the same command goes on from there: {escape(Path(options.out).resolve())}"
            print(f"sdr train: stopped after a checkpoint; {again}", file=sys.stderr)
        return stop.code
    if main:
        if not trained:
            print("the run was finished before: nothing was trained", file=sys.stderr)
        for name, value in result.metrics.items():
            print(f"validation {name}: {value:.4f}")
        if data.settings.get("synthetic", False):
            print(SYNTHETIC_NOTE)
        print(f"weights: {escape(result.weights.resolve())}")
        print(f"report: {escape(result.weights.with_name('report.html').resolve())}")
    return 0


def refuse_leaks(folder: str | Path) -> None:
    """Raise SDRError where a person or a file stands in both train and val."""
    from sdr.clip_cache import leaks, read_manifest

    table = read_manifest(Path(folder), ("identity", "video_sha256", "split", "video"))
    for leak in leaks(table, ("train", "val")):
        raise SDRError(folder, leak, "its validation would say nothing")


def describe(preset: str, config, data) -> str:
    """What the weights say of their origin."""
    from sdr.train_config import TRAIN_PRESETS

    preset += "" if config.model == TRAIN_PRESETS[preset]().model else " with changes"
    kind = "synthetic matched-marginals" if data.settings.get("synthetic") else data.settings.get("layout", "cached")
    methods = sorted({record.method for record in data.records if record.label})
    return f"{preset}, trained on {len(data.records)} {kind} videos, fakes by {', '.join(methods)}"


@contextmanager
def training_bars(description: str = "training", *, visible: bool = True) -> Iterator[Callable]:
    """A progress bar with loss, speed, memory and the time that is left, as ``train``'s ``progress``."""
    with progress_bars("{task.fields[figures]}") as bars:
        bar = bars.add_task(description, total=None, visible=False, figures="")

        def report(step: int, steps: int, figures: Mapping[str, float]) -> None:
            bars.update(bar, completed=step, total=steps, visible=visible, figures=say(figures))

        yield report


def say(figures: Mapping[str, float]) -> str:
    """The figures of a look at the losses in a few words."""
    if not figures:
        return ""
    memory = f"  {figures['memory_gb']:.1f} GB" if figures["memory_gb"] else ""
    return f"loss {figures['total']:.3f}  {figures['clips_per_second']:.3g} clips/s{memory}"
