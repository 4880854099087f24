"""Products of rows and weights: oneDNN's pointwise convolution, whose weights are packed before; else torch's own.

torch has no public call for a packed product, only the operators that its compiler writes. Their ReLU turns NaN into
zero, so it is not used. Sums of many channels round more than in torch's own products, over four times as much from 512
on with some CPUs: those are torch's own.
"""

import logging
import platform
from functools import cache

import torch
from torch import Tensor

MAX_CHANNELS = 256  # of a sum that is at most twice as far from exact as torch's own
MIN_ROWS = 1024  # that a weight meets in a call; packing it costs more than it saves for fewer
_GEOMETRY = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation, groups

logger = logging.getLogger(__name__)


@cache
def packs() -> bool:
    """Whether torch's private operators do here what they did when this was written; else the log says why not."""
    if platform.machine() not in ("x86_64", "AMD64"):  # measured nowhere else
        return False
    try:
        x, weight, bias = (torch.arange(1.0, n + 1, device="cpu") for n in (6, 4, 2))
        packed = _reordered(weight.view(2, 2), 3)
        y = multiply(x.view(3, 2), packed, bias)
        add_product(y, x.view(3, 2), packed, bias)
        if torch.equal(y, 2 * torch.tensor([[6.0, 13.0], [12.0, 27.0], [18.0, 41.0]], device="cpu")):
            return True
        problem = "they compute something else"
    except (AttributeError, RuntimeError, TypeError) as error:  # gone, or with another schema
        problem = str(error).partition("\n")[0]
    logger.info("products on this CPU are torch's own, with no weights packed: %s", problem)
    return False


def _reordered(weight: Tensor, rows: int) -> Tensor:
    shape = [1, weight.shape[1], 1, rows]
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight[..., None, None].to_mkldnn(), *_GEOMETRY, shape)


def pack(weight: Tensor, rows: int, times: int) -> Tensor:
    """weight: [C_out, C_in], float32, contiguous, for this many products of this many rows.

    A product of other rows, or on another number of threads than the one that packs, is right and may be very slow.
    """
    if weight.shape[1] > MAX_CHANNELS or rows * times < MIN_ROWS or not torch.backends.mkldnn.enabled or not packs():
        return weight
    return _reordered(weight, rows)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [..., C_in]; weight: [C_out, C_in], packed or not; bias: [C_out]; all contiguous; to [..., C_out]."""
    if not weight.is_mkldnn:
        return torch.nn.functional.linear(x, weight, bias)
    y = torch.ops.mkldnn._convolution_pointwise.default(_image(x), weight, bias, *_GEOMETRY, "none", [], "")
    return y.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


def add_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Add ``multiply``'s result to out, [..., C_out], contiguous, in place."""
    if not weight.is_mkldnn:
        out.view(-1, out.shape[-1]).addmm_(x.view(-1, x.shape[-1]), weight.t())
        if bias is not None:
            out += bias
    else:
        torch.ops.mkldnn._convolution_pointwise_.binary(
            _image(out), _image(x), weight, bias, *_GEOMETRY, "add", 1.0, None, [], ""
        )


def _image(x: Tensor) -> Tensor:
    """[..., C] as one image, channels last: [1, C, 1, rows]."""
    return x.view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
