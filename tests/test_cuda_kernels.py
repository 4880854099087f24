"""The CUDA kernels without a GPU: run by an emulation of their threads, and compiled by nvcc.

The emulation (cuda_emulation/) compiles the very ``.cu`` files with g++. It shows wrong values, accesses outside of
tensors, races between barriers and copies that nobody waited for; it says nothing of speed or of the GPU itself.
"""

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import LAYOUTS, assert_matches_reference
from cuda_emulation.emulator import CSRC, Emulator

from sdr_kernels._cuda import temporal_conv3d
from sdr_kernels.temporal_conv3d import temporal_conv3d_reference

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not sys.platform.startswith("linux"), reason="the emulation needs g++ on Linux"
)
HALVES = [torch.float16, torch.bfloat16]
# B, V, C_in, C_out, k, T, H, W: on and off every block size and every chunk of 16 bytes, fewer frames than taps
CONVOLUTIONS = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 3, 16, 32, 3, 8, 3, 5),
    (1, 4, 3, 24, 5, 3, 4, 3),
    (2, 2, 65, 17, 3, 1, 7, 5),
    (1, 1, 24, 129, 3, 64, 2, 1),
    (1, 2, 72, 200, 1, 2, 5, 13),
    (1, 2, 130, 40, 5, 3, 2, 3),
    (0, 2, 8, 16, 3, 4, 2, 2),
]


@pytest.fixture
def conv(monkeypatch):
    """The launcher of temporal_conv3d on emulated kernels, of the source as it is or of another."""

    def emulated(source: str | None = None):
        monkeypatch.setattr(temporal_conv3d, "launch", Emulator("temporal_conv3d", source).launch)
        return lambda x, weight, scale=None, shift=None, residual=None, relu=False: temporal_conv3d.temporal_conv3d_fwd(
            x, weight, scale, shift, residual, relu
        )

    return emulated


def conv_inputs(shape, dtype):
    """x, weight, scale, shift and residual."""
    B, V, C_in, C_out, k, T, H, W = shape
    x = torch.randn(B, V, C_in, T, H, W).to(dtype)
    weight = (torch.randn(V, C_out, C_in, k) / (C_in * k) ** 0.5).to(dtype)
    return [x, weight, torch.randn(V, C_out), torch.randn(V, C_out), torch.randn(B, V, C_out, T, H, W).to(dtype)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_matches_reference(shape, dtype, conv):
    inputs = conv_inputs(shape, dtype)
    function = conv()
    assert_matches_reference(function, temporal_conv3d_reference, inputs[:2])
    assert_matches_reference(partial(function, relu=True), partial(temporal_conv3d_reference, relu=True), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_takes_any_memory_layout(layout, conv):
    x, *rest = conv_inputs((2, 2, 16, 24, 3, 4, 3, 5), torch.float16)
    assert_matches_reference(conv(), temporal_conv3d_reference, [LAYOUTS[layout](x), *rest])


@pytest.mark.parametrize("misaligned", [0, 1, 4], ids=["x", "weight", "residual"])
def test_conv_takes_channels_last_off_16_bytes(misaligned, conv):
    inputs = conv_inputs((1, 2, 16, 24, 3, 4, 3, 5), torch.bfloat16)
    moved = inputs[misaligned]
    order = (0, 3, 2, 1) if moved.ndim == 4 else (0, 1, 3, 4, 5, 2)  # of the kernel, which then makes no copy
    packed = LAYOUTS["misaligned"](moved.permute(order))
    assert packed.data_ptr() % 16
    inputs[misaligned] = packed.permute([order.index(i) for i in range(moved.ndim)])
    assert_matches_reference(conv(), temporal_conv3d_reference, inputs)


def test_conv_keeps_nan_and_inf(conv):
    inputs = conv_inputs((1, 2, 17, 20, 3, 4, 3, 5), torch.float16)
    inputs[0][0, 0, 3, 1, 2, 2] = float("nan")
    inputs[0][0, 1, 5, 3, 0, 4] = float("inf")
    inputs[4][0, 1, 7, 0, 1, 1] = float("nan")
    inputs[4][0, 1, 8, 0, 1, 1] = -float("inf")
    assert_matches_reference(partial(conv(), relu=True), partial(temporal_conv3d_reference, relu=True), inputs)


def test_conv_refuses_float32():
    assert "float32" in temporal_conv3d.why_unfit(torch.zeros(1))
    assert not temporal_conv3d.why_unfit(torch.zeros(1, dtype=torch.bfloat16))


def check_all(function):
    for shape in CONVOLUTIONS:
        assert_matches_reference(function, temporal_conv3d_reference, conv_inputs(shape, torch.float16)[:2])


CONV_BUGS = {
    "no padding of time": ("row >= 0 && row < num_rows ?", "true ?"),
    "no mask on channels in": ("k0 + k < C_in ?", "true ?"),
    "no mask on rows out": ("row0 + m < num_rows ?", "true ?"),
    "a row past the chunk": ("store_chunk(out + offset, values, count,", "store_chunk(out + offset, values, 8,"),
    "swapped fragments of weight": ("x[m], w[0], w[1])", "x[m], w[0], w[2])"),
    "swapped rows and columns of the sums": ("lane / 4][warp_column + 8 * n + lane % 4 * 2]",
                                             "lane % 8][warp_column + 8 * n + lane / 8 * 2]"),
    "no barrier before the product": ("    __syncthreads();  // this stage", "    // this stage"),
    "no barrier before the sums": ("  __syncthreads();  // the stages", "  // the stages"),
    "no barrier after the sums": ("  __syncthreads();\n  const bool whole_out", "  const bool whole_out"),
    "copies not waited for": ("cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
    "too little shared memory": ("constexpr int PAD = 8", "constexpr int PAD = 16"),
}  # fmt: skip


@pytest.mark.parametrize("bug", CONV_BUGS)
def test_a_planted_bug_in_conv_shows(bug, conv):
    right, wrong = CONV_BUGS[bug]
    source = (CSRC / "temporal_conv3d.cu").read_text()
    assert source.count(right) == 1
    function = conv(source.replace(right, wrong))
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(function)


def compile_for(arch: str, path: Path, folder: Path, *options: str) -> tuple[Path, str]:
    """What nvcc makes of a ``.cu`` file, with the flags of the build, and what it says."""
    lines = (CSRC / "flags.txt").read_text().splitlines()
    flags = [line for line in lines if line and not line.startswith("#")]
    out = folder / path.name
    command = ["nvcc", *flags, f"-arch={arch}", *options, "-o", str(out), str(path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return out, ran.stdout + ran.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", ["temporal_conv3d"])
def test_nvcc_compiles_without_spills(op, arch, tmp_path):
    _, said = compile_for(arch, CSRC / f"{op}.cu", tmp_path, "-cubin", "-Xptxas", "-v")
    kernels = re.findall(r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    assert len(kernels) == said.count("Compiling entry function") > 0
    assert all((stack, spills) == ("0", "0") for _, stack, spills in kernels), kernels


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_every_conv_kernel_multiplies_on_tensor_cores(tmp_path):
    ptx, _ = compile_for("sm_80", CSRC / "temporal_conv3d.cu", tmp_path, "-ptx")
    for kernel in ptx.read_text().split(".visible .entry ")[1:]:
        name = kernel.split("(")[0]
        kind = "bf16" if "bfloat16" in name else "f16"
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in kernel, name
        assert "cp.async.cg.shared.global" in kernel, name
