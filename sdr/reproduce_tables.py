"""An experiment's figures beside the published ones: as a table, Markdown, CSV, JSON, and Figure 2 as a page."""

import json
from collections.abc import Sequence
from pathlib import Path

from sdr.errors import escape
from sdr.evaluate import VALIDATION_ACCURACY
from sdr.files import to_csv, write_atomic
from sdr.page import render_page
from sdr.protocol import DATASETS
from sdr.published import FTCN_PUBLISHED, SOURCE
from sdr.reproduce import Line, Result
from sdr.terminal import SYNTHETIC_NOTE
from sdr.train import FREE
from sdr.train_config import TRAIN_PRESETS, TrainConfig, flatten, to_json

TITLES = {  # of the table, and of its first column
    "table1": ("Table I: one manipulation left out", "held out"),
    "table2": ("Table II: other datasets", "model"),
    "table3": ("Table III: ablations", "model"),
    "figure2": ("Figure 2: number of branches", "branches"),
}
METRICS = {
    "video AUC": "AUC",
    "video accuracy": "ACC at 0.5",
    VALIDATION_ACCURACY: "ACC at validation threshold",
    "video EER": "EER",
    "video AP": "AP",
}
PAPER_METRICS = ("video AUC", "video accuracy")
NONE = "-"


def table_cells(result: Result, metrics: Sequence[str] = tuple(METRICS)) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of some metrics, in percent; a column that nothing stands in is left out."""
    header = [TITLES[result.experiment][1], "tested on", "real + fake videos"]
    for name in metrics:
        short = METRICS[name]
        header += [short, f"{short}, paper", "difference"] if name in PAPER_METRICS else [short]
    rows = [line_cells(line, metrics) for line in result.lines]
    used = [i for i in range(len(header)) if any(row[i] != NONE for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def line_cells(line: Line, metrics: Sequence[str]) -> list[str]:
    videos = NONE if line.real is None else f"{line.real} + {line.fake}"
    cells = [escape(line.row), DATASETS[line.dataset], videos]
    for name in metrics:
        cells.append(figure_text(line, name))
        if name in PAPER_METRICS:
            paper, difference = line.paper(name), line.difference(name)
            cells += [NONE if paper is None else f"{paper:.1f}", NONE if difference is None else f"{difference:+.1f}"]
    return cells


def figure_text(line: Line, name: str) -> str:
    """A figure of ours with its interval."""
    if name not in line.figures:
        return NONE
    text = f"{line.figures[name]:.1f}"
    if name in line.intervals:
        text += " ({:.1f}-{:.1f})".format(*line.intervals[name])
    return text


def changes(config: TrainConfig) -> str:
    """What the full model's settings have other than the preset that they are nearest to."""
    flat = flatten(to_json(config))
    others = {}
    for name, preset in TRAIN_PRESETS.items():
        usual = flatten(to_json(preset()))
        others[name] = [f"{key} {flat[key]}" for key in usual if key not in FREE and flat[key] != usual[key]]
    nearest = min(others, key=lambda name: len(others[name]))
    return f"the preset {nearest}" + (f" with {', '.join(others[nearest])}" if others[nearest] else "")


def scale(result: Result) -> dict[str, str]:
    """How large the models and their training were, in words."""
    c = result.config
    validated = [(len(run.validation), len(run.validation.records)) for run in result.runs if run.validation]
    presets = [name for name, preset in TRAIN_PRESETS.items() if preset().model == c.model]
    shape = f"the preset {presets[0]}" if presets else f"of no preset, width {c.model.width}"
    return {
        "Model": f"{shape}, clips of {c.model.num_frames} frames of {c.model.image_size} x {c.model.image_size} pixels",
        "Training": f"{c.epochs:,} {'epoch' if c.epochs == 1 else 'epochs'}, {c.batch_size} clips an update, "
        f"learning rate {c.lr:g}, {c.precision}, seed {c.seed}",
        "Settings": changes(c),
        "Trained on": span([(len(run.data), len(run.data.records)) for run in result.runs]),
        "Chosen by": f"{span(validated)} of the split val"
        if validated
        else "nothing: there is no split val, so the last weights were tested",
        "Tested on": tested(result.lines),
    }


