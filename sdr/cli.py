"""The command line: sdr score | synth | prepare | train | evaluate | reproduce | study | profile | convert.

Exit codes: 0 all done; 1 some videos were not scored or prepared, or a check found something; 2 the command could not
be done: bad usage, or a file or setting that it cannot do without is unusable; 130 interrupted, 143 ended by SIGTERM,
141 nobody reads what is printed.
"""

import io
import os
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from sdr.errors import SDRError, escape
from sdr.evaluate_command import add_evaluate_arguments, run_evaluate
from sdr.prepare_command import run_prepare
from sdr.profile_command import add_profile_arguments, run_profile
from sdr.reproduce_command import add_reproduce_arguments, run_reproduce
from sdr.score_command import run_score
from sdr.study_command import add_study_arguments, run_study_command
from sdr.terminal import leave_processes, progress_bars, refusals
from sdr.train_command import add_train_arguments, add_train_data_arguments, files_first, run_train


def build_parser(argv: Sequence[str] = ()):
    """All commands and their options; importing jsonargparse waits until a command line is read.

    Args:
        argv: the command line, whose ``--preset`` gives the defaults of those that train.
    """
    import jsonargparse

    import sdr
    from sdr.cutting import PrepareConfig
    from sdr.datasets import SPLITS
    from sdr.layouts import LAYOUTS
    from sdr.score import ScoreConfig
    from sdr.synth import synthesize

    jsonargparse.set_parsing_settings(import_path_denylist=["*"])  # no option names a class
    # spelled in part, --config would be read without having been looked through
    ArgumentParser = partial(jsonargparse.ArgumentParser, allow_abbrev=False)
    parser = ArgumentParser(prog="sdr", description=sdr.__doc__, version=sdr.__version__)
    commands = parser.add_subcommands()

    score = ArgumentParser(description="Score videos; writes scores.jsonl, scores.csv and report.html.")
    score.add_argument("paths", nargs="+", help="video files, or folders that are searched for them")
    score.add_argument("--weights", type=str | None, help="safetensors; default: the demonstration weights")
    score.add_argument("--out", type=str, default="sdr_scores", help="folder; the same command goes on there")
    score.add_argument("--truth", type=str | None, help="CSV path,label[,split] of known labels: adds AUC and accuracy")
    score.add_argument("--split", type=str | None, help="with --truth: score only the videos of this split")
    score.add_class_arguments(ScoreConfig)
    add_device_argument(score)
    add_face_arguments(score)
    commands.add_subcommand("score", score)

    synth = ArgumentParser(description="Write synthetic real and fake videos in a dataset's layout.")
    synth.add_argument("out", type=str, help="folder; empty or missing")
    synth.add_function_arguments(synthesize, skip={"out", "progress"})
    synth.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands.add_subcommand("synth", synth)

    prepare = ArgumentParser(description="Make a clip cache of a dataset, or go on with one; or check one.")
    prepare.add_argument("root", type=str | None, nargs="?", help="folder of the dataset, or the CSV file of videos")
    prepare.add_argument("--layout", type=Literal[LAYOUTS] | None, help="of the dataset")
    prepare.add_argument("--out", type=str | None, help="folder of the cache: new, or of an earlier run")
    prepare.add_argument("--check", metavar="CACHE", type=str | None, help="only verify it: counts, checksums, splits")
    prepare.add_argument("--splits", type=str | None, help="official split files: a file, or a folder that holds them")
    prepare.add_argument(
        "--split", type=list[Literal[SPLITS]] | None, help="only these, as '[train,val]'; default: all"
    )
    prepare.add_argument(
        "--compression",
        type=str,
        default="c23",
        help="of FaceForensics++ and DeepfakeBench's lists of it: c23, c40 or raw",
    )
    methods = "manipulations to read, as '[Deepfakes,FaceSwap]'; default: all there are"
    prepare.add_argument("--methods", type=list[str] | None, help=methods)
    prepare.add_argument("--workers", type=int, default=2, help="processes that decode, find faces and cut")
    prepare.add_argument("--max_bad", type=float, default=0.01, help="share of unusable videos that is accepted")
    prepare.add_argument("--retry", action="store_true", help="try again what was unusable, cut anew what has changed")
    prepare.add_class_arguments(PrepareConfig)
    add_face_arguments(prepare)
    commands.add_subcommand("prepare", prepare)

    usage = "sdr train --data CACHE --out RUN [--config FILE] [--preset NAME] [--field value ...]"
    train = ArgumentParser(usage=usage, description="Train a model on the clips of a cache, or go on with a run.")
    add_train_data_arguments(train)
    add_train_arguments(train, argv)
    add_device_argument(train)
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands.add_subcommand("train", train)

    evaluate = ArgumentParser(description="Video-level metrics of weights on clip caches, with intervals.")
    add_evaluate_arguments(evaluate)
    commands.add_subcommand("evaluate", evaluate)

    usage = (
        "sdr reproduce {table1,table2,table3,figure2} --data CACHE ... [--out OUT] [--preset NAME] [--field value ...]"
    )
    reproduce = ArgumentParser(
        usage=usage, description="An experiment of the paper, ours beside the published figures."
    )
    add_reproduce_arguments(reproduce, argv)
    commands.add_subcommand("reproduce", reproduce)

    study = ArgumentParser(description="A study on synthetic videos, from nothing to its table.")
    add_study_arguments(study)
    commands.add_subcommand("study", study)

    profile = ArgumentParser(description="Where a model's time and memory go on this machine, and what to change.")
    add_profile_arguments(profile, argv)
    add_device_argument(profile)
    profile.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands.add_subcommand("profile", profile)

    convert = ArgumentParser(description="Convert an FTCN checkpoint to safetensors.")
    convert.add_argument("source", type=str, help="FTCN's published checkpoint (.pth)")
    convert.add_argument("target", type=str, help="safetensors file to write")
    convert.add_argument("--to", type=Literal["ftcn", "sdr"], default="ftcn", help="the single branch or all")
    convert.add_argument("--num_branches", type=int, default=4, help="of --to sdr")
    convert.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands.add_subcommand("convert", convert)
    for command in commands.choices.values():
        leave_out_sections(command)
    return parser


