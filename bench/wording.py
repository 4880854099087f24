"""How the report says a figure: units, bounds, and where it comes from."""

import re

from rows import Row, Run, counted


def in_units(seconds: float) -> str:
    """Three digits of a time and its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 0.9995:  # three digits of less are 1000 of the next unit
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def natural(row: Row) -> tuple:
    """To sort rows by: op, subject with its numbers as numbers, implementation, dtype."""
    parts = re.split(r"(\d+)", row.subject)
    return row.op, [int(part) if part.isdigit() else part for part in parts], row.impl, row.dtype, row.threads


def number(value: object, unit: str = "") -> str:
    """Three digits and the unit, empty where there is no value."""
    return "" if value is None else f"{value:.3g} {unit}".strip()


def figure_text(row: Row) -> str:
    """What a row measured: a time, or what training keeps of a clip."""
    kept = row.figures.get("bytes_per_clip")
    return f"{sum(kept.values()) / 1e9:.2f} GB" if isinstance(kept, dict) else in_units(row.median_s)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def baseline_text(row: Row) -> str:
    base = row.figures.get("baseline")
    return "" if base is None else f"{base['ratio']:.2f} x {base['impl']}"


def precision_text(row: Row) -> str:
    threads = f", {counted(row.threads, 'thread')}" if row.threads else ""
    return f"{row.dtype}{threads}"


def bound_text(row: dict, name: str) -> str:
    """A target's bound, as "at least 700 clips/s"."""
    if row[name] is None:
        return ""
    return f"{'at least' if row['at_least'] else 'at most'} {row[name]:,g} {row['unit']}".strip()


def provenance(run: Run, code: str = "`") -> str:
    """Hardware, versions, commit, date and command of a run; ``code`` stands around the command."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return f"{run.device}, {versions}, commit {run.commit}, {run.date[:10]}; {code}{run.command}{code}"


def ceilings_text(run: Run) -> str:
    """The measured ceilings that floors were computed from."""
    parts = []
    for threads, found in sorted(run.ceilings.items()):
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in sorted(found["flops_per_s"].items()))
        where = f"{counted(threads, 'thread')}: " if threads else ""
        parts.append(f"{where}{rates}, copy {found['bytes_per_s'] / 1e9:,.1f} GB/s")
    return "; ".join(parts)
