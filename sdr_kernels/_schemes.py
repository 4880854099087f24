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


class Plan(NamedTuple):
    """What is not a tensor."""

    pool: bool
    time_pool: bool
    frozen: bool
    group: "dist.ProcessGroup | None"
    eps: tuple[float, ...]  # of a, b, c and branch1
    impl: str


class Layer(NamedTuple):
    """A convolution, its batch norm, and, where the scheme asks for it, the moments of its input."""

    weight: Tensor  # [V, C_out, C_in, k], in the rows' dtype
    gamma: Tensor
    beta: Tensor
    mean: Tensor  # [V, C_out] float64
    var: Tensor
    covariance: Tensor | None = None  # of what it reads, as :class:`Gram` has them
    local_mean: Tensor | None = None
    input_mean: Tensor | None = None

    def norm(self, eps: float, frozen: bool) -> Norm:
        return Norm.of(NormedConv(self.weight, self.gamma, self.beta, eps=eps), self.mean, self.var, frozen=frozen)

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


class Gradients(NamedTuple):
    """Of x, and weight, gamma and beta of every layer."""

    x: Tensor | None
    layers: list[tuple[Tensor, Tensor, Tensor]]


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
        self.wide = torch.promote_types(dtype, torch.float32)
        self.pool = 4 if plan.pool else 1
        self.time_pool = 2 if plan.time_pool else 1

    def batch(self, rows: int) -> Batch:
        return Batch.of(rows, self.plan.group)

    def norm(self, layers: Sequence[Layer], i: int) -> Norm:
        return layers[i].norm(self.plan.eps[i], self.plan.frozen)

    def affine(self, layers: Sequence[Layer], i: int) -> tuple[Tensor, Tensor]:
        return self.norm(layers, i).affine(self.wide)

    def convolve(
        self, x: Tensor, affine: tuple[Tensor | None, Tensor | None], conv: NormedConv
    ) -> tuple[Tensor, Layer]:
        """z = conv(normed x), and the layer with z's statistics."""
        weight = conv.weight.to(self.dtype)
        z, local = conv_moments(x, *affine, forward_order(weight), self.impl)
        if self.plan.frozen:
            mean, var = conv.running_mean.double(), conv.running_var.double()
        else:
            mean, var = self.batch(rows_of(z)).moments(local)
        return z, Layer(weight, conv.gamma, conv.beta, mean, var)

    def differentiate(
        self, norm: Norm, layer: Layer, z: Tensor, sums: Tensor, x: Tensor, affine: tuple, d: tuple
    ) -> tuple[tuple, tuple[Tensor, Tensor, Tensor]]:
        """Gradient rows of z = conv(normed x), and of weight, gamma, beta.

        Args:
            norm: of z.
            layer: the convolution.
            z: its rows.
            sums: of the gradient d and of d * (z - mean), over rows.
            x: rows that went in, raw.
            affine: that normed them, or (None, None).
            d: (d, y, code, pool) of the gradient of the batch norm's result.
        """
        gradient = NormGradient.of(norm, self.batch(rows_of(z)), sums)
        source = (*d, None if norm.frozen else z, gradient.coef(norm, self.wide))
        products, _ = row_products(x, *affine, None, *source, layer.weight.shape[-1], self.impl)
        return source, (products.permute(0, 3, 2, 1), gradient.dgamma, gradient.dbeta)

    def end(
        self, kept: Kept, du: Tensor, sums: Tensor, residual: tuple, needs_dx: bool
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
        """x's gradient through a, with the shortcut's added, and the gradients of a."""
        a = kept.layers[0]
        source, grads = self.differentiate(
            self.norm(kept.layers, 0), a, kept.za, sums, kept.x, (None, None), (du, None, None, 1)
        )
        if not needs_dx:
            return None, grads
        none = (None,) * 6
        weight = backward_order(a.weight)
        size = kept.x.shape[2:5]
        dx, _ = conv_grad(*source, size, weight, *none, *residual, False, None, self.impl)
        return dx, grads


class Fused(Pass):
    """Statistics in the epilogues; keeps what every convolution puts out."""

    def forward(self, x: Tensor, convs: Sequence[NormedConv]) -> Kept:
        raw = (None, None)
        za, a = self.convolve(x, raw, convs[0])
        zb, b = self.convolve(za, self.affine([a], 0), convs[1])
        layers = [a, b]
        zc, c = self.convolve(*self.inside(zb, layers), convs[2])
        layers.append(c)
        zs = shortcut_code = None
        shortcut = (x, None, None)
        if len(convs) > 3:
            zs, s = self.convolve(x, raw, convs[3])
            layers.append(s)
            shortcut = (zs, *self.affine(layers, 3))
            if self.plan.pool:
                pooled, shortcut_code = norm_pool(*shortcut, None, None, None, False, self.pool, True, self.impl)
                shortcut = (pooled, None, None)
        coded = self.plan.time_pool
        y, time_code = norm_pool(zc, *self.affine(layers, 2), *shortcut, True, self.time_pool, coded, self.impl)
        return Kept(x, y, za, zb, zc, zs, shortcut_code, time_code if coded else None, layers)

    def inside(self, zb: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """What c reads: zb and how it is normed, or the pooled rows themselves."""
        affine = self.affine(layers, 1)
        if not self.plan.pool:
            return zb, affine
        return norm_pool(zb, *affine, None, None, None, True, self.pool, False, self.impl)[0], (None, None)

    def backward(self, kept: Kept, dy: Tensor, needs_dx: bool) -> Gradients:
        layers = kept.layers
        norm_a, norm_b, norm_c = (self.norm(layers, i) for i in range(3))
        out = (dy, kept.y, kept.time_code, self.time_pool)
        centers = [norm.mean.to(self.wide) for norm in (norm_a, norm_b, norm_c)]
        # c: its input is normed zb, or that pooled
        hb, affine, code = kept.zb, norm_b.affine(self.wide), None
        if self.plan.pool:
            hb, code = norm_pool(kept.zb, *affine, None, None, None, True, self.pool, True, self.impl)
            affine = (None, None)
        sums = grad_sums(*out, kept.zc, centers[2], self.impl)
        source, grads_c = self.differentiate(norm_c, layers[2], kept.zc, sums, hb, affine, out)
        weight = backward_order(layers[2].weight)
        plain = (None, None, None, None, None, None, 1)  # no matrix, center, const and residual
        center = None if self.plan.pool else centers[1]
        du, sums = conv_grad(*source, hb.shape[2:5], weight, hb, *affine, *plain, True, center, self.impl)
        inner = (du, None, code, self.pool)
        if self.plan.pool:
            sums = grad_sums(*inner, kept.zb, centers[1], self.impl)
        # b
        affine = norm_a.affine(self.wide)
        source, grads_b = self.differentiate(norm_b, layers[1], kept.zb, sums, kept.za, affine, inner)
        weight = backward_order(layers[1].weight)
        du, sums = conv_grad(*source, kept.za.shape[2:5], weight, kept.za, *affine, *plain, True, centers[0], self.impl)
        if len(layers) < 4:
            dx, grads_a = self.end(kept, du, sums, out, needs_dx)
            return Gradients(dx, [grads_a, grads_b, grads_c])
        through = (dy, kept.y, kept.shortcut_code, self.pool) if self.plan.pool else out
        norm_s = self.norm(layers, 3)
        dsums = grad_sums(*through, kept.zs, norm_s.mean.to(self.wide), self.impl)
        source, grads_s = self.differentiate(norm_s, layers[3], kept.zs, dsums, kept.x, (None, None), through)
        residual = None
        if needs_dx:
            none = (None,) * 6
            weight = backward_order(layers[3].weight)
            size = kept.x.shape[2:5]
            residual, _ = conv_grad(*source, size, weight, *none, None, None, None, 1, False, None, self.impl)
        dx, grads_a = self.end(kept, du, sums, (residual, None, None, 1), needs_dx)
        return Gradients(dx, [grads_a, grads_b, grads_c, grads_s])


class Grams(Pass):
    """Statistics and gradients of the pointwise convolutions from second moments of what goes into them."""

    def measure(self, h: Tensor, affine: tuple[Tensor | None, Tensor | None], conv: NormedConv) -> Layer:
        """A pointwise layer with the statistics that it will put out for normed h."""
        weight = conv.weight.to(self.dtype)
        if self.plan.frozen:
            mean, var = conv.running_mean.double(), conv.running_var.double()
            return Layer(weight, conv.gamma, conv.beta, mean, var)
        rows = rows_of(h)
        moments = Gram.of(pointwise(weight), *covariance(h, *affine, self.impl), self.batch(rows), rows)
        mean, var = moments.moments(self.batch(rows))
        return Layer(weight, conv.gamma, conv.beta, mean, var, moments.covariance, moments.local_mean, moments.mean)

    def inside(self, za: Tensor, layers: Sequence[Layer], coded: bool) -> tuple[Tensor, Tensor]:
        """relu(pool(norm(b(normed za)))), what c reads."""
        weight = forward_order(layers[1].weight)
        affine_a, affine_b = self.affine(layers, 0), self.affine(layers, 1)
        return conv_norm(za, *affine_a, weight, *affine_b, None, True, self.pool, coded, self.impl)

    def forward(self, x: Tensor, convs: Sequence[NormedConv]) -> Kept:
        za, a = self.convolve(x, (None, None), convs[0])
        layers = [a, self.measure(za, self.affine([a], 0), convs[1])]
        hb, _ = self.inside(za, layers, False)
        layers.append(self.measure(hb, (None, None), convs[2]))
        shortcut, shortcut_code = x, None
        if len(convs) > 3:
            layers.append(self.measure(x, (None, None), convs[3]))
            weight, affine = forward_order(layers[3].weight), self.affine(layers, 3)
            coded = self.plan.pool
            shortcut, shortcut_code = conv_norm(
                x, None, None, weight, *affine, None, False, self.pool, coded, self.impl
            )
        weight, affine = forward_order(layers[2].weight), self.affine(layers, 2)
        coded = self.plan.time_pool
        y, code = conv_norm(hb, None, None, weight, *affine, shortcut, True, self.time_pool, coded, self.impl)
        kept_code = shortcut_code if self.plan.pool else None
        return Kept(x, y, za, None, None, None, kept_code, code if coded else None, layers)

    def through(
        self, norm: Norm, layer: Layer, h: Tensor, affine: tuple, d: tuple, needs_dh: bool = True
    ) -> tuple[tuple | None, tuple[Tensor, Tensor, Tensor]]:
        """Of a pointwise layer that read normed h: conv_grad's arguments up to const, and weight, gamma, beta."""
        moments = layer.gram(rows_of(h))
        center = None if norm.frozen else moments.mean.to(self.wide)
        products, dsums = row_products(h, *affine, center, *d, None, None, 1, self.impl)
        products = products[:, 0]
        batch = self.batch(rows_of(h))
        gradient = NormGradient.of(norm, batch, moments.gradient_sums(norm, products, dsums))
        dweight = moments.dweight(gradient, batch, products, dsums).transpose(-1, -2)[..., None]
        grads = (dweight, gradient.dgamma, gradient.dbeta)
        if not needs_dh:
            return None, grads
        weight, matrix, const = moments.dinput(gradient)
        second = (None, None, None)
        if not norm.frozen:
            second = (matrix.to(self.dtype), center, const.to(self.wide))
        size = h.shape[2:5]
        return (*d, None, None, size, weight[:, None].to(self.dtype), h, *affine, *second), grads

    def backward(self, kept: Kept, dy: Tensor, needs_dx: bool) -> Gradients:
        layers = kept.layers
        norm_a, norm_b, norm_c = (self.norm(layers, i) for i in range(3))
        raw, none = (None, None), (None, None, None, 1)
        out = (dy, kept.y, kept.time_code, self.time_pool)
        hb, code = self.inside(kept.za, layers, self.plan.pool)
        arguments, grads_c = self.through(norm_c, layers[2], hb, raw, out)
        du, _ = conv_grad(*arguments, *none, True, None, self.impl)
        del hb
        inner = (du, None, code if self.plan.pool else None, self.pool)
        arguments, grads_b = self.through(norm_b, layers[1], kept.za, norm_a.affine(self.wide), inner)
        du, sums = conv_grad(*arguments, *none, True, norm_a.mean.to(self.wide), self.impl)
        if len(layers) < 4:
            dx, grads_a = self.end(kept, du, sums, out, needs_dx)
            return Gradients(dx, [grads_a, grads_b, grads_c])
        through = (dy, kept.y, kept.shortcut_code, self.pool) if self.plan.pool else out
        norm_s = self.norm(layers, 3)
        arguments, grads_s = self.through(norm_s, layers[3], kept.x, raw, through, needs_dx)
        residual = conv_grad(*arguments, *none, False, None, self.impl)[0] if needs_dx else None
        dx, grads_a = self.end(kept, du, sums, (residual, None, None, 1), needs_dx)
        return Gradients(dx, [grads_a, grads_b, grads_c, grads_s])


SCHEMES = {"gram": Grams, "fused": Fused}
