"""Forward and backward of a bottleneck with batch statistics, from the ops in :mod:`sdr_kernels._rows`.

Scheme "fused" keeps every convolution's output and reads batch norm, ReLU and their gradients into the products before
and after. Scheme "gram" has the statistics and gradients of b, c and branch1 from second moments of their inputs, so
that what they put out, four times as wide as what goes into c, is never in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sdr_kernels._rows import conv_grad, conv_moments, conv_norm, covariance, grad_sums, norm_pool, row_products
from sdr_kernels.batch_norm import Batch, Gram, Norm, NormedConv, NormGradient

RAW = (None, None)  # the scale and shift of rows that are read as they are


class Plan(NamedTuple):
    """What is not a tensor."""

    pool: bool
    time_pool: bool
    frozen: bool
    group: "dist.ProcessGroup | None"
    impl: str


class Layer(NamedTuple):
    """A convolution, its batch norm, and, where the scheme asks for it, the moments of what it reads."""

    weight: Tensor  # [V, C_out, C_in, k], in the rows' dtype
    mean: Tensor  # these as :class:`Norm` has them
    rstd: Tensor
    factor: Tensor
    scale: Tensor
    shift: Tensor
    center: Tensor
    covariance: Tensor | None = None  # these as :class:`Gram` has them
    local_mean: Tensor | None = None
    input_mean: Tensor | None = None

    @property
    def norm(self) -> Norm:
        return Norm(*self[1:7])

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift

    def gram(self, rows: int) -> Gram:
        return Gram(pointwise(self.weight).double(), self.covariance, self.local_mean, self.input_mean, rows)


class Kept(NamedTuple):
    """What the backward pass needs."""

    x: Tensor
    y: Tensor
    za: Tensor
    zb: Tensor | None  # scheme "fused" alone, as zc and zs
    zc: Tensor | None
    zs: Tensor | None
    shortcut_code: Tensor | None
    time_code: Tensor | None
    layers: list[Layer]

    def flatten(self) -> list[Tensor | None]:
        return [*self[:-1], *(tensor for layer in self.layers for tensor in layer)]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor | None]) -> "Kept":
        fields, rest, size = len(cls._fields) - 1, len(tensors), len(Layer._fields)
        layers = [Layer(*tensors[i : i + size]) for i in range(fields, rest, size)]
        return cls(*tensors[:fields], layers)


LayerGradients = tuple[Tensor, Tensor, Tensor]  # of weight, gamma and beta


class Gradients(NamedTuple):
    """Of x, and of every layer."""

    x: Tensor | None
    layers: list[LayerGradients]


def forward_order(weight: Tensor) -> Tensor:
    """[V, C_out, C_in, k] as the products of the forward pass take it, [V, k, C_in, C_out]."""
    return weight.permute(0, 3, 2, 1).contiguous()


def backward_order(weight: Tensor) -> Tensor:
    """[V, C_out, C_in, k] as those of the gradient do, [V, k, C_out, C_in], taps reversed."""
    return weight.permute(0, 3, 1, 2).flip(1).contiguous()


def pointwise(weight: Tensor) -> Tensor:
    """[V, C_out, C_in, 1] as [V, C_in, C_out]."""
    return weight[..., 0].transpose(-1, -2)


def rows_of(x: Tensor) -> int:
    """Of one branch."""
    return x[:, 0, ..., 0].numel()


class Pass:
    """What both schemes share: layers whose statistics come from what they put out."""

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        self.plan, self.impl = plan, plan.impl
        self.dtype = dtype
        self.statistics: list[Tensor] = []  # mean and variance of each layer, in order; empty where they are frozen
        self.wide = torch.promote_types(dtype, torch.float32)
        self.pool = 4 if plan.pool else 1
        self.time_pool = 2 if plan.time_pool else 1

    def batch(self, rows: int) -> Batch | None:
        return None if self.plan.frozen else Batch.of(rows, self.plan.group)

    def frozen(self, conv: NormedConv) -> Norm:
        return Norm.of(conv, conv.running_mean.double(), conv.running_var.double(), self.wide)

    def norm(self, conv: NormedConv, mean: Tensor, var: Tensor) -> Norm:
        """By the batch's statistics, which are kept for the caller."""
        self.statistics += [mean, var]
        return Norm.of(conv, mean, var, self.wide)

    def convolve(
        self, x: Tensor, affine: tuple[Tensor | None, Tensor | None], conv: NormedConv
    ) -> tuple[Tensor, Layer]:
        """z = conv(normed x), and the layer with z's statistics."""
        weight = conv.weight.to(self.dtype)
        z, local = conv_moments(x, *affine, forward_order(weight), self.impl)
        batch = self.batch(rows_of(z))
        norm = self.frozen(conv) if batch is None else self.norm(conv, *batch.moments(local))
        return z, Layer(weight, *norm)

    def differentiate(
        self, layer: Layer, z: Tensor, sums: Tensor, x: Tensor, affine: tuple, d: tuple
    ) -> tuple[tuple, LayerGradients]:
        """Gradient rows of z = conv(normed x), and of weight, gamma, beta.

        Args:
            layer: the convolution and z's norm.
            z: its rows.
            sums: of the gradient d and of d * (z - mean), over rows.
            x: rows that went in, raw.
            affine: that normed them, or (None, None).
            d: (d, y, code, pool) of the gradient of the batch norm's result.
        """
        gradient = NormGradient.of(layer.norm, self.batch(rows_of(z)), sums)
        source = (*d, None if self.plan.frozen else z, gradient.coef(layer.norm))
        products, _ = row_products(x, *affine, None, *source, layer.weight.shape[-1], self.impl)
        return source, (products.permute(0, 3, 2, 1), gradient.dgamma, gradient.dbeta)

    def correlate(self, source: tuple, layer: Layer, size: Sequence[int], residual: tuple) -> Tensor:
        """The gradient of what a layer read raw, from its gradient rows, and the residual's added."""
        nothing = (None,) * 6  # no h, its norm, matrix, center and const
        weight = backward_order(layer.weight)
        return conv_grad(*source, size, weight, *nothing, *residual, False, None, self.impl)[0]

    def end(
        self, kept: Kept, du: Tensor, sums: Tensor, residual: tuple, needs_dx: bool
    ) -> tuple[Tensor | None, LayerGradients]:
        """x's gradient through a, with the shortcut's added, and the gradients of a."""
        a = kept.layers[0]
        source, grads = self.differentiate(a, kept.za, sums, kept.x, RAW, (du, None, None, 1))
        return self.correlate(source, a, kept.x.shape[2:5], residual) if needs_dx else None, grads


