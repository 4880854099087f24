"""Products of rows and weights: oneDNN's pointwise convolution, whose weights are packed once; else torch's own.

torch has no public call for a packed product, only the operators that its compiler writes. Their ReLU turns NaN into
zero, so it is not used.
"""

import torch
from torch import Tensor

_NAMES = [(torch.ops.mkldnn, "_convolution_pointwise_"), (torch._C._nn, "mkldnn_reorder_conv2d_weight")]
_HAVE_PACKED = torch.backends.mkldnn.is_available() and all(hasattr(place, name) for place, name in _NAMES)
_GEOMETRY = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation, groups


def pack(weight: Tensor, rows: int) -> Tensor:
    """weight: [C_out, C_in], float32, contiguous. The result multiplies any number of rows, and ``rows`` fastest."""
    if not (_HAVE_PACKED and torch.backends.mkldnn.enabled):
        return weight
    shape = [1, weight.shape[1], 1, max(1, rows)]
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight[..., None, None].to_mkldnn(), *_GEOMETRY, shape)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [..., C_in]; weight: [C_out, C_in], packed or not; bias: [C_out]; all contiguous; to [..., C_out]."""
    if not weight.is_mkldnn:
        return torch.nn.functional.linear(x, weight, bias)
    y = torch.ops.mkldnn._convolution_pointwise(_image(x), weight, bias, *_GEOMETRY, "none", [], "")
    return y.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


def add_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Add ``multiply``'s result to out, [..., C_out], contiguous, in place."""
    if not weight.is_mkldnn:
        out.view(-1, out.shape[-1]).addmm_(x.view(-1, x.shape[-1]), weight.t())
        if bias is not None:
            out += bias
    else:
        torch.ops.mkldnn._convolution_pointwise_(
            _image(out), _image(x), weight, bias, *_GEOMETRY, "add", 1.0, None, [], ""
        )


def _image(x: Tensor) -> Tensor:
    """[..., C] as one image, channels last: [1, C, 1, rows]."""
    return x.view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
