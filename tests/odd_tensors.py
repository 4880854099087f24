"""Random calls of every public op: odd sizes, strides and values, each tensor between pages that may not be touched."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from guarded import Arena, span
from torch import Tensor

import sdr_kernels
from sdr_kernels import FoldedConv, LossOptions, NormedBottleneck, NormedConv
from sdr_kernels.clip_views import clip_views_reference
from sdr_kernels.info_nce import normalise
from sdr_kernels.temporal_bottleneck import FoldedBottleneck

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65)  # 2^k, 2^k +- 1 and small primes
KINDS = ("normal", "tiny", "large", "zeros", "constant", "nan", "inf", "-inf")
LIKELY = (0.5, 0.08, 0.08, 0.04, 0.06, 0.12, 0.06, 0.06)
TINY = {torch.float32: 1e-39, torch.float16: 1e-6}  # subnormal
LARGE = {torch.float32: 1e15, torch.float16: 100.0}
ZERO = 0.06  # how often one size is 0


class Case(NamedTuple):
    """One call, as functions of the same tensors."""

    function: Callable  # to the result, or a tuple of which the first has gradients
    reference: Callable
    inputs: list[Tensor | None]
    refused: bool  # a size is 0 that must not be
    kind: str  # of the values
    picks: bool = False  # gradients go to whichever value was the largest
    lost: bool = False  # gradients are 0, of which rounding makes something
    norms: int = 0  # by the batch: as many means and variances, one after the other, follow the first result

    def statistics(self, results: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of each norm."""
        return [(results[i], results[i + 1]) for i in range(1, 2 * self.norms, 2)]