class Fused(Pass):
    """Statistics in the epilogues; keeps what every convolution puts out."""

    def forward(self, x: Tensor, convs: Sequence[NormedConv]) -> Kept:
        za, a = self.convolve(x, RAW, convs[0])
        zb, b = self.convolve(za, a.affine, convs[1])
        zc, c = self.convolve(*self.inside(zb, b), convs[2])
        layers = [a, b, c]
        zs = shortcut_code = None
        shortcut = (x, *RAW)
        if len(convs) > 3:
            zs, s = self.convolve(x, RAW, convs[3])
            layers.append(s)
            shortcut = (zs, *s.affine)
            if self.plan.pool:
                pooled, shortcut_code = norm_pool(*shortcut, None, *RAW, False, self.pool, True, self.impl)
                shortcut = (pooled, *RAW)
        coded = self.plan.time_pool
        y, time_code = norm_pool(zc, *c.affine, *shortcut, True, self.time_pool, coded, self.impl)
        return Kept(x, y, za, zb, zc, zs, shortcut_code, time_code if coded else None, layers)

    def inside(self, zb: Tensor, b: Layer) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """What c reads: zb and how it is normed, or the pooled rows themselves."""
        if not self.plan.pool:
            return zb, b.affine
        return norm_pool(zb, *b.affine, None, *RAW, True, self.pool, False, self.impl)[0], RAW

    def backward(self, kept: Kept, dy: Tensor, needs_dx: bool) -> Gradients:
        a, b, c, *branch1 = kept.layers
        out = (dy, kept.y, kept.time_code, self.time_pool)
        sums = grad_sums(*out, kept.zc, c.center, self.impl)
        inner, sums, grads_c = self.through_c(kept, out, sums)
        du, sums, grads_b = self.through(b, kept.zb, sums, kept.za, a.affine, inner, a.center)
        del inner
        if not branch1:
            dx, grads_a = self.end(kept, du, sums, out, needs_dx)
            return Gradients(dx, [grads_a, grads_b, grads_c])
        (s,) = branch1
        shortcut = (dy, kept.y, kept.shortcut_code, self.pool) if self.plan.pool else out
        dsums = grad_sums(*shortcut, kept.zs, s.center, self.impl)
        source, grads_s = self.differentiate(s, kept.zs, dsums, kept.x, RAW, shortcut)
        residual = self.correlate(source, s, kept.x.shape[2:5], (None, None, None, 1)) if needs_dx else None
        del source
        dx, grads_a = self.end(kept, du, sums, (residual, None, None, 1), needs_dx)
        return Gradients(dx, [grads_a, grads_b, grads_c, grads_s])

    def through_c(self, kept: Kept, out: tuple, sums: Tensor) -> tuple[tuple, Tensor, LayerGradients]:
        """The gradient rows of b's norm, sums over them, and the gradients of c."""
        b, c = kept.layers[1:3]
        if not self.plan.pool:
            du, sums, grads = self.through(c, kept.zc, sums, kept.zb, b.affine, out, b.center)
            return (du, None, None, 1), sums, grads
        hb, code = norm_pool(kept.zb, *b.affine, None, *RAW, True, self.pool, True, self.impl)
        du, _, grads = self.through(c, kept.zc, sums, hb, RAW, out, None)
        inner = (du, None, code, self.pool)
        return inner, grad_sums(*inner, kept.zb, b.center, self.impl), grads

    def through(
        self, layer: Layer, z: Tensor, sums: Tensor, h: Tensor, affine: tuple, d: tuple, z_center: Tensor | None
    ) -> tuple[Tensor, Tensor, LayerGradients]:
        """Of a pointwise layer that read normed h: the gradient behind h's ReLU, sums over it, and the layer's own."""
        source, grads = self.differentiate(layer, z, sums, h, affine, d)
        weight = backward_order(layer.weight)
        nothing = (None, None, None, None, None, None, 1)  # no matrix, center, const and residual
        du, sums = conv_grad(*source, h.shape[2:5], weight, h, *affine, *nothing, True, z_center, self.impl)
        return du, sums, grads


