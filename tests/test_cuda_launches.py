"""The CUDA kernels on a GPU, as they are launched: test_cuda_kernels.py has their values without one."""

from functools import partial

import pytest
import torch
from compare import assert_matches_reference

from sdr_kernels import sdr_loss, temporal_conv3d
from sdr_kernels._cuda.loader import why_not_cuda
from sdr_kernels.sdr_loss import LossOptions, sdr_loss_reference
from sdr_kernels.temporal_conv3d import temporal_conv3d_reference

DEVICE = torch.device("cuda")
PROBLEM = why_not_cuda(DEVICE) if torch.cuda.is_available() else "there is no GPU"
pytestmark = pytest.mark.skipif(bool(PROBLEM), reason=f"CUDA kernels cannot run here: {PROBLEM}")
HALVES = [torch.float16, torch.bfloat16]
# B, V, C_in, C_out, k, T, H, W
CONVOLUTIONS = [
    (2, 3, 16, 32, 3, 8, 3, 5),
    (1, 4, 3, 24, 5, 3, 4, 3),
    (2, 2, 65, 17, 3, 1, 7, 5),
    (2, 4, 256, 128, 3, 16, 7, 7),
]
LOSSES = [(1, 1, 5), (5, 3, 64), (16, 4, 1024), (9, 7, 33)]  # B, V, D


def conv_inputs(shape, dtype):
    B, V, C_in, C_out, k, T, H, W = shape
    x, residual = (torch.randn(B, V, C, T, H, W, device=DEVICE).to(dtype) for C in (C_in, C_out))
    weight = (torch.randn(V, C_out, C_in, k, device=DEVICE) / (C_in * k) ** 0.5).to(dtype)
    scale, shift = (torch.randn(V, C_out, device=DEVICE) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (x, weight, scale, shift, residual)]


def conv(x, weight, scale, shift, residual, impl="cuda"):
    return temporal_conv3d(x, weight, scale, shift, residual=residual, relu=True, impl=impl)


def loss_inputs(shape, dtype):
    B, V, D = shape
    shapes = (B, V, D), (B,), (B, 2), (B, V, 2)
    x, z, joint, loo = (torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes)
    return [x, torch.randint(2, (B,), device=DEVICE), z, joint, loo]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_matches_reference(shape, dtype):
    assert_matches_reference(conv, partial(temporal_conv3d_reference, relu=True), conv_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", LOSSES, ids=str)
def test_loss_matches_reference(shape, dtype):
    options = LossOptions(detach_joint=False)
    ours = partial(sdr_loss, options=options, impl="cuda")
    assert_matches_reference(ours, partial(sdr_loss_reference, options=options), loss_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_repeats_are_bit_equal(dtype):
    conv_tensors = [t.detach() for t in conv_inputs(CONVOLUTIONS[-1], dtype)]
    loss_tensors = [t.detach() for t in loss_inputs(LOSSES[2], dtype)]
    for function, tensors in ((conv, conv_tensors), (partial(sdr_loss, impl="cuda"), loss_tensors)):
        first, *others = (function(*tensors) for _ in range(50))
        assert all(torch.equal(first, other) for other in others)


def test_follows_the_callers_stream_and_is_captured():
    tensors = [t.detach() for t in conv_inputs(CONVOLUTIONS[0], torch.bfloat16)]
    expected = conv(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        conv(*tensors)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = conv(*tensors)
    for _ in range(100):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
