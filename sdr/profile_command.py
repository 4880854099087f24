"""`sdr profile`: where the time and memory of a model go on this machine, measured and printed."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from sdr.config import PRESETS
from sdr.errors import SDRError, escape
from sdr.files import write_atomic
from sdr.terminal import pick_device, progress_bars, refusals, require, settings
from sdr.train_command import DEFAULT_PRESET, find_preset

STEPS = (
    "ceilings", "model", "memory", "throughput", "latency", "stages", "kernels", "memory by stage", "loader", "trace"
)  # fmt: skip
QUIET = "99"  # above every level of the profiler's own log, which would write among the progress bars


def add_profile_arguments(parser, argv: Sequence[str] = ()) -> None:
    """The options of `sdr profile`, but for the device.

    Args:
        parser: of jsonargparse.
        argv: the command line, whose preset gives the model's defaults.
    """
    from sdr.profile_work import ProfileConfig

    parser.add_argument(
        "--preset",
        type=Literal[tuple(PRESETS)],
        default=DEFAULT_PRESET,
        help="gives every setting of the model that is not given",
    )
    parser.add_class_arguments(ProfileConfig, skip={"train"})
    parser.add_argument("--train", action="store_true", help="profile an update instead of a forward pass")
    parser.add_argument("--trace", type=str | None, help="file for a Chrome trace, with ranges by stage")
    parser.add_argument("--json", type=str | None, help="file for everything that is printed, and more")
    preset = find_preset(argv)
    if isinstance(preset, str) and preset in PRESETS:
        parser.set_defaults({"preset": preset, "model": asdict(PRESETS[preset]())})


def run_profile(options) -> int:
    from sdr.profile import profile
    from sdr.profile_text import show
    from sdr.profile_work import ProfileConfig

    config = settings(ProfileConfig, options)
    if config.weights is not None and config.model != PRESETS[options.preset]():
        raise SDRError("options", "model's settings are those of the weights: give either", "leave out --model")
    device = pick_device(options.device)
    targets = [path for path in (options.trace, options.json) if path is not None]
    for path in targets:
        check_target(path)
    if len({Path(path).resolve() for path in targets}) < len(targets):
        raise SDRError(options.json, "is to hold the trace too", "give --trace and --json a file each")
    if config.data is not None:
        require("prepare")
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    with step_bar() as say, refusals():
        report = profile(config, device, trace=options.trace, say=say)
    show(report)
    if options.json is not None:
        try:
            write_atomic(options.json, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise SDRError(options.json, f"cannot be written: {error.strerror}") from error
    for name in ("trace", "json"):
        if (path := getattr(options, name)) is not None:
            print(f"{name}: {escape(Path(path).resolve())}")
    return 0


def check_target(path: str) -> None:
    """Raise SDRError for a file that could not be written, before anything is measured."""
    folder = Path(path).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise SDRError(path, "cannot be written: its folder is missing or not writable")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise SDRError(path, "is not a regular file, so it is not replaced")


@contextmanager
def step_bar() -> Iterator:
    """A bar that moves on with every measurement; tells what is being measured."""
    with progress_bars() as bars:
        bar = bars.add_task("model", total=len(STEPS))

        def say(what: str) -> None:
            bars.update(bar, description=what, completed=STEPS.index(what.partition(":")[0]))

        yield say
        bars.update(bar, description="done", completed=len(STEPS))
