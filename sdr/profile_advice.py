"""What a profile's figures say to change; every sentence holds the figure that it comes from."""

import os
from collections.abc import Iterator, Mapping
from itertools import chain

import torch

from sdr.profile_data import WAITS, Feeding
from sdr.profile_work import ProfileConfig, Training

IDLE = 0.2  # share of a GPU's time between kernels from which launching bounds
LARGE = 0.2  # share of the time from which a stage is worth a word
NOISY = 0.1  # spread of the times from which they say little
APART = 1.3  # times as long as the same call, from which either says little
FAR = 0.5  # share of its floor below which a stage is far from it
READING = 0.5  # share of the loader's time from which reading is what takes it
FASTER = {"cuda": ("dali", "triton"), "cpu": ("dali",)}  # augmentations beside the reference


def advice(report: Mapping, config: ProfileConfig) -> list[str]:
    """Sentences, by what was measured.

    Args:
        report: of :func:`sdr.profile.profile`, but for the loader's.
        config: of the profile.
    """
    found = noise(report), launches(report), far_stages(report), memory_bound(report), plain_branches(report, config)
    return [*chain(*found, kept(report, config))]


def noise(report: Mapping) -> Iterator[str]:
    cpu = report["machine"]["kind"] == "cpu"
    spread = report["throughput"].get("spread", 0.0)
    once_s, again_s = report["throughput"]["median_s"], report["whole_s"]
    said = ""
    if spread > NOISY:
        said = f"times spread by {100 * spread:.0f} %"
    elif cpu and max(once_s, again_s) > APART * min(once_s, again_s):  # on a GPU one is without a CUDA graph
        said = f"the same call took {1e3 * once_s:.3g} ms, and {1e3 * again_s:.3g} ms a moment later"
    if said:
        waits = cpu and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"
        how = ", or with OMP_WAIT_POLICY=passive, so that idle threads do not wait in a loop" * waits
        yield f"{said}: something else is at work on this machine; measure again without{how}"


def launches(report: Mapping) -> Iterator[str]:
    idle = report["kernels"].get("idle_share", 0.0)
    if idle > IDLE:
        count = f"the GPU is idle {100 * idle:.0f} % of the time, between {report['kernels']['launches']:.0f} launches"
        yield f"{count}: a larger --batch, now {report['model']['clips']}, shares them out among more clips"


def far_stages(report: Mapping) -> Iterator[str]:
    """The stage that loses most time above its floor."""
    rows = [row for row in report["stages"] if row.get("share_of_floor", 1.0) < FAR]
    rows = [row for row in rows if row["share_of_time"] > LARGE]
    if rows:
        row = max(rows, key=lambda row: row["share_of_time"] * (1 - row["share_of_floor"]))
        of = " of its forward pass" if row["floor_of"] == "forward" else ""
        yield (
            f"{row['stage']} takes {100 * row['share_of_time']:.0f} % of the time and reaches "
            f"{100 * row['share_of_floor']:.0f} % of the floor{of}: most time is lost there"
        )


def memory_bound(report: Mapping) -> Iterator[str]:
    """Stages that memory bounds, where a narrower dtype would move less."""
    near = (row for row in report["stages"] if row.get("share_of_floor", 0.0) >= FAR)
    rows = [row for row in near if row["bound"] == "memory"]
    share = sum(row["share_of_time"] for row in rows)
    if share > LARGE and report["model"]["dtype"] == "float32":
        names = ", ".join(row["stage"] for row in rows)
        yield f"memory bounds {names}, {100 * share:.0f} % of the time: --dtype bfloat16 moves half the bytes"


def plain_branches(report: Mapping, config: ProfileConfig) -> Iterator[str]:
    if report["model"]["plan"] != "eager":
        return
    if config.train and report["machine"]["kind"] == "cpu":
        how = "--implementation fast --grouped.impl cpu"
        yield f"the plain branches were profiled: {how} keeps less for the backward pass, and takes more time"
    elif config.implementation == "reference":
        yield "the plain branches were profiled: --implementation fast compares our kernels with them"


def kept(report: Mapping, config: ProfileConfig) -> Iterator[str]:
    """The stage that keeps most for the backward pass, and how to keep less."""
    total = report["memory"].get("saved_bytes", 0)
    rows = [row for row in report["stages"] if row["stage"] == "stem" or row["stage"].startswith("res")]
    if not total or config.recompute or not rows:
        return
    row = max(rows, key=lambda row: row.get("saved_bytes", 0))
    share = row.get("saved_bytes", 0) / total
    if share > LARGE:
        grouped = report["model"]["plan"] != "eager"
        how = f"--grouped.recompute '[{row['stage']}]'" if grouped else "--recompute true"
        if row["stage"] not in config.grouped.recompute:
            yield (
                f"{row['stage']} keeps {100 * share:.0f} % of the {total / 1e6:.3g} MB that wait for the backward "
                f"pass: {how} keeps its input alone, for more time"
            )


def feeding_advice(feeding: Feeding, work: Training, augmentation: str) -> list[str]:
    """What to change, by what was measured; options that exist.

    Args:
        feeding: what was measured.
        work: the update.
        augmentation: of the loader.
    """
    if feeding.bottleneck == "update":
        keeps = f"the loader alone makes {feeding.loader:.3g} clips/s, the update takes {feeding.update:.3g}"
        if feeding.waiting_share > WAITS:
            keeps += f", together they make {feeding.together:.3g}"
            keeps += ", for they share the cores" * (work.device.type == "cpu")
        return [f"{keeps}: a faster loader would change nothing; to try: {', '.join(faster_updates(work))}"]
    share = f"{100 * feeding.waiting_share:.0f} % of an update is spent waiting for the loader"
    if feeding.reading_share > READING:
        now = work.config.loader
        how = f"reading takes {100 * feeding.reading_share:.0f} % of the loader's time: --loader.readers above"
        return [f"{share}; {how} {now.readers}, --loader.ahead above {now.ahead}, or a cache on a faster disk"]
    others = [other for other in FASTER[work.device.type] if other != augmentation]
    how = " or ".join(f"--loader.augmentation {other}" for other in others) or "no other is left to try here"
    return [
        f"{share}; augmentation by {augmentation} takes {100 * (1 - feeding.reading_share):.0f} % of its time: {how}"
    ]


def faster_updates(work: Training) -> list[str]:
    """Options of an update that it is not run with."""
    config = work.config
    found = ["--dtype bfloat16"] * (work.dtype == torch.float32)
    found += ["no recomputation"] * bool(config.recompute or config.grouped.recompute)
    if config.implementation == "reference":
        found.append("--implementation fast")
    elif not work.plan.plain:
        found.append(f"--grouped.scheme {'gram' if work.plan.name == 'fused' else 'fused'}")
    return [*found, f"--batch above {work.clips}"]
