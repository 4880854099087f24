"""What each stage must do at least, and how the time that it took stands to that."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sdr.layers import Layer, Work, layers_of
from sdr.passes import passes_of
from sdr.profile_stages import Segment
from sdr.profile_work import Inference, Training
from sdr.stages import LOSS, OPTIMISER
from sdr.training_passes import training_passes


@dataclass(frozen=True)
class Least:
    """What a stage must do at least, forward or backward: sums over its layers or passes."""

    flops: int
    bytes: int
    floor_s: float
    arithmetic_s: float  # of floor_s, what arithmetic sets

    @classmethod
    def of(cls, works: Iterable[Work], rates: tuple[float, float]) -> "Least":
        works = list(works)
        floors = [(work.floor(*rates), work.bound(*rates)) for work in works]
        arithmetic = sum(floor for floor, bound in floors if bound == "arithmetic")
        return cls(
            sum(w.flops for w in works), sum(w.bytes for w in works), sum(floor for floor, _ in floors), arithmetic
        )


def least(work: Inference | Training, rates: tuple[float, float]) -> dict[Segment, Least]:
    """By stage and whether backward; empty where the convolutions look sideways, which no model of ours counts.

    Our kernels in inference are held against :func:`sdr.layers.layers_of`, the plain branches against their own passes,
    module by module. The head's backward pass is not counted.
    """
    config, clips, size = work.config.model, work.clips, work.dtype.itemsize
    if config.spatial_kernel != 1:
        return {}
    layers = layers_of(config, clips, size)
    found: dict[Segment, list[Work]] = {("head", False): [x for x in layers if x.stage == "head"]}
    if work.plan.name == "block":
        parts = [((layer.stage, False), layer) for layer in layers if layer.stage != "head"]
    elif isinstance(work, Training):
        passes = training_passes(config, clips, work.plan.name, size)
        parts = [((p.layer.partition(".")[0], p.backward), p) for p in passes]
    else:
        parts = [((p.layer.partition(".")[0], False), p) for p in passes_of(config, clips, work.plan.name, size)]
    for key, part in parts:
        found.setdefault(key, []).append(part)
    return {key: Least.of(works, rates) for key, works in found.items()}


def layers_by_op(work: Inference | Training) -> list[Layer]:
    """What the kernels of a forward pass must compute, by op; none in training and for the plain branches."""
    known = isinstance(work, Inference) and work.plan.name == "block"
    return layers_of(work.config.model, work.clips, work.dtype.itemsize) if known else []


def stage_rows(
    times: Mapping[Segment, float], floors: Mapping[Segment, Least], *, train: bool
) -> list[dict[str, object]]:
    """Of each stage its seconds, its share of all and, where its work is counted, of the floor."""
    total = sum(times.values())
    rows = []
    for stage in dict.fromkeys(stage for stage, _ in times):
        forward, backward = times.get((stage, False), 0.0), times.get((stage, True), 0.0)
        row = {"stage": stage, "forward_s": forward} | ({"backward_s": backward} if backward else {})
        row["share_of_time"] = (forward + backward) / total
        parts = [floors[key] for key in ((stage, False), (stage, True)) if key in floors]
        if parts:
            row["flops"], row["bytes"] = sum(p.flops for p in parts), sum(p.bytes for p in parts)
            row["floor_s"] = sum(p.floor_s for p in parts)
            whole = len(parts) == 2 or not train
            row["floor_of"] = "all" if whole else "forward"
            row["share_of_floor"] = row["floor_s"] / (forward + backward if whole else forward)
            arithmetic = sum(p.arithmetic_s for p in parts)
            row["bound"] = "arithmetic" if arithmetic > row["floor_s"] / 2 else "memory"
        rows.append(row)
    return rows


def split(times: Mapping[Segment, float]) -> dict[str, float]:
    """An update's seconds by what it does."""
    backward = sum(seconds for (_, back), seconds in times.items() if back)
    loss, optimiser = times.get((LOSS, False), 0.0), times.get((OPTIMISER, False), 0.0)
    forward = sum(times.values()) - backward - loss - optimiser
    return {"forward_s": forward, "loss_s": loss, "backward_s": backward, "optimiser_s": optimiser}
