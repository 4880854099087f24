"""cuDNN's frontend as a peer: a bottleneck as three fused graphs a branch, batch norms folded into scale and shift.

Written from the documentation of the package ``nvidia-cudnn-frontend`` and its names tried up to where a GPU is needed;
not run on one yet.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sdr.ftcn import Bottleneck

NDHWC = torch.channels_last_3d


def affine_of(norm: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in evaluation, float32, [1, C, 1, 1, 1]."""
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    shift = norm.bias.float() - norm.running_mean.float() * scale
    return tuple(value.detach().view(1, -1, 1, 1, 1) for value in (scale, shift))


class FusedConv:
    """One graph: convolution, scale, shift, what is added, ReLU; bf16 in and out, float32 between.

    Args:
        x: [B, C_in, T, H, W], channels innermost in memory, of the sizes that it will be called with.
        conv: without bias.
        norm: after it.
        residual: an example of what is added before the ReLU; None adds nothing.
    """

    def __init__(self, x: Tensor, conv: nn.Conv3d, norm: nn.BatchNorm3d, residual: Tensor | None = None) -> None:
        import cudnn

        self.handle = cudnn.create_handle()
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float32: cudnn.data_type.FLOAT}
        graph = cudnn.pygraph(
            handle=self.handle,
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        weight = conv.weight.detach().contiguous(memory_format=NDHWC)
        fixed = [weight, *affine_of(norm)]
        given = [x] if residual is None else [x, residual]
        operands = [
            graph.tensor(name=f"t{i}", dim=list(t.shape), stride=list(t.stride()), data_type=kinds[t.dtype])
            for i, t in enumerate((*fixed, *given))
        ]
        w, scale, shift, image, *added = operands
        out = graph.conv_fprop(image=image, weight=w, padding=list(conv.padding), stride=[1, 1, 1], dilation=[1, 1, 1])
        out = graph.add(a=graph.mul(a=out, b=scale), b=shift)
        for each in added:
            out = graph.add(a=out, b=each)
        out = graph.relu(input=out)
        out.set_output(True).set_data_type(cudnn.data_type.BFLOAT16)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph, self.given, self.result = graph, operands[3:], out
        self.fixed = dict(zip(operands[:3], fixed, strict=True))
        self.shape = (len(x), conv.out_channels, *x.shape[2:])
        self.workspace = torch.empty(graph.get_workspace_size(), device=x.device, dtype=torch.uint8)

    def __call__(self, *given: Tensor) -> Tensor:
        """x, and what is added, to the result; all bf16, channels innermost in memory."""
        out = torch.empty(self.shape, device=given[0].device, dtype=torch.bfloat16, memory_format=NDHWC)
        tensors = self.fixed | dict(zip(self.given, given, strict=True)) | {self.result: out}
        self.graph.execute(tensors, self.workspace, handle=self.handle)
        return out


def fused_blocks(blocks: Sequence[Bottleneck], clips: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """Identity blocks of V branches, one after the other; takes each branch's rows, [B, C, T, H, W].

    Raises:
        ModuleNotFoundError: the package is not installed.
    """

    def fused(block: Bottleneck, x: Tensor) -> Callable[[Tensor], Tensor]:
        a = FusedConv(x, block.a, block.a_bn)
        b = FusedConv(a(x), block.b, block.b_bn)
        c = FusedConv(b(a(x)), block.c, block.c_bn, residual=x)
        return lambda x: c(b(a(x)), x)

    branches = [fused(block, x) for block, x in zip(blocks, clips, strict=True)]
    return lambda clips: [branch(x) for branch, x in zip(branches, clips, strict=True)]
