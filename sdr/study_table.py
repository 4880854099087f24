"""A study's figures: means over seeds with Student's intervals, each model beside SDR, and what may be said of them."""

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sdr.files import to_csv, write_atomic
from sdr.study_config import FULL, MODELS, SEEN, UNSEEN, StudyConfig, study_settings
from sdr.terminal import SYNTHETIC_NOTE

LEVEL = 0.95  # of every interval
METRICS = ("AUC", "ACC", "ACC at validation threshold")
FIELDS = ("seed", "held_out", "test", "model", *METRICS, "real", "fake", "parameters", "seconds", "device")
MEAN, FALL = "mean of the types", "aligned less reversed"
TITLES = {
    "heldout": "A forgery type that training never saw",
    "shortcut": "A spatial cue that agrees with the label in training and is reversed in testing",
}
Series = Mapping[tuple[str, str, str], Mapping[int, float]]  # a metric by seed, of (table, column, model)


class Estimate(NamedTuple):
    """A mean over seeds and the bounds of its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Line(NamedTuple):
    """A metric of one model on one test; ``difference`` is SDR's less this model's, paired by seed."""

    table: str
    column: str
    model: str
    metric: str
    value: Estimate
    difference: Estimate | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and Student's t interval of LEVEL, for values that are independent and roughly normal."""
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def series(study: str, rows: Sequence[Mapping], metric: str) -> Series:
    """The metric by seed for every table, column and model; with the mean over types, or the fall by the cue."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        place = (row["test"], row["held_out"]) if study == "heldout" else ("", row["test"])
        found.setdefault((*place, row["model"]), {})[row["seed"]] = row[metric]
    tables = dict.fromkeys(table for table, _, _ in found)
    for table in tables:
        for model in MODELS[study]:
            parts = {column: values for (t, column, m), values in found.items() if (t, m) == (table, model)}
            seeds = sorted(next(iter(parts.values())))
            if study == "heldout":
                mean = {seed: math.fsum(part[seed] for part in parts.values()) / len(parts) for seed in seeds}
                found[table, MEAN, model] = mean
            else:
                fall = {seed: parts["aligned"][seed] - parts["reversed"][seed] for seed in seeds}
                found[table, FALL, model] = fall
    return found


def summarise(study: str, rows: Sequence[Mapping]) -> list[Line]:
    """Every metric of every model on every test."""
    lines = []
    for metric in METRICS:
        found = series(study, rows, metric)
        for (table, column, model), values in found.items():
            full = found[table, column, FULL]
            less = None if model == FULL else estimate([full[seed] - values[seed] for seed in sorted(values)])
            lines.append(Line(table, column, model, metric, estimate(list(values.values())), less))
    return lines


def statements(study: str, rows: Sequence[Mapping], lines: Sequence[Line]) -> list[str]:
    """What the figures show and what they do not, a sentence or two each: made of the figures, whatever they are."""
    said = list(comparisons(lines, UNSEEN) if study == "heldout" else falls(lines))
    tested = [row["AUC"] for row in rows if row["test"] in (UNSEEN, "reversed")]
    top = sum(auc == 1 for auc in tested)
    where = "the type that they never saw" if study == "heldout" else "the reversed cue"
    said.append(f"{top} of {len(tested)} models have an AUC of 1 on {where}: above that no difference can show.")
    return said


def comparisons(lines: Sequence[Line], table: str) -> Iterator[str]:
    """Where SDR has the higher AUC, where the lower, and where neither is shown; a sentence for each other model."""
    wins = {}
    for model in dict.fromkeys(line.model for line in lines if line.difference):
        chosen = [x for x in lines if (x.table, x.model, x.metric) == (table, model, "AUC")]
        higher = [x.column for x in chosen if x.difference.low > 0]
        lower = [x.column for x in chosen if x.difference.high < 0]
        neither = [x.column for x in chosen if x.column not in (*higher, *lower)]
        parts = {"higher for": higher, "lower for": lower, "neither shown for": neither}
        wins[model] = len(higher) == len(chosen)
        yield f"AUC of {FULL} against {model}: " + "; ".join(f"{k} {', '.join(v)}" for k, v in parts.items() if v) + "."
    lost = [model for model, won in wins.items() if not won]
    if lost:
        yield f"{FULL} is not shown to be better on every type than {', '.join(lost)}."


def falls(lines: Sequence[Line]) -> Iterator[str]:
    """How far the AUC of each model falls when the cue turns round."""
    for line in lines:
        if (line.column, line.metric) == (FALL, "AUC"):
            fell = f"falls by {line.value} when the cue turns round" if line.value.low > 0 else "is not shown to fall"
            yield f"AUC of {line.model} {fell}."
    worse = [x for x in lines if (x.column, x.metric) == ("reversed", "AUC") and x.difference]
    for line in worse:
        if line.difference.low > 0 or line.difference.high < 0:
            sign = "higher" if line.difference.low > 0 else "lower"
            yield f"With the cue reversed the AUC of {FULL} is {sign} than that of {line.model}: by {line.difference}."
        else:
            yield f"With the cue reversed no difference of AUC is shown between {FULL} and {line.model}."


def notes(study: str, config: StudyConfig) -> list[str]:
    """What a reader must know of the figures."""
    said = [
        SYNTHETIC_NOTE,
        f"In brackets: {LEVEL:.0%} intervals of the mean over {config.seeds} seeds, by Student's t. A seed is that of "
        "initialisation, order, augmentation and dropout. The videos are the same for all of them, so the intervals do "
        "not tell what other videos would change. They may pass 1, and no correction is made for their number.",
        f"Differences are {FULL}'s figure less the other model's with the same seed. The weights of the last update "
        "are tested; none are chosen by a validation.",
    ]
    if study == "heldout":
        said.append(
            "FullJitter varies all that the three other types vary one by one: where one of those is held out, its "
            "parameter was still seen to vary, in FullJitter; where FullJitter is held out, all its parts were seen."
        )
    else:
        said.append(
            "The cue: horizontal stripes, constant over time, where clips without it carry the same stripes upright. "
            "aligned: fakes carry it, as in training. reversed: real videos do. absent: none does. A network of "
            "kernels Kt x 1 x 1 and square pools scores a clip as it scores the clip's transpose, so that it can tell "
            "the stripes apart only by how they lie on the face; the plain 3D ResNet has kernels of 3 x 3 in space."
        )
    return said


def render_markdown(study: str, scale: str, config: StudyConfig, rows: Sequence[Mapping]) -> str:
    """The tables with their scale, statements and notes."""
    lines = summarise(study, rows)
    text = [f"# {TITLES[study]}", "", *(f"- {name}: {value}" for name, value in describe(scale, config, rows).items())]
    text += ["", "## What the figures show", "", *(f"- {said}" for said in statements(study, rows, lines))]
    for table in dict.fromkeys(line.table for line in lines):
        for metric in METRICS if table != SEEN else METRICS[:1]:
            chosen = [line for line in lines if (line.table, line.metric) == (table, metric)]
            text += ["", f"## {', '.join(filter(None, (metric, table)))}", "", *grid(chosen, "value")]
            if metric == "AUC" and table != SEEN:
                text += ["", f"{FULL} less the model:", "", *grid([x for x in chosen if x.difference], "difference")]
    text += ["", "## Cost", "", *cost(rows), "", "## Notes", ""]
    return "\n".join([*text, *(f"- {note}" for note in notes(study, config))]) + "\n"


def grid(lines: Sequence[Line], attribute: str) -> list[str]:
    """A Markdown table: models down, tests across."""
    columns = list(dict.fromkeys(line.column for line in lines))
    cells = {(line.model, line.column): str(getattr(line, attribute)) for line in lines}
    table = [["model", *columns], ["---"] * (1 + len(columns))]
    for model in dict.fromkeys(line.model for line in lines):
        table.append([model, *(cells[model, column] for column in columns)])
    return [f"| {' | '.join(row)} |" for row in table]


def cost(rows: Sequence[Mapping]) -> list[str]:
    """Parameters and time of each model, as a Markdown table."""
    table = ["| model | parameters | seconds a run, mean |", "| --- | --- | --- |"]
    for model in dict.fromkeys(row["model"] for row in rows):
        runs = {(row["held_out"], row["seed"]): row for row in rows if row["model"] == model}.values()
        seconds = math.fsum(row["seconds"] for row in runs) / len(runs)
        table.append(f"| {model} | {next(iter(runs))['parameters']:,} | {seconds:.0f} |")
    return table


def describe(scale: str, config: StudyConfig, rows: Sequence[Mapping]) -> dict[str, str]:
    """How large the study was, and where it ran."""
    train, model = config.train, config.train.model
    tested = sorted({(row["test"], f"{row['real']} real + {row['fake']} fake") for row in rows})
    return {
        "Scale": f"{scale}: clips of {model.num_frames} frames of {model.image_size} x {model.image_size} pixels",
        "Models": f"width {model.width}, {model.backbone_stages} stages, {model.num_branches} branches of SDR",
        "Training": f"{train.epochs} epochs of batches of {train.batch_size} clips, learning rate {train.lr:g}, "
        f"{train.precision}",
        "Data": f"`sdr synth`, {config.identities} identities, those of the test in no other split",
        "Tested on": "; ".join(f"{test}: {videos} videos" for test, videos in tested),
        "Ran on": f"{', '.join(sorted({row['device'] for row in rows}))}, {environment()}",
    }


def environment() -> str:
    import torch

    return f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def write_study(study: str, scale: str, config: StudyConfig, rows: Sequence[Mapping], out: Path) -> list[Path]:
    """study.md, study.json and runs.csv in the folder ``out``; returns their paths."""
    lines = summarise(study, rows)
    facts = {
        "study": study,
        "scale": scale,
        "synthetic": True,
        "notes": notes(study, config),
        "statements": statements(study, rows, lines),
        "about": describe(scale, config, rows),
        "settings": study_settings(study, config),
        "summary": [
            line._asdict()
            | {"value": line.value._asdict(), "difference": line.difference and line.difference._asdict()}
            for line in lines
        ],
        "runs": list(rows),
    }
    files = {
        "study.md": render_markdown(study, scale, config, rows),
        "study.json": json.dumps(facts, indent=1) + "\n",
        "runs.csv": to_csv(({name: row[name] for name in FIELDS} for row in rows), FIELDS),
    }
    for name, text in files.items():
        write_atomic(out / name, text)
    return [out / name for name in files]
