"""The CUDA kernels without a GPU: run by an emulation of their threads, and compiled by nvcc.

The emulation (cuda_emulation/) compiles the very ``.cu`` files with g++. It shows wrong values, accesses outside of
tensors, races between barriers and copies that nobody waited for; it says nothing of speed or of the GPU itself.
"""

import ctypes
import mmap
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from compare import LAYOUTS, assert_matches_reference
from cuda_emulation.emulator import CSRC, Emulator

from sdr_kernels import _ops, sdr_loss, temporal_conv3d
from sdr_kernels._cuda.temporal_conv3d import shared_bytes
from sdr_kernels.sdr_loss import LossOptions, sdr_loss_reference
from sdr_kernels.temporal_conv3d import temporal_conv3d_reference

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not sys.platform.startswith("linux"), reason="the emulation needs g++ on Linux"
)
MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on
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


# B, V, D, W, K: one row, no view left out, on and off 64 and 128 rows, the columns of a block and chunks of 16 bytes
LOSSES = [
    (1, 1, 1, 0, 2),
    (2, 2, 8, 2, 2),
    (3, 1, 33, 0, 2),
    (5, 3, 64, 3, 3),
    (16, 4, 72, 4, 2),
    (13, 5, 31, 5, 2),
    (32, 4, 200, 4, 8),
]


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    """impl="cuda" runs emulated kernels on CPU tensors; the function given has those of changed texts run."""

    def run(op: str, changed: dict[str, str] | None = None):
        monkeypatch.setattr(import_module(f"sdr_kernels._cuda.{op}"), "launch", Emulator(op, changed).launch)

    monkeypatch.setattr(_ops, "why_not", lambda kernels, device: "")
    run("sdr_loss")
    run("temporal_conv3d")
    return run


def conv(x, weight, scale=None, shift=None, residual=None, relu=False):
    return temporal_conv3d(x, weight, scale, shift, residual=residual, relu=relu, impl="cuda")


loss = partial(sdr_loss, impl="cuda")


