"""The paper's experiments, run and set beside its figures.

runs/<model>-<digest>/                  a folder of `sdr train`; experiments that need the same model share it
evaluations/<model>-<digest>/*.json     its figures on one test set, with the digests of weights and clips
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sdr.checkpoint import load_model
from sdr.clip_cache import ClipCache
from sdr.datasets import read_json
from sdr.engine import processes
from sdr.errors import SDRError, escape
from sdr.evaluate import Group, dataset_name, evaluate_groups, score_videos
from sdr.fast import accelerate
from sdr.files import claim_folder, file_digest, make_folder, write_atomic
from sdr.protocol import DATASETS, DIGEST, Run, ordered_methods, plan
from sdr.published import AVERAGE, MANIPULATIONS, PUBLISHED, Published
from sdr.terminal import pick_device
from sdr.train import train as train_model
from sdr.train_config import TrainConfig

STAMP = "reproduction.json"
Ours = Mapping[tuple[str, str], tuple[Run, Group]]  # by row and layout of the test


class Stage(NamedTuple):
    """How far an experiment is: in run ``number`` of ``runs``, ``done`` of ``total`` steps or clips."""

    number: int
    runs: int
    row: str
    doing: str = ""
    done: int = 0
    total: int = 1
    figures: Mapping[str, float] = {}


@dataclass(frozen=True)
class Line:
    """Our figures and the published ones for one row and dataset, in percent.

    Args:
        row: of the paper's table.
        dataset: layout of the test set.
        run: name of ours; None where the figures are the paper's alone, or an average.
        real: videos of the test.
        fake: videos of the test.
        figures: ours, by the metric's name.
        intervals: of ours.
        published: the paper's, where it has any.
        comparable: both are of the same datasets, so that their difference means something.
    """

    row: str
    dataset: str
    run: str | None
    real: int | None
    fake: int | None
    figures: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    published: Published | None
    comparable: bool

    def paper(self, name: str) -> float | None:
        """The published figure of a metric."""
        known = (
            {} if self.published is None else dict(zip(("video AUC", "video accuracy"), self.published, strict=True))
        )
        return known.get(name)

    def difference(self, name: str) -> float | None:
        """Ours less the published figure, in percentage points."""
        paper = self.paper(name)
        return self.figures[name] - paper if self.comparable and self.figures and paper is not None else None


class Result(NamedTuple):
    """An experiment that has been run."""

    experiment: str
    config: TrainConfig
    runs: tuple[Run, ...]
    lines: tuple[Line, ...]
    synthetic: bool


def reproduce(
    experiment: str,
    config: TrainConfig,
    caches: Mapping[str, Path],
    out: str | Path,
    *,
    train: Callable = train_model,
    device: str = "auto",
    progress: Callable[[Stage], None] = lambda stage: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result | None:
    """Train and test every model of an experiment that is not yet; the same call goes on after an interruption.

    Args:
        experiment: table1, table2, table3 or figure2.
        config: of the full model.
        caches: folder of the clip cache, by layout.
        out: folder: new, or of an earlier call for whatever experiment.
        train: :func:`sdr.train.train`.
        device: auto, cpu, cuda or cuda:N.
        progress: called after every update of a training and batch of a test.
        stop: asked after every update and before every test; once it says True the call ends.

    Returns:
        The figures; None where ``stop`` ended the call.

    Raises:
        SDRError, ValueError: as :func:`sdr.protocol.plan`, or what training and scoring raise.
    """
    runs = plan(experiment, config, caches)
    chosen = pick_device(device)
    claim_folder(Path(out), STAMP, {"format": 1}, command="sdr reproduce")
    ours: dict[tuple[str, str], tuple[Run, Group]] = {}
    for number, run in enumerate(runs, 1):
        stage = Stage(number, len(runs), run.row)
        trained = train(
            run.config,
            run.data,
            run.validation,
            Path(out) / "runs" / run.name,
            origin=origin(run),
            device=chosen,
            progress=reporter(progress, stage._replace(doing="training")),
            stop=stop,
        )
        for test in run.tests:
            # several processes would not all see the signal before the same test
            if not trained.finished or (processes().world_size == 1 and stop()):
                return None
            report = reporter(progress, stage._replace(doing=f"testing on {DATASETS[dataset_name(test)]}"))
            kept = Path(out) / "evaluations" / run.name
            group = evaluate_run(run, trained.weights, test, kept, device=chosen, progress=report)
            ours[run.row, dataset_name(test)] = run, group
    synthetic = any(cache.settings.get("synthetic", False) for run in runs for cache in (run.data, *run.tests))
    return Result(experiment, config, tuple(runs), tuple(tabulate(experiment, ours, synthetic)), synthetic)


def reporter(progress: Callable[[Stage], None], stage: Stage) -> Callable[..., None]:
    """A progress of one stage, as training and scoring call it."""

    def report(done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        progress(stage._replace(done=done, total=total, figures=figures or {}))

    return report


def origin(run: Run) -> str:
    """One sentence for the weights."""
    kind = "synthetic matched-marginals" if run.data.settings.get("synthetic", False) else DATASETS["ffpp"]
    V = run.config.model.num_branches
    name = "FTCN" if run.config.architecture == "ftcn" else f"SDR of {V} {'branch' if V == 1 else 'branches'}"
    fakes = ", ".join(ordered_methods(run.data))
    return escape(f"{name}, trained on {len(run.data.records)} {kind} videos: real and {fakes}")


def evaluate_run(
    run: Run,
    weights: Path,
    test: ClipCache,
    folder: Path,
    *,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Group:
    """The figures of a model on a test set, kept in ``folder`` for as long as weights and clips stay what they are."""
    make_folder(folder)
    path = folder / f"{dataset_name(test)}-{test.digest[:DIGEST]}.json"
    key = {"weights": file_digest(weights), "clips": test.digest}
    if path.is_file() and (kept := read_evaluation(path, key)):
        return kept
    model, info = load_model(weights)
    model = accelerate(model.to(device))
    scored = score_videos(model, test, batch_size=run.config.batch_size, device=device, progress=progress)
    threshold = info.metrics.get("validation threshold")
    group, *_ = evaluate_groups(scored, validation_threshold=threshold)
    if processes().rank == 0:
        facts = {**key, "validation threshold": threshold, "group": group._asdict()}
        write_atomic(path, json.dumps(facts, indent=1) + "\n")
    return group


def read_evaluation(path: Path, key: Mapping[str, str]) -> Group | None:
    """Figures that were kept; None where they are of other weights or clips; raises SDRError for a broken file."""
    kept = read_json(path)
    try:
        if any(kept[name] != value for name, value in key.items()):
            return None
        group = Group(**kept["group"])
        return group._replace(intervals={name: (low, high) for name, (low, high) in group.intervals.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SDRError(path, "is not what sdr reproduce wrote", "remove it, and the model is tested anew") from error


def tabulate(experiment: str, ours: Ours, synthetic: bool) -> Iterator[Line]:
    """A line for each test, then those of the table that have no test: its average, and what only the paper has."""
    published = PUBLISHED[experiment]
    for (row, dataset), (run, group) in ours.items():
        figures = {name: 100 * value for name, value in group.metrics.items()}
        bounds = {name: (100 * low, 100 * high) for name, (low, high) in group.intervals.items()}
        paper = published.get((row, dataset))
        yield Line(row, dataset, run.name, group.real, group.fake, figures, bounds, paper, comparable=not synthetic)
    for (row, dataset), paper in published.items():
        if (row, dataset) not in ours:
            whole = row == AVERAGE
            figures = mean_figures([group for _, group in ours.values()]) if whole else {}
            comparable = whole and not synthetic and {method for method, _ in ours} == set(MANIPULATIONS)
            yield Line(row, dataset, None, None, None, figures, {}, paper, comparable)


def mean_figures(groups: list[Group]) -> dict[str, float]:
    """The mean of each metric, in percent."""
    return {name: 100 * float(np.mean([group.metrics[name] for group in groups])) for name in groups[0].metrics}
