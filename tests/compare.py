"""The one comparison of kernels: the float64 reference is the truth, the reference in the same dtype the measure."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def widened(inputs: Sequence) -> list:
    """Floating tensors in float64, each a leaf that asks for a gradient where the original does."""
    wide = []
    for value in inputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().double().requires_grad_(value.requires_grad)
        wide.append(value)
    return wide


def results(function: Callable, inputs: Sequence, dout: Tensor | None) -> list[Tensor]:
    """The output, then the gradient of every input that asks for one."""
    out = function(*inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of ``value``, a float64 of no axes, to the next number of ``dtype``."""
    return torch.finfo(dtype).eps * torch.exp2(value.log2().floor())


def assert_matches_reference(function: Callable, reference: Callable, inputs: Sequence) -> None:
    """``function`` errs against float64 at most twice what ``reference`` errs in the inputs' dtype, and four ulp.

    Every output and gradient is compared, in the largest error; NaN and Inf must stand where float64 has them, and no
    input may change. ``inputs`` are passed on as they are; those that ask for a gradient are differentiated.
    """
    shape = reference(*inputs).shape
    dout = torch.randn(shape, device=next(x.device for x in inputs if isinstance(x, Tensor)))
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    got = results(function, inputs, dout)
    plain = results(reference, inputs, dout)
    exact = results(reference, widened(inputs), dout)
    for x, copy in zip(inputs, before, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x.detach().nan_to_num(), copy.nan_to_num()), "an input changed"
    for i, (value, ours, truth) in enumerate(zip(got, plain, exact, strict=True)):
        assert value.shape == truth.shape, f"result {i}: {list(value.shape)} instead of {list(truth.shape)}"
        assert value.dtype == ours.dtype, f"result {i}: {value.dtype} instead of {ours.dtype}"
        if truth.numel() == 0:
            continue
        finite = truth.isfinite()
        assert torch.equal(value.double().nan_to_num(1.0, 2.0, 3.0)[~finite], truth.nan_to_num(1.0, 2.0, 3.0)[~finite])
        if not finite.any():
            continue
        truth = truth[finite]
        error, allowed = ((r.double()[finite] - truth).abs().max() for r in (value, ours))
        limit = 2 * allowed + 4 * ulp(truth.abs().max(), value.dtype)
        assert error <= limit, f"result {i}: error {error:.3e}, the reference's {allowed:.3e}, limit {limit:.3e}"


@contextmanager
def pools_may_vary() -> Iterator[None]:
    """Around a reference: a GPU has no deterministic backward pass of max_pool3d; attention then warns of its own."""
    pool = "max_pool3d_with_indices_backward_cuda does not have a deterministic implementation"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", pool)
            warnings.filterwarnings("ignore", ".* [Aa]ttention defaults to a non-deterministic algorithm")
            yield
    finally:
        torch.use_deterministic_algorithms(True)


# the same values, [B, V, C, T, H, W], in other orders of memory
LAYOUTS = {
    "channels last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