def conv_inputs(shape, dtype):
    """x, weight, scale, shift and residual."""
    B, V, C_in, C_out, k, T, H, W = shape
    x = torch.randn(B, V, C_in, T, H, W).to(dtype)
    weight = (torch.randn(V, C_out, C_in, k) / (C_in * k) ** 0.5).to(dtype)
    return [x, weight, torch.randn(V, C_out), torch.randn(V, C_out), torch.randn(B, V, C_out, T, H, W).to(dtype)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_matches_reference(shape, dtype):
    inputs = conv_inputs(shape, dtype)
    assert_matches_reference(conv, temporal_conv3d_reference, inputs[:2])
    assert_matches_reference(partial(conv, relu=True), partial(temporal_conv3d_reference, relu=True), inputs)


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv_gradients_match_reference(shape):
    inputs = [x.requires_grad_() for x in conv_inputs(shape, torch.float16)]
    assert_matches_reference(partial(conv, relu=True), partial(temporal_conv3d_reference, relu=True), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_takes_any_memory_layout(layout):
    x, *rest = conv_inputs((2, 2, 16, 24, 3, 4, 3, 5), torch.float16)
    assert_matches_reference(conv, temporal_conv3d_reference, [LAYOUTS[layout](x), *rest])


@pytest.mark.parametrize("misaligned", [0, 1, 4], ids=["x", "weight", "residual"])
def test_conv_takes_channels_last_off_16_bytes(misaligned):
    inputs = conv_inputs((1, 2, 16, 24, 3, 4, 3, 5), torch.bfloat16)
    moved = inputs[misaligned]
    order = (0, 3, 2, 1) if moved.ndim == 4 else (0, 1, 3, 4, 5, 2)  # of the kernel, which then makes no copy
    packed = LAYOUTS["misaligned"](moved.permute(order))
    assert packed.data_ptr() % 16
    inputs[misaligned] = packed.permute([order.index(i) for i in range(moved.ndim)])
    assert_matches_reference(conv, temporal_conv3d_reference, inputs)


def test_conv_keeps_nan_and_inf():
    inputs = conv_inputs((1, 2, 17, 20, 3, 4, 3, 5), torch.float16)
    inputs[0][0, 0, 3, 1, 2, 2] = float("nan")
    inputs[0][0, 1, 5, 3, 0, 4] = float("inf")
    inputs[4][0, 1, 7, 0, 1, 1] = float("nan")
    inputs[4][0, 1, 8, 0, 1, 1] = -float("inf")
    assert_matches_reference(partial(conv, relu=True), partial(temporal_conv3d_reference, relu=True), inputs)


@pytest.mark.parametrize("clip", [0, 256])
def test_conv_reaches_beyond_two_to_the_31(clip):
    """The first block of one of 257 clips of 2^20 rows of 8 channels; only the pages that it touches are ever there."""
    rows, C, clips = 2**20, 8, 257
    memory = [mmap.mmap(-1, clips * rows * C * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) for _ in "xo"]
    x, out = (torch.frombuffer(m, dtype=torch.float16).view(clips, rows, C) for m in memory)
    weight, shown = torch.randn(C, C).half(), torch.randn(128, C).half()
    x[clip, :128] = shown
    pointers = [x.data_ptr(), weight.data_ptr(), 0, 0, 0, out.data_ptr()]
    slots = (ctypes.c_uint64 * 13)(*pointers, 1, rows, 1, C, C, 1, 0)
    grid = clips * rows // 128
    Emulator("temporal_conv3d").emulate(
        "temporal_conv3d_float16_n64", slots, (ctypes.c_int64 * 13)(*[-1] * 13), grid,
        range(clip * rows // 128, clip * rows // 128 + 1), 256, shared_bytes(64),
    )  # fmt: skip
    torch.testing.assert_close(out[clip, :128], shown @ weight)


def test_conv_refuses_float32():
    inputs = conv_inputs(CONVOLUTIONS[0], torch.float32)
    with pytest.raises(RuntimeError, match="x must be float16 or bfloat16"):
        conv(*inputs)


def loss_inputs(shape, dtype, options=LossOptions()):  # noqa: B008 - it is immutable
    """features, labels, logits, joint and leave-one-out logits, and options."""
    B, V, D, W, K = shape
    tensors = [torch.randn(size).to(dtype).requires_grad_() for size in ((B, V, D), (B,), (B, K), (B, W, K))]
    return [tensors[0], torch.randint(0, 2, (B,)), *tensors[1:], options]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", LOSSES, ids=str)
def test_loss_matches_reference(shape, dtype):
    assert_matches_reference(loss, sdr_loss_reference, loss_inputs(shape, dtype))


@pytest.mark.parametrize("objective", ["shared", "complementary"])
@pytest.mark.parametrize("direction", ["joint_to_loo", "loo_to_joint"])
@pytest.mark.parametrize(("anchors", "detach_joint"), [("all", False), ("real", True)])
@pytest.mark.parametrize("W", [0, 3])
def test_every_reading_of_the_loss(W, objective, direction, anchors, detach_joint):
    options = LossOptions(0.1, 2.0, anchors, detach_joint, direction, objective)
    assert_matches_reference(loss, sdr_loss_reference, loss_inputs((6, 3, 40, W, 2), torch.float32, options))


LOSS_EDGES = {
    "low temperature": lambda features, labels, *rest: (features, labels, *rest[:-1], LossOptions(0.01)),
    "identical features": lambda features, *rest: (features.detach()[:1, :1].expand_as(features), *rest),
    "a zero vector": lambda features, *rest: (features.detach().index_fill(1, torch.tensor(1), 0), *rest),
    "a single class": lambda features, labels, *rest: (features, torch.ones_like(labels), *rest),
    "no real anchor": lambda features, labels, *rest: (
        features, torch.ones_like(labels), *rest[:-1], LossOptions(anchors="real")
    ),
    "labels of bytes": lambda features, labels, *rest: (features, labels.byte(), *rest),
    "logits of 1e4": lambda features, labels, *rest: (features, labels, *(1e4 * x.sign() for x in rest[:-1]), rest[-1]),
    "a NaN among the features": lambda features, *rest: (
        features.detach().index_fill(1, torch.tensor(1), float("nan")), *rest
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edge", LOSS_EDGES)
def test_edges_of_the_loss(edge, dtype):
    inputs = LOSS_EDGES[edge](*loss_inputs((5, 3, 24, 3, 2), dtype))
    inputs = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in inputs]
    assert_matches_reference(loss, sdr_loss_reference, inputs)


# of a file: what is wrong, its text, and what that becomes
BUGS = {
    "temporal_conv3d.cu": {
        "no padding of time": ("row >= 0 && row < num_rows ?", "true ?"),
        "no mask on channels in": ("k0 + k < C_in ?", "true ?"),
        "no mask on rows out": ("m < BLOCK_M && row0 + m < num_rows;", "m < BLOCK_M;"),
        "writes past the last channel": ("store_chunk(out + offset, values, count,",
                                         "store_chunk(out + offset, values, 8,"),
        "swapped fragments of weight": ("x[m], w[0], w[1])", "x[m], w[0], w[2])"),
        "swapped rows and columns of the sums": ("lane / 4][warp_column + 8 * n + lane % 4 * 2]",
                                                 "lane % 8][warp_column + 8 * n + lane / 8 * 2]"),
        "no barrier before the product": ("    __syncthreads();  // this stage", "    // this stage"),
        "no barrier before the sums": ("  __syncthreads();  // the stages", "  // the stages"),
        "no barrier after the sums": ("  __syncthreads();\n  const bool whole_out", "  const bool whole_out"),
        "copies not waited for": ("cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
        "too little shared memory": ("constexpr int PAD = 8", "constexpr int PAD = 16"),
    },
    "products.cuh": {
        "no mask on rows": ("row < N ? D - column : 0", "D - column"),
        "swapped fragments": ("a[m][k], b[0], b[1]", "a[m][k], b[1], b[0]"),
        "a fragment of another row": ("[column + 1] = sums[m][n][3]", "[column + 1] = sums[m][n][1]"),
        "no barrier before the product": ("    __syncthreads();  // this stage", "    // this stage"),
        "no barrier before products are stored": ("  __syncthreads();  // the stages", "  // the stages"),
        "copies not waited for": ("cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>"),
    },
    "sdr_loss.cu": {
        "no mask on columns": ("row < N && column < D ?", "row < N ?"),
        "no barrier before the weights": ("reduce_rows(N, temperature, real_anchors, shared);\n  __syncthreads();",
                                          "reduce_rows(N, temperature, real_anchors, shared);"),
        "an own product that is overwritten": ("    __syncwarp();  // all lanes", "    // all lanes"),
        "its own similarity counted": ("if (j < N && j != i) {\n        const float logit",
                                       "if (j < N) {\n        const float logit"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("file", "bug"), [(file, bug) for file, bugs in BUGS.items() for bug in bugs])
def test_a_planted_bug_shows(file, bug, emulate):
    right, wrong = BUGS[file][bug]
    text = (CSRC / file).read_text()
    assert text.count(right) == 1
    if file == "temporal_conv3d.cu":
        op = "temporal_conv3d"
        checks = [(conv, temporal_conv3d_reference, conv_inputs(shape, torch.float16)[:2]) for shape in CONVOLUTIONS]
    else:
        op = "sdr_loss"
        checks = [(loss, sdr_loss_reference, loss_inputs(shape, torch.float16)) for shape in LOSSES]
    check_all(checks)  # right as it stands
    emulate(op, {file: text.replace(right, wrong)})
    with pytest.raises((AssertionError, RuntimeError), check=partial(is_found_in, op)):
        check_all(checks)


def check_all(checks):
    for check in checks:
        assert_matches_reference(*check)


def is_found_in(op: str, error: Exception) -> bool:
    """A wrong value, or what the emulator says, which begins with the kernel's name; no other RuntimeError."""
    return isinstance(error, AssertionError) or re.match(rf"{op}_\w+: ", str(error)) is not None


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
@pytest.mark.parametrize("op", ["sdr_loss", "temporal_conv3d"])
def test_nvcc_compiles_without_spills(op, arch, tmp_path):
    _, said = compile_for(arch, CSRC / f"{op}.cu", tmp_path, "-cubin", "-Xptxas", "-v")
    kernels = re.findall(r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    assert len(kernels) == said.count("Compiling entry function") > 0
    assert all((stack, spills) == ("0", "0") for _, stack, spills in kernels), kernels


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_conv_kernels_use_tensor_cores_and_wide_copies(tmp_path):
    ptx, _ = compile_for("sm_80", CSRC / "temporal_conv3d.cu", tmp_path, "-ptx")
    for kernel in ptx.read_text().split(".visible .entry ")[1:]:
        name = kernel.split("(")[0]
        kind = "bf16" if "bfloat16" in name else "f16"
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in kernel, name
        assert "cp.async.cg.shared.global" in kernel, name
        assert "st.global.v4.b32" in kernel, name