class Odd:
    """The draws of one case.

    Args:
        sizes: draws what a case is.
        values: draws the numbers in its tensors alone.
        dtype: of its activations.
        arena: gives the memory of every tensor.
    """

    def __init__(self, sizes: np.random.Generator, values: np.random.Generator, dtype: torch.dtype, arena: Arena):
        self.rng, self.values, self.dtype, self.arena = sizes, values, dtype, arena
        self.kind = str(sizes.choice(KINDS, p=LIKELY))
        self.spoiled = int(sizes.choice(2, p=(0.8, 0.2)))  # number of the tensor that holds the NaN or infinity
        self.tensors = 0
        self.zero = ""  # name of the size that is 0

    def chance(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    def one_of(self, values: Sequence):
        return values[int(self.rng.integers(len(values)))]

    def size(self, least: int, most: int) -> int:
        return self.one_of([size for size in SIZES if least <= size <= most])

    def sizes(self, **bounds: tuple[int, int]) -> list[int]:
        """One between each (least, most); now and then one of them is 0 instead."""
        drawn = {name: self.size(*limits) for name, limits in bounds.items()}
        if self.chance(ZERO):
            self.zero = self.one_of(list(drawn))
            drawn[self.zero] = 0
        return list(drawn.values())

    def tensor(
        self,
        *shape: int,
        dtype: torch.dtype | None = None,
        grad: bool = False,
        fan_in: int = 0,
        plain: bool = False,
    ) -> Tensor:
        """Values of the case's kind in some order of memory, perhaps with gaps, perhaps expanded.

        Args:
            shape: of the tensor.
            dtype: the activations' where not given.
            grad: whether it asks for a gradient.
            fan_in: of a weight, which is smaller by its root.
            plain: normal values, whatever the case's kind.
        """
        dtype = dtype or self.dtype
        numbers = torch.from_numpy(np.asarray(self.values.standard_normal(shape) / max(fan_in, 1) ** 0.5))
        if not plain:
            numbers = self.of_kind(numbers, data=dtype == self.dtype and fan_in == 0)
        return self.placed(numbers.to(dtype)).requires_grad_(grad)

    def of_kind(self, numbers: Tensor, *, data: bool = True) -> Tensor:
        """The numbers made tiny, constant, ...; only ``data`` is ever not finite, and no weight, scale or shift.

        Ops read such parameters in other orders than the definition, which multiplies them by the zeros around a clip.
        """
        first = self.tensors == 0
        spoiled = data and self.tensors == self.spoiled
        self.tensors += data
        if self.kind == "tiny" and first:
            return numbers * TINY[self.dtype]
        if self.kind == "large" and first:
            return numbers * LARGE[self.dtype]
        if self.kind in ("zeros", "constant") and (first or self.chance(0.3)):
            return torch.zeros_like(numbers) if self.kind == "zeros" else torch.full_like(numbers, 0.7)
        if self.kind in ("nan", "inf", "-inf") and spoiled and numbers.numel():
            numbers.view(-1)[int(self.rng.integers(numbers.numel()))] = float(self.kind)
        return numbers

    def placed(self, numbers: Tensor) -> Tensor:
        """The same values in guarded memory whose gaps are NaN, or 255."""
        ndim = numbers.ndim
        if numbers.numel() == 0:
            return numbers.clone()
        order = list(range(ndim))
        layout = self.one_of(("contiguous", "channels last", "any order"))
        if layout == "channels last" and ndim > 3:
            order.append(order.pop(ndim - 4))
        elif layout != "contiguous":
            order = [int(i) for i in self.rng.permutation(ndim)]
        steps = [2 if self.chance() else 1 for _ in order] if self.chance(0.25) else [1] * ndim
        expanded = int(self.rng.integers(ndim)) if ndim and self.chance(0.12) else None
        strides, stride = [0] * ndim, 1
        for axis in reversed(order):
            if axis == expanded:
                numbers = numbers.narrow(axis, 0, 1).expand_as(numbers)
                continue
            strides[axis] = stride * steps[axis]
            stride *= numbers.shape[axis] * steps[axis]
        count = 1 + sum((size - 1) * s for size, s in zip(numbers.shape, strides, strict=True))
        memory = self.arena.tensor(count, numbers.dtype, at_end=self.chance())
        view = memory.as_strided(numbers.shape, strides)
        once = [slice(0, 1) if axis == expanded else slice(None) for axis in range(ndim)]
        view[tuple(once)] = numbers[tuple(once)]
        return view


class Usual(Odd):
    """The draws of a call as a model makes it: normal values, nothing empty, any size of the device.

    ``clips`` is the size of every axis that is a batch.
    """

    def __init__(self, number: int, dtype: torch.dtype, device: torch.device, clips: int = 2) -> None:
        super().__init__(np.random.default_rng(number), np.random.default_rng([number, 1]), dtype, Arena())
        self.kind, self.device, self.clips = "normal", device, clips

    def sizes(self, **bounds: tuple[int, int]) -> list[int]:
        self.drawn = {name: self.clips if name == "B" else self.size(*limits) for name, limits in bounds.items()}
        return list(self.drawn.values())

    def placed(self, numbers: Tensor) -> Tensor:
        return (numbers.movedim(-4, -1).contiguous().movedim(-1, -4) if numbers.ndim > 4 else numbers).to(self.device)


def maybe(odd: Odd, make: Callable[[], Tensor]) -> Tensor | None:
    return make() if odd.chance() else None


def affine(odd: Odd, *shape: int, grad: bool = False) -> Tensor:
    return odd.tensor(*shape, dtype=torch.float32, grad=grad, fan_in=1)


def both(op: Callable, call: Callable, impl: str) -> tuple[Callable, Callable]:
    """``call(op)`` by this implementation and by the reference, as functions of tensors."""
    return partial(call, partial(op, impl=impl)), partial(call, partial(op, impl="reference"))


def temporal_conv3d(odd: Odd, impl: str) -> Case:
    B, V, C_in, C_out, T, H, W = odd.sizes(
        B=(1, 2), V=(1, 3), C_in=(1, 33), C_out=(1, 33), T=(1, 5), H=(1, 5), W=(1, 4)
    )
    k, relu, grad = odd.one_of((1, 3, 5)), odd.chance(), odd.chance()
    inputs = [
        odd.tensor(B, V, C_in, T, H, W, grad=grad),
        odd.tensor(V, C_out, C_in, k, grad=grad, fan_in=C_in * k),
        maybe(odd, lambda: affine(odd, V, C_out, grad=grad)),
        maybe(odd, lambda: affine(odd, V, C_out, grad=grad)),
        maybe(odd, lambda: odd.tensor(B, V, C_out, T, H, W, grad=grad)),
    ]

    def call(op, x, weight, scale, shift, residual):
        return op(x, weight, scale, shift, residual=residual, relu=relu)

    return Case(*both(sdr_kernels.temporal_conv3d, call, impl), inputs, odd.zero not in ("", "B"), odd.kind)


def stem_clips(odd: Odd, B: int, V: int, T: int, H: int, W: int, *, uint8: bool) -> Tensor:
    shape = (B, V, 3, T, H, W) if odd.chance() else (B, 3, T, H, W)
    if not uint8:
        return odd.tensor(*shape)
    odd.tensors += 1
    return odd.placed(torch.from_numpy(odd.values.integers(0, 256, shape, dtype=np.uint8)))


def temporal_stem(odd: Odd, impl: str) -> Case:
    B, V, C, T, H, W = odd.sizes(B=(1, 2), V=(1, 2), C=(1, 17), T=(1, 3), H=(2, 9), W=(2, 11))
    k, uint8 = odd.one_of((1, 3, 5)), odd.chance(0.4)
    inputs = [
        stem_clips(odd, B, V, T, H, W, uint8=uint8),
        odd.tensor(V, C, 3, k, fan_in=3 * k),
        affine(odd, V, C),
        affine(odd, V, C),
    ]
    normalise = ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)) if uint8 else None
    call = lambda op, *tensors: op(*tensors, normalise=normalise)  # noqa: E731
    return Case(*both(sdr_kernels.temporal_stem, call, impl), inputs, odd.zero not in ("", "B"), odd.kind)


