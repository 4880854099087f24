"""Passes over memory of the backbones' training step, and what they keep, with batch norms by the batch.

Counted as :mod:`sdr.passes` counts: ``eager`` is PyTorch's modules one by one, ``fused`` and ``gram`` are the schemes
of :mod:`sdr_kernels` as they are written. ``merged`` counts the two products of a gradient, that of a weight and that
of the rows that went in, as one pass that reads the gradient once: what there is to gain by writing such a kernel.
"""

from functools import partial

from sdr.config import SDRConfig, check
from sdr.layers import Shape, shapes_of
from sdr.passes import Counted, Pass, Rows, backbone_passes, products_of, rows_of, stem_values

TRAINING = ("eager", "fused", "gram")
INDEX_BYTES = 8  # of an eager pool's result, for its backward pass
CODED = 4  # results whose codes share a byte, in our schemes


def eager_bottleneck(s: Shape, r: Rows) -> Counted:
    """Forward and backward of PyTorch's modules; a pool keeps an index for each result."""
    f = products_of(s, r)
    yield from (("a", f.a, r.x + r.a), ("a's norm", 0, 2 * r.a), ("a's ReLU", 0, 2 * r.a))
    yield from (("b", f.b, 2 * r.a), ("b's norm", 0, 2 * r.a))
    if s.pool:
        yield "b's pool", 0, r.a + r.b, INDEX_BYTES * r.b
    yield from (("b's ReLU", 0, 2 * r.b), ("c", f.c, r.b + r.c), ("c's norm", 0, 2 * r.c))
    if s.branch1:
        yield from (("branch1", f.s, r.x + r.s), ("branch1's norm", 0, 2 * r.s))
        if s.pool:
            yield "branch1's pool", 0, r.s + r.s_pooled, INDEX_BYTES * r.s_pooled
    yield from (("sum", 0, 3 * r.c), ("last ReLU", 0, 2 * r.c))
    if s.time_pool:
        yield "pool over time", 0, r.c + r.y, INDEX_BYTES * r.y
        yield "d pool over time", 0, r.c + r.y, INDEX_BYTES * r.y
    yield from (("d last ReLU", 0, 3 * r.c), ("d c's norm", 0, 3 * r.c), ("d c", 2 * f.c, 2 * r.c + 2 * r.b))
    yield "d b's ReLU", 0, 3 * r.b
    if s.pool:
        yield "d b's pool", 0, r.a + r.b, INDEX_BYTES * r.b
    yield from (("d b's norm", 0, 3 * r.a), ("d b", 2 * f.b, 4 * r.a), ("d a's ReLU", 0, 3 * r.a))
    yield from (("d a's norm", 0, 3 * r.a), ("d a", 2 * f.a, 2 * r.a + 2 * r.x))
    if s.branch1:
        if s.pool:
            yield "d branch1's pool", 0, r.s + r.s_pooled, INDEX_BYTES * r.s_pooled
        yield from (("d branch1's norm", 0, 3 * r.s), ("d branch1", 2 * f.s, 2 * r.s + 2 * r.x))
    yield "d sum", 0, 3 * r.x


class Scheme:
    """Passes of one of our training schemes over a bottleneck.

    Args:
        s: sizes.
        r: values of its tensors.
        merged: with both products of one gradient in one pass.
    """

    def __init__(self, s: Shape, r: Rows, *, merged: bool) -> None:
        self.s, self.r, self.f, self.merged = s, r, products_of(s, r), merged
        self.codes = r.b // CODED if s.pool else 0  # bytes, of b's pool
        self.s_codes = r.s_pooled // CODED if s.pool else 0
        self.y_codes = r.y // CODED if s.time_pool else 0

    def products(
        self,
        what: str,
        flops: int,
        source: tuple[int, int],
        h: int,
        rest: tuple[int, int],
        *,
        again: int = 0,
        more: int = 0,
    ) -> Counted:
        """The gradients of a weight and of the rows that went in.

        Args:
            what: names the convolution.
            flops: of either product.
            source: values and bytes of codes that the gradient rows are read from.
            h: values of the rows that went in, which the first product reads.
            rest: values and bytes of codes that the second reads or writes beside the source and h.
            again: values of h that the second reads too.
            more: FLOPs of the second beside its product.
        """
        first, second = source[0] + h, source[0] + again + rest[0]
        if self.merged:
            yield f"d {what}", 2 * flops + more, first + rest[0], source[1] + rest[1]
        else:
            yield f"d {what}: weight", flops, first, source[1]
            yield f"d {what}: rows", flops + more, second, source[1] + rest[1]

    def end(self) -> Counted:
        """Through a, with the shortcut's gradient added."""
        r = self.r
        rest = (2 * r.x, 0) if self.s.branch1 else (2 * r.y + r.x, self.y_codes)
        return self.products("a", self.f.a, (2 * r.a, 0), r.x, rest)

    def shortcut_source(self) -> tuple[int, int]:
        return 2 * self.r.y, self.s_codes if self.s.pool else self.y_codes

    def fused(self) -> Counted:
        s, r, f = self.s, self.r, self.f
        yield from (("a", f.a, r.x + r.a), ("b", f.b, 2 * r.a))
        if s.pool:
            yield "b's pool", 0, r.a + r.b
        yield "c", f.c, r.b + r.c
        if s.branch1:
            yield "branch1", f.s, r.x + r.s
        if s.branch1 and s.pool:
            yield "branch1's pool", 0, r.s + r.s_pooled, self.s_codes
        yield "sum", 0, r.c + (r.s_pooled or r.x) + r.y, self.y_codes
        source = 2 * r.y + r.c, self.y_codes
        yield "d c: sums", 0, *source
        if s.pool:
            yield "b's pool again", 0, r.a + r.b, self.codes
        yield from self.products("c", f.c, source, r.b, (r.b, 0), again=r.b)
        if s.pool:
            yield "d b: sums", 0, r.b + r.a, self.codes
        yield from self.products("b", f.b, (r.b + r.a, self.codes), r.a, (r.a, 0), again=r.a)
        if s.branch1:
            values, codes = self.shortcut_source()
            yield "d branch1: sums", 0, values + r.s, codes
            yield from self.products("branch1", f.s, (values + r.s, codes), r.x, (r.x, 0))
        yield from self.end()

    def gram(self) -> Counted:
        s, r, f = self.s, self.r, self.f
        square_c, square_s = 2 * s.inner * r.b, 2 * s.C_in * r.x
        yield from (
            ("a", f.a, r.x + r.a),
            ("moments of b", f.b, r.a),
            ("b", f.b, r.a + r.b),
            ("moments of c", square_c, r.b),
        )
        if s.branch1:
            yield "moments of branch1", square_s, r.x
            yield "branch1", f.s, r.x + r.s_pooled, self.s_codes
        yield "c", f.c, r.b + (r.s_pooled or r.x) + r.y, self.y_codes
        yield "b again", f.b, r.a + r.b, self.codes
        yield from self.products("c", f.c, (2 * r.y, self.y_codes), r.b, (r.b, 0), again=r.b, more=square_c)
        yield from self.products("b", f.b, (r.b, self.codes), r.a, (r.a, 0), again=r.a, more=f.b)
        if s.branch1:
            yield from self.products("branch1", f.s, self.shortcut_source(), r.x, (r.x, 0), again=r.x, more=square_s)
        yield from self.end()


