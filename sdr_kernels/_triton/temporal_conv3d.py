"""Temporal convolution as products over flat rows.

Memory is [B, V, T, H, W, C]: a row is one (frame, position), and a temporal tap is an offset of H * W rows. A tap falls
outside of time exactly where its row falls outside of [0, T * H * W), so padding is one mask and any T, H, W will do.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdr_kernels._cases import BLOCKS, BRANCHES, FRAMES, PRECISIONS, STEMS, AuditCase, randn
from sdr_kernels._ops import channels_last, empty_channels_last
from sdr_kernels._tiles import choose_tile, precision_class, width_class
from sdr_kernels.temporal_conv3d import conv3d_branches, temporal_conv3d_reference


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_columns(ptr, columns, C: tl.constexpr):
    """A vector of one value per channel as a row, [1, N]."""
    return tl.load(ptr + columns, mask=columns < C, other=0.0)[None, :]


@triton.jit
def add_product(
    acc, x_ptr, rows, row_mask, num_rows, tap_rows, w_ptr, columns, c_in,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_N] plus the (KERNEL, 1, 1) convolution of these rows to these columns.

    x_ptr: [num_rows, C_IN] of one clip and branch; w_ptr: [KERNEL, C_IN, C_OUT]; tap_rows: rows of one frame; c_in:
    C_IN as an argument, a bound that LLVM does not know, since it unrolls short loops until their addresses spill.
    """
    steps: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    # only a scalar moves in the loop: addresses and bounds of the tile's own take the fewest registers
    x_tile = x_ptr + (rows[:, None] * C_IN + k[None, :])
    w_tile = w_ptr + (k[:, None] * C_OUT + columns[None, :])
    for step in range(KERNEL * tl.cdiv(c_in, BLOCK_K)):
        tap = tl.cast(step // steps, tl.int64)
        k0 = (step - tap * steps) * BLOCK_K
        tap_offset = (tap - KERNEL // 2) * tap_rows
        x_mask = row_mask
        if KERNEL > 1:
            x_mask = row_mask & (rows + tap_offset >= 0) & (rows + tap_offset < num_rows)
        x_mask = x_mask[:, None]
        w_mask = True
        if C_IN % BLOCK_K != 0:
            x_mask = x_mask & (k0 + k < C_IN)[None, :]
            w_mask = w_mask & (k0 + k < C_IN)[:, None]
        if C_OUT % BLOCK_N != 0:
            w_mask = w_mask & (columns < C_OUT)[None, :]
        x = tl.load(x_tile + (tap_offset * C_IN + k0), mask=x_mask, other=0.0)
        w = tl.load(w_tile + (tap * C_IN + k0) * C_OUT, mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["V", "num_rows", "tap_rows", "c_in"])
def _temporal_conv3d_fwd_kernel(
    x_ptr,  # [B, V, num_rows, C_IN]
    w_ptr,  # [V, KERNEL, C_IN, C_OUT]
    scale_ptr, shift_ptr,  # [V, C_OUT] float32, or None
    residual_ptr,  # [B, V, num_rows, C_OUT], or None
    out_ptr,  # [B, V, num_rows, C_OUT]
    V, num_rows, tap_rows, c_in,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(num_rows, BLOCK_M) * column_tiles
    clip = (tl.program_id(0) // tiles).to(tl.int64)  # of B * V
    branch = clip % V
    tile = tl.program_id(0) % tiles
    rows = (tile // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    row_mask = rows < num_rows
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        x_ptr + clip * num_rows * C_IN, rows, row_mask, num_rows, tap_rows,
        w_ptr + branch * (KERNEL * C_IN * C_OUT), columns, c_in, C_IN, C_OUT, KERNEL, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if scale_ptr is not None:
        acc *= load_columns(scale_ptr + branch * C_OUT, columns, C_OUT)
    if shift_ptr is not None:
        acc += load_columns(shift_ptr + branch * C_OUT, columns, C_OUT)
    mask = row_mask[:, None] & (columns < C_OUT)[None, :]
    offsets = (clip * num_rows + rows)[:, None] * C_OUT + columns[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "V", "num_rows", "tap_rows", "splits"])
def _temporal_conv3d_dweight_kernel(
    x_ptr,  # [B, V, num_rows, C_IN]
    dout_ptr,  # [B, V, num_rows, C_OUT]
    partial_ptr,  # [splits, V, KERNEL, C_IN, C_OUT] float32
    B, V, num_rows, tap_rows, splits,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)  # of C_IN by C_OUT
    branch = (tl.program_id(1) // KERNEL).to(tl.int64)
    tap = (tl.program_id(1) % KERNEL).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    c_in = (tile // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    row_tiles = tl.cdiv(num_rows, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split, B * row_tiles, splits):  # a fixed share of the rows: the sum's order never changes
        clip = (step // row_tiles) * V + branch
        rows = (step % row_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        tap_row = rows + (tap - KERNEL // 2) * tap_rows
        inside = (rows < num_rows) & (tap_row >= 0) & (tap_row < num_rows)
        x_offsets = (clip * num_rows + tap_row)[None, :] * C_IN + c_in[:, None]
        x = tl.load(x_ptr + x_offsets, mask=inside[None, :] & (c_in < C_IN)[:, None], other=0.0)
        dout_offsets = (clip * num_rows + rows)[:, None] * C_OUT + columns[None, :]
        dout = tl.load(dout_ptr + dout_offsets, mask=inside[:, None] & (columns < C_OUT)[None, :], other=0.0)
        acc = tl.dot(x, dout, acc, input_precision="ieee")
    w_rows = ((split * V + branch) * KERNEL + tap) * C_IN + c_in
    mask = (c_in < C_IN)[:, None] & (columns < C_OUT)[None, :]
    tl.store(partial_ptr + (w_rows[:, None] * C_OUT + columns[None, :]), acc, mask=mask)


def pack(weight: Tensor) -> Tensor:
    """[V, C_out, C_in, k] as contiguous [V, k, C_in, C_out], the kernels' order; free where memory has it already."""
    return weight.permute(0, 3, 2, 1).contiguous()


def rows_of(x: Tensor) -> Tensor:
    """[B, V, C, T, H, W] as contiguous [B, V, T, H, W, C]; free where channels are innermost already."""
    return channels_last(x).movedim(-4, -1)


def conv_class(dtype: torch.dtype, C_out: int) -> str:
    return f"temporal_conv3d {precision_class(dtype)} out{min(width_class(C_out), 128)}"


def temporal_conv3d_fwd(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    B, V, C_in, T, H, W = x.shape
    C_out, kernel = weight.shape[1], weight.shape[3]
    out = empty_channels_last(x, (B, V, C_out, T, H, W))
    if B == 0:
        return out
    tile = choose_tile(conv_class(x.dtype, C_out), B * V * T * H * W, x.device)
    grid = (triton.cdiv(T * H * W, tile["BLOCK_M"]) * triton.cdiv(C_out, tile["BLOCK_N"]) * B * V,)
    with torch.cuda.device_of(x):
        _temporal_conv3d_fwd_kernel[grid](
            rows_of(x), pack(weight),
            None if scale is None else scale.contiguous(), None if shift is None else shift.contiguous(),
            None if residual is None else rows_of(residual), out, V, T * H * W, H * W, C_in,
            C_IN=C_in, C_OUT=C_out, KERNEL=kernel, RELU=relu, **tile,
        )  # fmt: skip
    return out


def temporal_conv3d_dweight(x: Tensor, dout: Tensor, kernel_size: int) -> Tensor:
    B, V, C_in, T, H, W = x.shape
    C_out = dout.shape[2]
    if B == 0:
        return x.new_zeros((V, kernel_size, C_in, C_out), dtype=torch.float32).permute(0, 3, 2, 1)
    tile = choose_tile(f"temporal_conv3d_dweight {precision_class(x.dtype)}", B * V * T * H * W, x.device)
    tiles = triton.cdiv(C_in, tile["BLOCK_M"]) * triton.cdiv(C_out, tile["BLOCK_N"]), V * kernel_size
    # enough programs to fill a large GPU, whatever the GPU: the result must not depend on it
    splits = max(1, min(256 // (tiles[0] * tiles[1]), B * triton.cdiv(T * H * W, tile["BLOCK_K"])))
    partial = x.new_empty((splits, V, kernel_size, C_in, C_out), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _temporal_conv3d_dweight_kernel[(*tiles, splits)](
            rows_of(x), rows_of(dout.to(x.dtype)), partial, B, V, T * H * W, H * W, splits,
            C_IN=C_in, C_OUT=C_out, KERNEL=kernel_size, **tile,
        )  # fmt: skip
    return partial.sum(0).permute(0, 3, 2, 1)


def dweight_reference(x: Tensor, dout: Tensor, kernel_size: int) -> Tensor:
    weight = x.new_zeros((x.shape[1], dout.shape[2], x.shape[2], kernel_size)).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(conv3d_branches(x, weight), weight, dout)[0].to(torch.float32)


def audit_layers(precision: str) -> list[tuple[int, ...]]:
    """The largest layer, (C_in, C_out, k, T, H), of the shipped models for each shape class and kernel size.

    The kernels loop over channels and taps: a smaller layer of the same class differs in trip counts alone.
    """
    layers = [(3, width, kernel, FRAMES, size) for width, kernel, size in STEMS]
    for block in BLOCKS:
        T, H, inner, outer = block.frames, block.size, block.channels, 4 * block.channels
        layers += [(block.channels_in, inner, block.kernel, T, H), (inner, inner, 1, T, H)]
        layers.append((inner, outer, 1, T, H // (1 + block.pool)))
        if block.channels_in != outer:
            layers.append((block.channels_in, outer, 1, T, H))
    layers.sort(key=lambda layer: layer[0] * layer[1])
    dtype = PRECISIONS[precision]
    return list({(conv_class(dtype, layer[1]), layer[2]): layer for layer in layers}.values())


def audit_cases(precision: str) -> Iterator[AuditCase]:
    """Every layer, in half precision with and without an epilogue, and the gradient of the weight for each k."""
    dtype = PRECISIONS[precision]

    def activations(C, layer, B, device):
        T, H = layer[3:]
        return channels_last(randn(B, BRANCHES, C, T, H, H, device=device, dtype=dtype))

    def fwd_inputs(layer, epilogue, B, device):
        C_in, C_out, k = layer[:3]
        weight = randn(BRANCHES, C_out, C_in, k, device=device, dtype=dtype, fan_in=C_in * k)
        affine = [randn(BRANCHES, C_out, device=device) if epilogue else None for _ in range(2)]
        residual = activations(C_out, layer, B, device) if epilogue else None
        return activations(C_in, layer, B, device), weight, *affine, residual, epilogue

    def dweight_inputs(layer, B, device):
        return activations(layer[0], layer, B, device), activations(layer[1], layer, B, device), layer[2]

    layers = audit_layers(precision)
    for layer in layers:
        for epilogue in (False, True) if precision == "half" else (True,):
            name = f"{layer[0]} to {layer[1]}, k {layer[2]}{', epilogue' * epilogue}"
            inputs = partial(fwd_inputs, layer, epilogue)
            yield AuditCase(name, temporal_conv3d_fwd, temporal_conv3d_reference, inputs)
    for layer in {layer[2]: layer for layer in layers}.values():
        name = f"{layer[0]} to {layer[1]}, k {layer[2]}"
        yield AuditCase(name, temporal_conv3d_dweight, dweight_reference, partial(dweight_inputs, layer))
