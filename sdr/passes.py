"""Passes over memory that the backbones take, by how much is fused: FLOPs and bytes of each.

A pass is one kernel at its best: it reads each of its rows once, writes each of its results once, and computes what it
must. Rows grow with the batch; weights, statistics and small matrices do not, and are left out here (:mod:`sdr.layers`
counts weights). A plan is how the same network is cut into passes in inference, batch norms being affine:

* ``eager``: every module on its own: convolution, norm, ReLU, pool, addition.
* ``compiled``: what stands between two convolutions is one pass, but for pools over branch1 and time; as compilers do.
* ``epilogue``: norm, ReLU and addition in the convolution before, pools on their own; as inference engines do.
* ``convolution``: pools too are in the convolution; what the stem's puts out is never stored.
* ``block``: a bottleneck is one pass. This is what our kernels do.

:mod:`sdr.training_passes` has those of a training step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from sdr.config import TEMPORAL_STRIDE, SDRConfig, check
from sdr.layers import Shape, Work, shapes_of

INFERENCE = ("eager", "compiled", "epilogue", "convolution", "block")
# what, FLOPs, values of the rows' dtype, bytes of a pool's codes or indices
Counted = Iterator[tuple[str, int, int] | tuple[str, int, int, int]]


@dataclass(frozen=True)
class Pass(Work):
    """One pass over memory, of all clips and branches."""

    layer: str  # "stem", "res3.0"
    what: str  # "a", "b's norm", "d c: weight"
    flops: int
    bytes: int
    backward: bool = False


@dataclass(frozen=True)
class Rows:
    """Values that the tensors of a bottleneck hold, over all clips and branches."""

    x: int
    a: int  # of conv a and of conv b
    b: int  # of conv b after its pool, which is what c reads
    c: int  # of conv c
    s: int  # of branch1; 0 where the shortcut is x
    s_pooled: int
    y: int  # after the pool over time, where there is one


def rows_of(s: Shape, count: int) -> Rows:
    """Of a bottleneck in ``count`` clips times branches."""
    before = count * s.T * s.H**2
    after = before // 4 if s.pool else before
    c = after * s.C_out
    return Rows(
        x=before * s.C_in,
        a=before * s.inner,
        b=after * s.inner,
        c=c,
        s=before * s.C_out if s.branch1 else 0,
        s_pooled=c if s.branch1 else 0,
        y=c // TEMPORAL_STRIDE if s.time_pool else c,
    )


@dataclass(frozen=True)
class Products:
    """FLOPs of a bottleneck's convolutions, over all clips and branches."""

    a: int
    b: int
    c: int
    s: int


def products_of(s: Shape, rows: Rows) -> Products:
    return Products(
        a=2 * s.kernel * s.C_in * rows.a,
        b=2 * s.inner * rows.a,
        c=2 * s.inner * rows.c,
        s=2 * s.C_in * rows.s,
    )


def stem_inference(plan: str, s: Shape, flops: int, x: int, z: int) -> Counted:
    """The stem's passes; ``z`` is the convolution's result, of which its first pool leaves a quarter."""
    half, out = z // 4, z // 16
    if plan in ("convolution", "block"):
        yield "conv", flops, x + out
        return
    yield "conv", flops, x + z
    if plan == "eager":
        yield "norm", 0, 2 * z
    yield "pool of 2 x 2", 0, z + half
    if plan == "eager":
        yield "ReLU", 0, 2 * half
    yield "pool of 3 x 3", 0, half + out


def bottleneck_inference(plan: str, s: Shape, r: Rows) -> Counted:
    f = products_of(s, r)
    if plan == "block":
        yield "block", f.a + f.b + f.c + f.s, r.x + r.y
        return
    eager, compiled, apart = plan == "eager", plan == "compiled", plan in ("eager", "compiled")
    fused = plan == "convolution"
    yield "a", f.a, r.x + r.a
    if apart:
        yield "a's norm", 0, 2 * r.a
    if eager:
        yield "a's ReLU", 0, 2 * r.a
    yield "b", f.b, r.a + (r.b if fused else r.a)
    if compiled:
        yield "b's norm", 0, r.a + r.b
    if eager:
        yield "b's norm", 0, 2 * r.a
    if s.pool and not fused and not compiled:
        yield "b's pool", 0, r.a + r.b
    if eager:
        yield "b's ReLU", 0, 2 * r.b
    if s.branch1:
        yield "branch1", f.s, r.x + (r.s_pooled if fused else r.s)
        if eager:
            yield "branch1's norm", 0, 2 * r.s
        if s.pool and not fused:
            yield "branch1's pool", 0, r.s + r.s_pooled
    yield "c", f.c, r.b + r.c + (0 if apart else (r.y if fused else r.c))
    if eager:
        yield "c's norm", 0, 2 * r.c
    if apart:
        yield "sum", 0, 3 * r.c
    if eager:
        yield "last ReLU", 0, 2 * r.c
    if s.time_pool and not fused:
        yield "pool over time", 0, r.c + r.y


def stem_values(s: Shape, count: int) -> tuple[int, int]:
    """Of the clip, and of the convolution's full result."""
    pixels = count * s.T * s.H**2
    return pixels * s.C_in, pixels * s.C_out


def backbone_passes(
    config: SDRConfig,
    clips: int,
    itemsize: int,
    stem: Callable[[Shape, int, int, int], Counted],
    bottleneck: Callable[[Shape, Rows], Counted],
) -> Iterator[Pass]:
    """Every layer's passes as ``stem`` and ``bottleneck`` count them from its sizes and values."""
    count = clips * config.num_branches
    for name, s in shapes_of(config).items():
        if name == "stem":
            x, z = stem_values(s, count)
            counted = stem(s, 2 * z * s.kernel * s.C_in, x, z)
        else:
            counted = bottleneck(s, rows_of(s, count))
        for what, flops, values, *more in counted:
            yield Pass(
                name, what, flops, values * itemsize + sum(more), what.startswith("d ") or what.endswith(" again")
            )


def passes_of(config: SDRConfig, clips: int, plan: str, itemsize: int = 2) -> list[Pass]:
    """Passes of the backbones' forward pass, in order.

    Args:
        config: shapes and the number of branches.
        clips: B.
        plan: one of ``INFERENCE``.
        itemsize: bytes of a value.
    """
    check(plan in INFERENCE, "plan", f"be one of {', '.join(INFERENCE)}", plan)
    return [
        *backbone_passes(config, clips, itemsize, partial(stem_inference, plan), partial(bottleneck_inference, plan))
    ]