def tested(lines: Sequence[Line]) -> str:
    """Real and fake videos of every test set."""
    sizes: dict[str, dict[str, None]] = {}
    for line in lines:
        if line.run:
            sizes.setdefault(DATASETS[line.dataset], {})[f"{line.real} + {line.fake}"] = None
    return ", ".join(f"{' or '.join(counts)} videos of {dataset}" for dataset, counts in sizes.items())


def span(sizes: Sequence[tuple[int, int]]) -> str:
    """Clips and videos, the fewest and the most of several runs."""
    clips, videos = (
        f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        for counts in zip(*sizes, strict=True)
    )
    return f"{clips} clips of {videos} videos"


def notes(result: Result) -> list[str]:
    """What a reader must know of the figures, a sentence or two each."""
    lines = []
    if result.synthetic:
        lines.append(SYNTHETIC_NOTE)
        lines.append("The published figures are of the real datasets; figures of synthetic videos cannot be compared.")
    lines.append(
        "All figures are percentages at video level. In brackets: 95 % intervals, bootstrap over the test's videos; "
        "what another seed of the training would change is not in them."
    )
    lines.append(f"Paper: {SOURCE}; {FTCN_PUBLISHED} as quoted there. {NONE} where there is no figure.")
    return lines


def render_markdown(result: Result) -> str:
    """The table with its scale and notes."""
    header, rows = table_cells(result)
    table = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines = [f"# {TITLES[result.experiment][0]}", ""]
    lines += [f"- {name}: {text}" for name, text in scale(result).items()]
    lines += ["", *(f"| {' | '.join(row)} |" for row in table), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in notes(result))])


def to_record(line: Line) -> dict[str, object]:
    """A line as a row of the CSV file; None is no figure."""
    record = {"row": escape(line.row), "dataset": line.dataset, "run": line.run, "real": line.real, "fake": line.fake}
    for name in METRICS:
        low, high = line.intervals.get(name, (None, None))
        record |= {name: line.figures.get(name), f"{name} low": low, f"{name} high": high}
    for name in PAPER_METRICS:
        record |= {f"published {name}": line.paper(name), f"difference {name}": line.difference(name)}
    return record


def to_facts(result: Result) -> dict[str, object]:
    """All that is known of the experiment, as values of JSON."""
    import sdr

    runs = {run.name: {"row": run.row, "videos": len(run.data.records), "clips": len(run.data)} for run in result.runs}
    return {
        "experiment": result.experiment,
        "unit": "percent",
        "synthetic": result.synthetic,
        "notes": notes(result),
        "scale": scale(result),
        "lines": [to_record(line) for line in result.lines],
        "runs": runs,
        "config": to_json(result.config),
        "version": sdr.__version__,
    }


def render_figure(result: Result) -> str:
    """Figure 2 as one page that needs nothing else: AUC over the number of branches, and the table."""
    import sdr

    header, rows = table_cells(result)
    return render_page(
        "reproduce.html",
        title=TITLES[result.experiment][0],
        version=sdr.__version__,
        synthetic=result.synthetic,
        scale=scale(result),
        notes=notes(result),
        header=header,
        rows=rows,
        data=plot_data(result),
    )


def plot_data(result: Result) -> list[dict[str, object]]:
    """A curve for each dataset: V, our AUC, how far its interval reaches, and the published points."""
    V = {run.row: run.config.model.num_branches for run in result.runs}
    curves = []
    for dataset, name in DATASETS.items():
        lines = [line for line in result.lines if line.dataset == dataset]
        values = [line.figures["video AUC"] for line in lines]
        bounds = [line.intervals["video AUC"] for line in lines]
        paper = [(V[line.row], line.published.auc) for line in lines if line.published]
        curve = {"name": name, "branches": [V[line.row] for line in lines], "auc": values}
        curve["up"] = [high - value for value, (_, high) in zip(values, bounds, strict=True)]
        curve["down"] = [value - low for value, (low, _) in zip(values, bounds, strict=True)]
        curves.append(curve | {"paper": paper})
    return curves


def write_result(result: Result, out: Path) -> list[Path]:
    """Write the experiment's files to ``out``, which is there, and return them, the one to read last."""
    texts = {
        "json": json.dumps(to_facts(result), indent=1) + "\n",
        "csv": to_csv(records := [to_record(line) for line in result.lines], tuple(records[0])),
        "md": render_markdown(result),
    }
    if result.experiment == "figure2":
        texts["html"] = render_figure(result)
    paths = [out / f"{result.experiment}.{kind}" for kind in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomic(path, text)
    return paths