class Grams(Pass):
    """Statistics and gradients of the pointwise convolutions from second moments of what goes into them."""

    def measure(self, h: Tensor, affine: tuple[Tensor | None, Tensor | None], conv: NormedConv) -> Layer:
        """A pointwise layer with the statistics that it will put out for normed h."""
        weight, rows = conv.weight.to(self.dtype), rows_of(h)
        batch = self.batch(rows)
        if batch is None:
            return Layer(weight, *self.frozen(conv))
        gram = Gram.of(pointwise(weight), *covariance(h, *affine, self.impl), batch, rows)
        return Layer(weight, *self.norm(conv, *gram.moments(batch)), gram.covariance, gram.local_mean, gram.mean)

    def inside(self, za: Tensor, a: Layer, b: Layer, *, coded: bool) -> tuple[Tensor, Tensor | None]:
        """relu(pool(norm(b(normed za)))), what c reads."""
        weight = forward_order(b.weight)
        hb, code = conv_norm(za, *a.affine, weight, *b.affine, None, True, self.pool, coded, self.impl)
        return hb, code if coded else None

    def forward(self, x: Tensor, convs: Sequence[NormedConv]) -> Kept:
        za, a = self.convolve(x, RAW, convs[0])
        b = self.measure(za, a.affine, convs[1])
        hb, _ = self.inside(za, a, b, coded=False)
        c = self.measure(hb, RAW, convs[2])
        layers = [a, b, c]
        shortcut, shortcut_code = x, None
        if len(convs) > 3:
            s = self.measure(x, RAW, convs[3])
            layers.append(s)
            rest = (None, False, self.pool, self.plan.pool, self.impl)
            shortcut, shortcut_code = conv_norm(x, *RAW, forward_order(s.weight), *s.affine, *rest)
        rest = (shortcut, True, self.time_pool, self.plan.time_pool, self.impl)
        y, time_code = conv_norm(hb, *RAW, forward_order(c.weight), *c.affine, *rest)
        codes = shortcut_code if self.plan.pool else None, time_code if self.plan.time_pool else None
        return Kept(x, y, za, None, None, None, *codes, layers)

    def backward(self, kept: Kept, dy: Tensor, needs_dx: bool) -> Gradients:
        a, b, c, *branch1 = kept.layers
        out = (dy, kept.y, kept.time_code, self.time_pool)
        hb, code = self.inside(kept.za, a, b, coded=self.plan.pool)
        du, _, grads_c = self.through(c, hb, RAW, out)
        del hb
        du, sums, grads_b = self.through(b, kept.za, a.affine, (du, None, code, self.pool), z_center=a.center)
        if not branch1:
            dx, grads_a = self.end(kept, du, sums, out, needs_dx)
            return Gradients(dx, [grads_a, grads_b, grads_c])
        shortcut = (dy, kept.y, kept.shortcut_code, self.pool) if self.plan.pool else out
        residual, _, grads_s = self.through(*branch1, kept.x, RAW, shortcut, relu=False, needs_dh=needs_dx)
        dx, grads_a = self.end(kept, du, sums, (residual, None, None, 1), needs_dx)
        return Gradients(dx, [grads_a, grads_b, grads_c, grads_s])

    def through(
        self,
        layer: Layer,
        h: Tensor,
        affine: tuple,
        d: tuple,
        *,
        relu: bool = True,
        z_center: Tensor | None = None,
        needs_dh: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, LayerGradients]:
        """Of a pointwise layer that read normed h: the gradient behind h's ReLU, sums over it, and the layer's own."""
        rows = rows_of(h)
        gram, batch = layer.gram(rows), self.batch(rows)
        center = None if batch is None else gram.mean.to(self.wide)
        products, dsums = row_products(h, *affine, center, *d, None, None, 1, self.impl)
        products = products[:, 0]
        gradient = NormGradient.of(layer.norm, batch, gram.gradient_sums(layer.norm, products, dsums))
        dweight = gram.dweight(gradient, batch, products, dsums).transpose(-1, -2)[..., None]
        grads = dweight, gradient.dgamma, gradient.dbeta
        if not needs_dh:
            return None, None, grads
        # as kernels read them: a product has the order of memory of the weight, which may be any
        weight, matrix, const = (value.contiguous() for value in gram.dinput(gradient))
        second = (None, None, None) if batch is None else (matrix.to(self.dtype), center, const.to(self.wide))
        rest = (*second, None, None, None, 1, relu, z_center, self.impl)  # no residual
        weight = weight[:, None].to(self.dtype)
        dh, sums = conv_grad(*d, None, None, h.shape[2:5], weight, h, *affine, *rest)
        return dh, sums, grads


SCHEMES = {"gram": Grams, "fused": Fused}
