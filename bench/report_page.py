"""The report's page: each plot with the table that says the same, and every figure."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import figures
from rows import Results, Run
from wording import (
    baseline_text,
    bound_text,
    ceilings_text,
    figure_text,
    in_units,
    natural,
    number,
    percent,
    precision_text,
    provenance,
)

import sdr
from sdr.page import render_page

Table = dict[str, list]


def table(columns: str, rows: Iterable[Sequence[object]]) -> Table:
    """For the template.

    Args:
        columns: names, divided by commas; a # before one whose cells are numbers.
        rows: cells.
    """
    names = [(name.removeprefix("#"), name.startswith("#")) for name in columns.split(", ")]
    return {"columns": names, "rows": [[str(cell) for cell in row] for row in rows]}


def run_table(run: Run) -> Table:
    """Every row of a run, those that were not measured last."""
    lines = []
    for row in sorted(run.rows, key=lambda row: (row.median_s is None, natural(row))):
        found = row.figures
        figure = "not measured" if row.median_s is None else figure_text(row)
        shares = [percent(found.get("spread")), percent(found.get("share_of_floor")), found.get("bound", "")]
        peak = found.get("peak_bytes")
        rates = [number(found.get("clips_per_s")), "" if peak is None else f"{peak / 1e6:,.0f}"]
        what = [row.subject, row.op, row.impl, precision_text(row)]
        lines.append([*what, figure, *shares, baseline_text(row), *rates, row.reason])
    columns = "what, op, by, precision, #median, #spread, #of floor, bound by, #speed against, #clips/s, #peak MB"
    return table(f"{columns}, why not measured", lines)


def roofline_table(plot: dict) -> Table:
    rows = []
    for p in plot["points"]:
        place = [f"{p['x']:,.3g}", f"{p['y'] / 1e9:,.3g}", in_units(p["seconds"]), percent(p["share"] or None)]
        rows.append([p["name"], p["op"], p["impl"], *place])
    return table("what, op, by, #FLOP/byte, #GFLOP/s, #time, #of floor", rows)


def stage_table(stages: list[dict]) -> Table:
    rows = [
        [s["device"], s["work"], s["impl"], s["stage"], number(s["ms"]), number(s["floor_ms"] or None)] for s in stages
    ]
    return table("of, work, by, stage, #ms, #floor in ms", rows)


def memory_table(memory: list[dict]) -> Table:
    parts = list(memory[0]["parts"])
    rows = [
        [m["kind"], m["scheme"], *(f"{m['parts'].get(part, 0):.2f}" for part in parts), f"{m['all']:.2f}"]
        for m in memory
    ]
    return table(", ".join(["how", "scheme", *(f"#{part} in GB" for part in [*parts, "all"])]), rows)


def series_table(series: list[dict], along: str) -> Table:
    """Curves as rows, a line for each point."""
    rows = [[s["device"], s["name"], at, number(ms)] for s in series for at, ms in zip(s[along], s["ms"], strict=True)]
    return table("of, what, at, #ms", rows)


def audit_table(audited: list[dict]) -> Table:
    rows = []
    for a in audited:
        most = [a["compiled"], a["registers"], f"{a['shared'] / 1024:.0f}", a["spilled"]]
        rows.append([a["kernel"], a["arch"], *most, "yes" if a["tensor_core"] else "no"])
    return table("kernel, GPU, #forms, #registers, #shared KiB, #spilled bytes, tensor cores", rows)


def target_section(results: Results) -> dict[str, object]:
    """The H200's targets beside what was measured."""
    rows, run = figures.target_rows(results)
    lines = [
        [
            row["what"],
            bound_text(row, "must"),
            bound_text(row, "goal"),
            measured_text(row),
            *[row["verdict"]] * bool(run),
        ]
        for row in rows
    ]
    columns = "what, #must, #goal, #measured" + (", verdict" if run else "")
    return {"source": provenance(run, code="") if run else "", "table": table(columns, lines)}


def hand_table(copied: dict) -> dict[str, object]:
    """A table that was copied by hand, whose texts are README's Markdown."""
    rows = [[cell.replace("`", "") for cell in row] for row in copied["rows"]]
    columns = ", ".join(name or "what" for name in copied["columns"])
    return copied | {"title": copied["title"].replace("`", ""), "table": table(columns, rows)}


def measured_text(row: dict) -> str:
    return "not measured" if row["measured"] is None else number(row["measured"], row["unit"])


def render(results: Results) -> str:
    """The page; the same results give the same bytes."""
    newest = list({(run.device, run.command): run for run in results.runs}.values())
    rooflines = [plot for run in newest for plot in figures.rooflines(run)] + [figures.design_roofline()]
    stages = [{"device": run.device, **stage} for run in newest for stage in figures.stages(run)]
    scaling = [{"device": run.device, **curve} for run in newest for curve in figures.scaling(run)]
    history, memory, floors = figures.history(results.runs), figures.memory(results), figures.floors()
    audited = figures.audited(results.audit)
    return render_page(
        "report.html",
        folder=Path(__file__).parent,
        version=sdr.__version__,
        runs=[
            {"source": provenance(r, code=""), "ceilings": ceilings_text(r), "file": r.file, "table": run_table(r)}
            for r in newest
        ],
        targets=target_section(results),
        floors=table("work, plan, #ms", [[f["work"], f["plan"], number(f["ms"])] for f in floors]),
        rooflines=[{"title": plot["title"], "table": roofline_table(plot)} for plot in rooflines],
        stages=stage_table(stages) if stages else None,
        memory=memory_table(memory),
        scaling=series_table(scaling, "size") if scaling else None,
        history=series_table(history, "runs") if history else None,
        ops=sorted({line["op"] for line in history}),
        audit={"table": audit_table(audited), "source": results.audit} if audited else None,
        hand=[hand_table(copied) for copied in results.tables],
        curves=list(results.curves),
        data={
            "floors": floors,
            "rooflines": rooflines,
            "stages": stages,
            "order": figures.STAGES,
            "memory": memory,
            "scaling": scaling,
            "axes": figures.AXES,
            "history": history,
            "curves": results.curves,
        },
    )
