"""Kernels that each break one rule of the audit, one that breaks none, and one that reaches too far.

See test_audit.py and test_fuzz_ops.py.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdr_kernels._cases import PRECISIONS, AuditCase


@triton.jit(do_not_specialize=["stride"])
def _good_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = (tl.program_id(1) % 4) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (row[:, None] * stride + column[None, :]))
    tl.store(out_ptr + (row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]), tl.dot(x, x).to(x.dtype))


@triton.jit(do_not_specialize=["stride"])
def _narrow_offset_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (row[:, None] * stride + tl.arange(0, BLOCK)[None, :]))
    tl.store(out_ptr + (row[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]), tl.dot(x, x).to(x.dtype))


@triton.jit(do_not_specialize=["stride"])
def _widened_too_late_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = (tl.program_id(0) * stride).to(tl.int64)
    x = tl.load(x_ptr + start + here)
    tl.store(out_ptr + here, tl.dot(x, x).to(x.dtype))


@triton.jit(do_not_specialize=["stride"])
def _summed_in_a_loop_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = stride
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(stride):
        x = tl.load(x_ptr + start.to(tl.int64) + here)
        acc = tl.dot(x, x, acc)
        start += stride
    tl.store(out_ptr + here, acc.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["stride"])
def _many_stages_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(stride):
        x = tl.load(x_ptr + step.to(tl.int64) * BLOCK + here)
        acc = tl.dot(x, x, acc)
    tl.store(out_ptr + here, acc.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["stride"])
def _scalar_product_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + here).to(tl.float32)
    tl.store(out_ptr + here, tl.dot(x, x, input_precision="ieee").to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["stride"])
def _no_nan_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + here)
    tl.store(out_ptr + here, tl.maximum(tl.dot(x, x), 0.0).to(x.dtype))


@triton.jit(do_not_specialize=["stride"])
def _atomic_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + here)
    tl.atomic_add(out_ptr + here, tl.dot(x, x).to(out_ptr.dtype.element_ty))


@triton.jit
def _reaching_kernel(x_ptr, out_ptr, N, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + here + READ, mask=here < N)
    tl.store(out_ptr + here + WRITE, x, mask=here < N)


def launch_reaching(x: torch.Tensor, read: int, write: int) -> torch.Tensor:
    """A copy of x, [5], of eight lanes; reads and writes so many elements too far."""
    out = torch.empty_like(x)
    _reaching_kernel[(1,)](x, out, len(x), READ=read, WRITE=write, BLOCK=8)
    return out


def launcher(kernel, *, block: int = 64, **options):
    def launch(x):
        kernel[(1, 1)](x, torch.empty_like(x), x.shape[0], BLOCK=block, **options)

    return launch


LAUNCHERS = {
    "good": launcher(_good_kernel),
    "narrow offset": launcher(_narrow_offset_kernel),
    "widened too late": launcher(_widened_too_late_kernel),
    "summed in a loop": launcher(_summed_in_a_loop_kernel),
    "scalar product": launcher(_scalar_product_kernel, block=32),
    "no NaN": launcher(_no_nan_kernel),
    "atomics": launcher(_atomic_kernel),
    "spill": launcher(_good_kernel, maxnreg=32),
    "shared memory": launcher(_many_stages_kernel, block=128, num_warps=8, num_stages=9),
    "no such option": launcher(_good_kernel, unknown=1),
}


def audit_cases(precision: str) -> Iterator[AuditCase]:
    def inputs(B, device):
        return (torch.empty(64, 64, dtype=PRECISIONS[precision], device=device),)

    for name, launch in LAUNCHERS.items():
        yield AuditCase(name, launch, launch, inputs)