def block_layers(odd: Odd, V: int, C_in: int, inner: int, C_out: int, *, branch1: bool) -> list[tuple[int, ...]]:
    """Shapes of the weights of a bottleneck."""
    shapes = [(V, inner, C_in, odd.one_of((1, 3, 5))), (V, inner, inner, 1), (V, C_out, inner, 1)]
    return [*shapes, (V, C_out, C_in, 1)] if branch1 else shapes


def block_sizes(odd: Odd, most: int, least: int = 1) -> tuple[list[int], tuple[bool, bool, bool]]:
    """B, V, T, H, W, C_in, inner, C_out; and whether there are branch1, a pool and a pool over time.

    Args:
        odd: draws them.
        most: of the channels.
        least: of T, H and W behind a pool.
    """
    pool = odd.chance(0.3)
    branch1, time_pool = pool or odd.chance(), not pool and odd.chance(0.3)
    side = (2 * least, 2 * least + 2) if pool else (least, 4)
    channels = (1, most)
    T = (2, 5) if time_pool else (least, 4)
    sizes = odd.sizes(B=(1, 2), V=(1, 2), T=T, H=side, W=side, C_in=channels, inner=channels, C_out=channels)
    if not branch1:
        sizes[-1] = sizes[-3]  # C_in
        odd.zero = "" if odd.zero == "C_out" else odd.zero
    return sizes, (branch1, pool, time_pool)


def folded_layers(odd: Odd, shapes: list[tuple[int, ...]]) -> list[Tensor | None]:
    """Weight, scale and shift of each."""
    layers = []
    for shape in shapes:
        weight = odd.tensor(*shape, fan_in=shape[2] * shape[3])
        layers += [weight, maybe(odd, partial(affine, odd, *shape[:2])), affine(odd, *shape[:2])]
    return layers