def stem_training(scheme: str, s: Shape, flops: int, x: int, z: int) -> Counted:
    """Forward and backward of the stem; nothing flows back to the clip."""
    half, out = z // 4, z // 16
    if scheme == "eager":
        yield from (("conv", flops, x + z), ("norm", 0, 2 * z), ("pool of 2 x 2", 0, z + half, INDEX_BYTES * half))
        yield from (("ReLU", 0, 2 * half), ("pool of 3 x 3", 0, half + out, INDEX_BYTES * out))
        yield from (("d pool of 3 x 3", 0, half + out, INDEX_BYTES * out), ("d ReLU", 0, 3 * half))
        yield from (
            ("d pool of 2 x 2", 0, z + half, INDEX_BYTES * half),
            ("d norm", 0, 3 * z),
            ("d conv", flops, x + z),
        )
        return
    patch = s.kernel * s.C_in
    yield "moments of patches", 2 * patch * patch * (x // s.C_in), x
    yield "conv", flops, x + out, out
    yield "d conv", 2 * patch * out, x + 2 * out, out


def training_passes(
    config: SDRConfig, clips: int, scheme: str, itemsize: int = 2, *, merged: bool = False
) -> list[Pass]:
    """Passes of the backbones' forward and backward pass, layer by layer.

    Args:
        config: shapes and the number of branches.
        clips: B.
        scheme: one of ``TRAINING``.
        itemsize: bytes of a value.
        merged: count both products of a gradient as one pass; of our schemes.
    """
    check(scheme in TRAINING, "scheme", f"be one of {', '.join(TRAINING)}", scheme)

    def bottleneck(s: Shape, r: Rows) -> Counted:
        return eager_bottleneck(s, r) if scheme == "eager" else getattr(Scheme(s, r, merged=merged), scheme)()

    return [*backbone_passes(config, clips, itemsize, partial(stem_training, scheme), bottleneck)]


def saved_bytes(config: SDRConfig, scheme: str, itemsize: int = 2) -> dict[str, int]:
    """What the backbones keep of one clip for the backward pass, by part of the network; a result counts once, where
    it is made.

    Args:
        config: shapes and the number of branches.
        scheme: one of ``TRAINING``; ``eager`` is PyTorch without autocast.
        itemsize: bytes of a value.
    """
    check(scheme in TRAINING, "scheme", f"be one of {', '.join(TRAINING)}", scheme)
    saved: dict[str, int] = {}
    for name, s in shapes_of(config).items():
        if name == "stem":
            x, z = stem_values(s, config.num_branches)
            half, out = z // 4, z // 16
            values, more = (x + 2 * z + half + out, INDEX_BYTES * (half + out)) if scheme == "eager" else (x + out, out)
        else:
            values, more = _kept(scheme, s, rows_of(s, config.num_branches))
        part = name.partition(".")[0]
        saved[part] = saved.get(part, 0) + values * itemsize + more
    return saved


def _kept(scheme: str, s: Shape, r: Rows) -> tuple[int, int]:
    """Values, and bytes of codes or indices, that a bottleneck keeps beside its input."""
    s_pooled, b, y = s.pool * r.s_pooled, s.pool * r.b, s.time_pool * r.y
    if scheme == "eager":
        norms = 4 * r.a + b + 2 * r.c + r.s + s.pool * r.s
        return norms + y, INDEX_BYTES * (b + s_pooled + y)
    convolutions = 2 * r.a + r.c + r.s if scheme == "fused" else r.a
    return convolutions + r.y, (s_pooled + y) // CODED