def leave_out_sections(parser) -> None:
    """Take away the options that open a file for a whole section, as `--model` for `--model.width` and its like."""
    options = parser._option_string_actions
    for name in [name for name in options if any(other.startswith(f"{name}.") for other in options)]:
        options.pop(name).help = SUPPRESS


def add_face_arguments(parser) -> None:
    """What every command that finds faces takes."""
    parser.add_argument(
        "--detector", type=Literal["centerface", "retinaface"], default="centerface", help="face detector"
    )
    parser.add_argument("--detector_weights", type=str | None, help="file or folder, so that nothing is downloaded")
    parser.add_argument("--cache", type=str | None, help="folder for detections; default: the user's cache folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_device_argument(parser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = files_first(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale may not know the letters of a path
    try:
        parser = build_parser(argv)
    except SDRError as error:
        print(f"sdr: {error}", file=sys.stderr)
        return 2
    try:
        arguments = parser.parse_args(argv)
    except (ImportError, OverflowError, RecursionError) as error:  # of a class, number or brackets that no setting has
        print(f"sdr: options: {error}", file=sys.stderr)
        return 2
    command = arguments.subcommand
    run = COMMANDS[command]
    try:
        with refusals():
            options = parser.instantiate(arguments)[command]
        code = run(options)
        sys.stdout.flush()
        return code
    except SDRError as error:
        if arguments[command].debug:
            raise
        print(f"sdr {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sdr {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read what is printed has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        leave_processes()


def run_synth(options) -> int:
    from sdr.synth import synthesize

    settings = {name: value for name, value in vars(options).items() if name not in ("debug", "config")}
    with progress_bars() as bars:
        bar = bars.add_task("videos", total=None, visible=False)  # until the settings are found sound

        def report(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total, visible=True)

        with refusals():
            synthesize(**settings, progress=report)
    print(f"videos: {escape(Path(options.out).resolve())}")
    return 0


def run_convert(options) -> int:
    from sdr.checkpoint import convert

    with refusals():
        model = convert(options.source, options.target, to=options.to, num_branches=options.num_branches)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} with {count / 1e6:.3f} M parameters: {escape(Path(options.target).resolve())}")
    return 0


COMMANDS = {
    "score": run_score,
    "synth": run_synth,
    "prepare": run_prepare,
    "train": run_train,
    "evaluate": run_evaluate,
    "reproduce": run_reproduce,
    "study": run_study_command,
    "profile": run_profile,
    "convert": run_convert,
}