def named_layers(tensors: Sequence[Tensor | None]) -> list[FoldedConv]:
    return [FoldedConv(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def temporal_bottleneck(odd: Odd, impl: str) -> Case:
    (B, V, T, H, W, C_in, inner, C_out), (branch1, pool, time_pool) = block_sizes(odd, 33)
    inputs = [odd.tensor(B, V, C_in, T, H, W)]
    inputs += folded_layers(odd, block_layers(odd, V, C_in, inner, C_out, branch1=branch1))
    pools = {"pool": pool, "time_pool": time_pool}
    call = lambda op, x, *tensors: op(x, *named_layers(tensors), **pools)  # noqa: E731
    return Case(*both(sdr_kernels.temporal_bottleneck, call, impl), inputs, odd.zero not in ("", "B"), odd.kind)


def bottleneck_chain(odd: Odd, impl: str) -> Case:
    """Two blocks, the second without a pool."""
    (B, V, T, H, W, C_in, inner, C_out), (branch1, pool, time_pool) = block_sizes(odd, 17)
    shapes = block_layers(odd, V, C_in, inner, C_out, branch1=branch1)
    second = block_layers(odd, V, C_out, inner, C_out, branch1=odd.chance())
    inputs = [odd.tensor(B, V, C_in, T, H, W), *folded_layers(odd, shapes), *folded_layers(odd, second)]

    def call(op, x, *tensors):
        layers = named_layers(tensors)
        first, rest = layers[: len(shapes)], layers[len(shapes) :]
        first = FoldedBottleneck(*first, *[None] * (4 - len(first)), pool=pool, time_pool=time_pool)
        return op(x, [first, FoldedBottleneck(*rest)])

    return Case(*both(sdr_kernels.bottleneck_chain, call, impl), inputs, odd.zero not in ("", "B"), odd.kind)


def spatial_mean(odd: Odd, impl: str) -> Case:
    shape = odd.sizes(B=(1, 3), V=(1, 3), C=(1, 65), T=(1, 4), H=(1, 9), W=(1, 8))
    call = lambda op, x: op(x)  # noqa: E731
    inputs = [odd.tensor(*shape)]
    return Case(*both(sdr_kernels.spatial_mean, call, impl), inputs, odd.zero not in ("", "B"), odd.kind)


def norm_linear(odd: Odd, impl: str) -> Case:
    A, M, K, N = odd.sizes(A=(1, 3), M=(1, 33), K=(1, 65), N=(1, 65))
    outer = (A, M) if odd.chance() else (M,)
    normed, activation = odd.chance(), odd.one_of(("none", "gelu"))
    inputs = [
        odd.tensor(*outer, K),
        odd.tensor(N, K, fan_in=K),
        maybe(odd, lambda: affine(odd, N)),
        affine(odd, K) if normed else None,
        affine(odd, K) if normed else None,
        maybe(odd, lambda: odd.tensor(*outer, N)),
    ]

    def call(op, x, weight, bias, gamma, beta, residual):
        norm = (gamma, beta, 1e-5) if normed else None
        return op(x, weight, bias, norm=norm, activation=activation, residual=residual)

    return Case(*both(sdr_kernels.norm_linear, call, impl), inputs, odd.zero in ("K", "N"), odd.kind)


def token_attention(odd: Odd, impl: str) -> Case:
    B, N, heads, width = odd.sizes(B=(1, 2), N=(1, 33), heads=(1, 3), width=(1, 33))
    call = lambda op, qkv: op(qkv, heads)  # noqa: E731
    inputs = [odd.tensor(B, N, 3 * heads * width)]
    return Case(*both(sdr_kernels.token_attention, call, impl), inputs, odd.zero not in ("", "B"), odd.kind)


def some_labels(odd: Odd, count: int, most: int) -> Tensor:
    dtype = odd.one_of((torch.int64, torch.int32, torch.uint8, torch.bool))
    return odd.placed(torch.from_numpy(odd.values.integers(0, most, count)).to(dtype))


def parallel(rows: Tensor) -> bool:
    """Whether all rows, [N, D], lie on one line, as of one feature: what a row gets of the others is 0, to rounding."""
    unit = normalise(rows.detach().double())
    unit = unit[unit.any(1)]
    return len(unit) > 0 and bool((unit @ unit[0]).abs().min() > 1 - 1e-6)


def info_nce(odd: Odd, impl: str) -> Case:
    N, D = odd.sizes(N=(1, 65), D=(1, 65))
    temperature, anchors = odd.one_of((0.07, 0.5, 1.0)), odd.one_of(("all", "real"))
    inputs = [odd.tensor(N, D, grad=True), some_labels(odd, N, odd.one_of((2, 5)))]
    call = lambda op, *tensors: op(*tensors, temperature=temperature, anchors=anchors)  # noqa: E731
    lost = parallel(inputs[0])
    return Case(*both(sdr_kernels.info_nce, call, impl), inputs, odd.zero == "D", odd.kind, lost=lost)


def loss_options(odd: Odd) -> LossOptions:
    return LossOptions(
        odd.one_of((0.07, 0.5)), odd.one_of((1.0, 1.5, 4.0)), odd.one_of(("all", "real")), odd.chance(),
        odd.one_of(("joint_to_loo", "loo_to_joint")), odd.one_of(("shared", "complementary")),
    )  # fmt: skip


def leave_one_out_kl(odd: Odd, impl: str) -> Case:
    B, V, K = odd.sizes(B=(1, 33), V=(1, 5), K=(1, 16))
    o = loss_options(odd)
    inputs = [odd.tensor(B, K, grad=True), odd.tensor(B, V, K, grad=True)]
    named = {"temperature": o.mi_temperature, "direction": o.direction, "objective": o.objective}
    call = lambda op, *tensors: op(*tensors, detach_joint=False, **named)  # noqa: E731
    return Case(*both(sdr_kernels.leave_one_out_kl, call, impl), inputs, odd.zero in ("B", "K"), odd.kind)


def sdr_loss(odd: Odd, impl: str) -> Case:
    B, V, D, W, K = odd.sizes(B=(1, 9), V=(1, 4), D=(1, 65), W=(1, 4), K=(2, 5))
    options = loss_options(odd)._replace(detach_joint=False)
    inputs = [
        odd.tensor(B, V, D, grad=True),
        some_labels(odd, B, 2),
        odd.tensor(B, grad=True),
        odd.tensor(B, K, grad=True),
        odd.tensor(B, W, K, grad=True),
    ]
    call = lambda op, *tensors: op(*tensors, options)  # noqa: E731
    lost = parallel(inputs[0].flatten(0, 1))
    return Case(*both(sdr_kernels.sdr_loss, call, impl), inputs, odd.zero not in ("", "W"), odd.kind, lost=lost)


def clip_views(odd: Odd, impl: str) -> Case:
    B, V, T, H, W = odd.sizes(B=(1, 2), V=(1, 3), T=(1, 3), H=(1, 17), W=(1, 33))
    F, fill = T if odd.chance() else 1, odd.one_of(("mean", "black"))
    clips = odd.placed(torch.from_numpy(odd.values.integers(0, 256, (B, 3, T, H, W), dtype=np.uint8)))
    sampling = torch.from_numpy(odd.values.standard_normal((B, V, F, 4))) * torch.tensor([1.0, 40, 1, 40])
    if odd.chance():
        sampling = sampling.round()
    sampling = odd.placed(odd.of_kind(sampling, data=odd.kind in ("nan", "inf", "-inf")).float())
    color = odd.placed(torch.from_numpy(odd.values.standard_normal((B, V, F, 3, 4)) / 2).float())
    hole = odd.placed(torch.from_numpy(odd.values.integers(-3, 40, (B, V, F, 4))).int())
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}

    def function(*tensors):
        return sdr_kernels.clip_views(*tensors, **statistics, fill=fill, dtype=odd.dtype, impl=impl)

    def reference(clips, sampling, color, hole):
        dtype = torch.float64 if sampling.dtype == torch.float64 else odd.dtype
        return clip_views_reference(clips, sampling, color, hole, **statistics, fill=fill, dtype=dtype)

    return Case(function, reference, [clips, sampling, color, hole], odd.zero not in ("", "B"), odd.kind)


def normed_layers(odd: Odd, shapes: list[tuple[int, ...]], *, frozen: bool) -> list[Tensor]:
    """Weight, gamma, beta and, for a frozen norm, its statistics, of each."""
    layers, dtype = [], odd.one_of((odd.dtype, torch.float32))
    for shape in shapes:
        weight = odd.tensor(*shape, dtype=dtype, grad=True, fan_in=shape[2] * shape[3])
        layers += [weight, affine(odd, *shape[:2], grad=True), affine(odd, *shape[:2], grad=True)]
        if frozen:
            var = odd.placed(torch.from_numpy(odd.values.random(shape[:2]) + 0.5).float())
            layers += [odd.tensor(*shape[:2], dtype=torch.float32, plain=True), var]
    return layers


def normed_convs(tensors: Sequence[Tensor], *, frozen: bool) -> list[NormedConv]:
    size = 5 if frozen else 3
    return [NormedConv(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def flat_results(normed: sdr_kernels.Normed) -> tuple[Tensor, ...]:
    return normed.out, *(value for each in normed.statistics for value in (each.mean, each.var))


def normed_stem(odd: Odd, impl: str) -> Case:
    B, V, C, T, H, W = odd.sizes(B=(1, 2), V=(1, 2), C=(1, 9), T=(1, 2), H=(2, 5), W=(2, 5))
    frozen = odd.chance(0.25)
    inputs = [stem_clips(odd, B, V, T, H, W, uint8=False)]
    shapes = [(V, C, 3, odd.one_of((1, 3, 5)))]
    inputs += normed_layers(odd, shapes, frozen=frozen)

    def call(op, x, *tensors):
        (conv,) = normed_convs(tensors, frozen=frozen)
        return flat_results(op(x, conv, bn="frozen" if frozen else "batch"))

    refused = odd.zero not in ("", "B") or (odd.zero == "B" and not frozen)
    return Case(
        *both(sdr_kernels.normed_stem, call, impl), inputs, refused, odd.kind, True, norms=0 if frozen else len(shapes)
    )


def normed_bottleneck(odd: Odd, impl: str, scheme: str) -> Case:
    # with few rows some channel has nearly one value
    (B, V, T, H, W, C_in, inner, C_out), (branch1, pool, time_pool) = block_sizes(odd, 17, 1 if odd.chance(0.05) else 2)
    frozen = odd.chance(0.25)
    inputs = [odd.tensor(B, V, C_in, T, H, W, grad=odd.chance(0.8))]
    shapes = block_layers(odd, V, C_in, inner, C_out, branch1=branch1)
    inputs += normed_layers(odd, shapes, frozen=frozen)

    def call(op, x, *tensors):
        convs = normed_convs(tensors, frozen=frozen)
        block = NormedBottleneck(*convs, *[None] * (4 - len(convs)), pool=pool, time_pool=time_pool)
        return flat_results(op(x, block, scheme=scheme, bn="frozen" if frozen else "batch"))

    rows = B * T * (H // 2) * (W // 2) if pool else B * T * H * W
    refused = odd.zero not in ("", "B") or (rows < 2 and not frozen)
    return Case(
        *both(sdr_kernels.normed_bottleneck, call, impl), inputs, refused, odd.kind, True,
        norms=0 if frozen else len(shapes),
    )  # fmt: skip


MAKERS: dict[str, Callable[[Odd, str], Case]] = {
    "temporal_conv3d": temporal_conv3d,
    "temporal_stem": temporal_stem,
    "temporal_bottleneck": temporal_bottleneck,
    "bottleneck_chain": bottleneck_chain,
    "spatial_mean": spatial_mean,
    "norm_linear": norm_linear,
    "token_attention": token_attention,
    "info_nce": info_nce,
    "leave_one_out_kl": leave_one_out_kl,
    "sdr_loss": sdr_loss,
    "clip_views": clip_views,
    "normed_stem": normed_stem,
    "normed_bottleneck gram": partial(normed_bottleneck, scheme="gram"),
    "normed_bottleneck fused": partial(normed_bottleneck, scheme="fused"),
}
OF_THE_CPU = (
    "temporal_stem", "temporal_bottleneck", "bottleneck_chain", "info_nce",
    "normed_stem", "normed_bottleneck gram", "normed_bottleneck fused",
)  # fmt: skip


def memory_of(x: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    return x.data_ptr(), x.data_ptr() + span(x) * x.itemsize
