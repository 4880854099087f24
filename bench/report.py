"""The measured tables of README.md and one HTML page of every figure, from the committed results: `make report`.

README's part lies between two marks and is written anew, so that no figure there is typed by hand; `--check` compares
it and leaves it as it is. The page holds everything else, in one file that loads nothing. Both depend on the results
alone: the same results give the same bytes. Exit code 0: done; 1: README is not what the results say, or a file is no
result.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from textwrap import fill

from figures import KERNELS, STAGES, target_rows
from report_page import render
from rows import GPU, SUITE, Results, Row, Run, read_results
from wording import (
    baseline_text,
    bound_text,
    ceilings_text,
    in_units,
    natural,
    number,
    percent,
    precision_text,
    provenance,
)

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NO_GPU = """\
No GPU has run these kernels yet. What stands behind them so far: every Triton kernel is interpreted in float32 and
float16 against float64 over odd shapes, and compiled and audited for sm_80 and sm_90; the CUDA kernels' own source runs
thread by thread in an emulation on the CPU, against float64 too, and compiles with nvcc and NVRTC."""

# ---------------------------------------------------------------- README


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["|" + "|".join([*(f" {name} " for name in columns), ""]), "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows])


def hand_tables(results: Results) -> list[str]:
    parts = []
    for table in results.tables:
        source = f"{table['hardware']}, {table['versions']}, commit {table['commit']}, {table['date']}"
        parts.append(f"{table['title']}; {source}; `{table['command']}`:")
        parts.append(markdown(table["columns"], table["rows"]))
    return parts


def spanned(values: Iterable[float], form: str) -> str:
    """Smallest to largest, in one text where they look alike; empty where there are none."""
    texts = [form.format(value) for value in sorted(values)]
    return "" if not texts else texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def kernel_table(rows: Sequence[Row]) -> str:
    """One line for each op and implementation; the page has each size."""
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        if row.impl != "reference" and {"share_of_floor", "baseline"} & set(row.figures):
            groups.setdefault((row.op, row.impl, row.dtype, row.threads), []).append(row)
    lines = []
    for (op, impl, _, _), members in sorted(groups.items()):
        shares = [100 * row.figures["share_of_floor"] for row in members if "share_of_floor" in row.figures]
        baselines = (row.figures.get("baseline", {}) for row in members)
        ratios = [baseline["ratio"] for baseline in baselines if baseline.get("impl") == "reference"]
        times = f"{spanned(shares, '{:.0f}')} %" if shares else ""
        lines.append([f"`{op}`", impl, precision_text(members[0]), str(len(members)), times, spanned(ratios, "{:.2f}")])
    columns = ["kernel", "by", "", "sizes", "of floor", "times as fast as the reference"]
    return markdown(columns, lines)


def whole_table(rows: Sequence[Row]) -> str:
    """The model, its training, data and the rest, a line for each figure."""
    lines = [
        [
            *(row.subject, row.impl, precision_text(row), in_units(row.median_s) + memory_text(row)),
            *(percent(row.figures.get("share_of_floor")), baseline_text(row)),
        ]
        for row in sorted(rows, key=natural)
    ]
    return markdown(["what", "by", "", "median", "of floor", "speed against"], lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Gigabytes by part that training keeps, of rows that count them."""
    parts = [stage for stage in STAGES if stage in rows[0].figures["bytes_per_clip"]]
    lines = []
    for row in rows:
        kept = row.figures["bytes_per_clip"]
        lines.append([row.impl, *(f"{kept[part] / 1e9:.2f}" for part in parts), f"{sum(kept.values()) / 1e9:.2f}"])
    return markdown([f"{rows[0].subject}, {rows[0].dtype}, GB", *parts, "all"], lines)


def of_scaling(row: Row) -> bool:
    """One of many sizes that only the page's curves show."""
    return "scaling" in row.subject or "scaling" in row.impl


def of_process(row: Row) -> bool:
    """It is timed in a process of its own, whose memory is told."""
    return row.subject.endswith("a process")


def memory_text(row: Row) -> str:
    return f", {row.figures['peak_bytes'] / 1e9:.1f} GB" if of_process(row) else ""


def run_section(run: Run) -> list[str]:
    """A run's tables with where they come from, and why figures are missing."""
    kernels = [row for row in run.measured if row.op in KERNELS and not of_process(row)]
    kept = [row for row in run.measured if isinstance(row.figures.get("bytes_per_clip"), dict)]
    whole = [row for row in run.measured if row.op not in KERNELS or of_process(row)]
    whole = [row for row in whole if row not in kept and not of_scaling(row)]
    ceilings = f" Measured ceilings, which floors are computed from: {ceilings_text(run)}." if run.ceilings else ""
    parts = [f"{provenance(run)}.{ceilings}"]
    parts += [whole_table(whole)] if whole else []
    parts += [kernel_table(kernels)] if kernels else []
    parts += [memory_table(kept)] if kept else []
    reasons = Counter(row.reason for row in run.rows if row.median_s is None and row.reason)
    if reasons:
        counted = "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        parts.append(f"Not measured there, and of how many rows: {counted}.")
    return parts


def target_table(results: Results) -> list[str]:
    rows, run = target_rows(results)
    lines = [
        [
            *(row["what"], bound_text(row, "must"), bound_text(row, "goal")),
            "not measured" if row["measured"] is None else number(row["measured"], row["unit"]),
        ]
        for row in rows
    ]
    why = provenance(run) if run else "no run of `make gpu` on an H200 is among the results yet"
    head = f"What an H200 must reach in bfloat16, and where it is to go; {why}:"
    return [head, markdown(["on an H200, bfloat16", "must", "goal", "measured"], lines)]


def readme_part(results: Results) -> str:
    """All that stands between the marks."""
    parts = [
        "Written by `make report` from `bench/results/`, which holds every figure; the commands need the extra `dev`."
    ]
    for run in [*results.newest(SUITE), *results.newest(GPU)]:
        parts += run_section(run)
    parts += [*hand_tables(results), *target_table(results)]
    if not results.newest(GPU):
        parts.append(NO_GPU)
    return "\n\n".join(part if part.startswith("|") else fill(part, WIDTH, break_on_hyphens=False) for part in parts)


def with_part(readme: str, part: str) -> str:
    """README with what stands between the marks replaced.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def difference(found: str, expected: str) -> str:
    """The first line that differs, both ways."""
    pairs = zip_longest(found.splitlines(), expected.splitlines(), fillvalue="(nothing)")
    line, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return f"line {line} is {ours!r}, the results say {theirs!r}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="leave README as it is; fail where it would change")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the two marks")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "report", help="folder of the page")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> str:
    """Write or check; what the user is told.

    Raises:
        ValueError: README cannot be written, is not what the results say, or a file is no result.
    """
    results = read_results(options.results)
    if results.errors:
        raise ValueError("\n".join(results.errors))
    readme = options.readme.read_text(encoding="utf-8")
    expected = with_part(readme, readme_part(results))
    if options.check:
        if expected != readme:
            raise ValueError(f"{options.readme.name}: {difference(readme, expected)}; `make report` writes it")
    else:
        options.readme.write_text(expected, encoding="utf-8")
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / "index.html"
    page.write_text(render(results), encoding="utf-8")
    return f"{options.readme.name} says what the results say, and {page} shows it"


def main(arguments: list[str] | None = None) -> int:
    try:
        print(run(parse(arguments)))
    except (ValueError, OSError) as error:
        print(f"make report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
