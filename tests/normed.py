"""Layers with batch norm for tests, and the comparison of their outputs, statistics and gradients with float64."""

from collections.abc import Callable

import torch
from compare import pools_may_vary
from conftest import KERNEL_DTYPES
from torch import Tensor

from sdr_kernels import Normed, NormedBottleneck, NormedConv


def cases(shapes: list[tuple]) -> list[tuple]:
    """Every (shape, implementation, dtype) that is compared here; interpreted float16 has the code of float32."""
    if torch.cuda.is_available():
        return [(shape, "triton", dtype) for shape in shapes for dtype in KERNEL_DTYPES]
    interpreted = [(shape, "triton", torch.float32) for shape in shapes]
    interpreted += [(shape, "triton", torch.float16) for shape in shapes[2:5:2]]
    return interpreted + [(shape, "cpu", dtype) for shape in shapes for dtype in KERNEL_DTYPES]


def make_conv(V, C_in, C_out, k, dtype, device, *, gamma: float | None = None, weight_scale: float = 1.0) -> NormedConv:
    """Weights of ``dtype``, a norm of random parameters in float32, or of this gamma."""

    def randn(*shape):
        return torch.randn(shape, device=device)

    weight = (weight_scale * randn(V, C_out, C_in, k) / (C_in * k) ** 0.5).to(dtype)
    gammas = randn(V, C_out) if gamma is None else torch.full((V, C_out), gamma, device=device)
    parameters = [value.requires_grad_() for value in (weight, gammas, randn(V, C_out))]
    return NormedConv(*parameters, randn(V, C_out), torch.rand(V, C_out, device=device) + 0.5)


def convs_of(block: NormedBottleneck | NormedConv) -> list[NormedConv]:
    return [block] if isinstance(block, NormedConv) else block.convs


def widened(block: NormedBottleneck | NormedConv) -> NormedBottleneck | NormedConv:
    """In float64, of new leaves."""
    if isinstance(block, NormedConv):
        tensors = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in block.tensors]
        return NormedConv(*tensors, block.eps)
    layers = [None if conv is None else widened(conv) for conv in block[:4]]
    return NormedBottleneck(*layers, pool=block.pool, time_pool=block.time_pool)


def results(function: Callable[..., Normed], x: Tensor, block, dout: Tensor | None, **options) -> dict[str, Tensor]:
    """Output, statistics and gradients by name."""
    out, statistics = function(x, block, **options)
    found = {"out": out.detach()}
    for i, each in enumerate(statistics):
        found |= {f"mean {i}": each.mean, f"var {i}": each.var}
    leaves = {"dx": x} if x.requires_grad else {}
    for i, conv in enumerate(convs_of(block)):
        leaves |= {f"d{name} {i}": value for name, value in zip(conv._fields[:3], conv.tensors, strict=False)}
    dout = torch.ones_like(out) if dout is None else dout
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return found | dict(zip(leaves, gradients, strict=True))


def rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item()


def errors(function: Callable[..., Normed], x: Tensor, block, options: dict) -> dict[str, float]:
    """How often the error of each kind of result holds that of plain PyTorch in the same dtype plus an ulp.

    Root mean squares over all layers, each in units of its own result; the truth is plain PyTorch in float64 on the
    same values.
    """
    plain = {"bn": options.get("bn", "batch"), "impl": "reference"}
    exact_x, exact_block = x.detach().double().requires_grad_(x.requires_grad), widened(block)
    with torch.no_grad():
        shape = function(exact_x, exact_block, **plain).out.shape
    dout = torch.randn(shape, device=x.device).to(x.dtype)
    got = results(function, x, block, dout, **options)
    with pools_may_vary():
        eager = results(function, x, block, dout, **plain)
        exact = results(function, exact_x, exact_block, dout, **plain)
    assert list(got) == list(exact)
    squares: dict[str, Tensor] = {}
    for name, truth in exact.items():
        assert got[name].shape == truth.shape, name
        assert got[name].dtype == eager[name].dtype, name
        kind, _, number = name.partition(" ")
        ulp, size = torch.finfo(x.dtype).eps, rms(truth)
        if kind in ("mean", "var"):  # of the values that float32 sums hold
            square = (exact[f"mean {number}"].square() + exact[f"var {number}"]).mean().item()
            ulp, size = torch.finfo(torch.float32).eps, square**0.5 if kind == "mean" else square
        error, allowed = (rms(result[name].double() - truth) / max(size, 1e-30) for result in (got, eager))
        squares[kind] = squares.get(kind, 0) + torch.tensor([error**2, (allowed + ulp) ** 2])
    return {kind: (error / allowed).sqrt().item() for kind, (error, allowed) in squares.items()}


def assert_errs_like_eager(function: Callable[..., Normed], make_inputs: Callable, options: dict, draws: int = 3):
    """``function`` errs at most twice what plain PyTorch errs in the same dtype, in the median of several draws.

    The median, because a ReLU or pool that is nearly tied sends a gradient elsewhere by chance, in eager as here.
    """
    found = [errors(function, *make_inputs(), options) for _ in range(draws)]
    for name in found[0]:
        middle = sorted(each[name] for each in found)[draws // 2]
        assert middle <= 2, f"{name}: {middle:.2f} times eager's error"
