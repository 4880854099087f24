"""Step "sanitizer": compute-sanitizer's tools over every op on small odd shapes."""

import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from inputs import bottleneck_inputs, folded, random_rows, tensors_of
from ledger import NOT_MEASURED, Ledger, measured, run_limited
from machine import ROOT, Machine

import sdr_kernels
from sdr.layers import Shape
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD
from sdr_kernels._cuda.loader import why_not_cuda

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLACES = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/cuda*/bin", "/usr/bin")
# every tensor an allocation of its own, so that memcheck sees an access past its end
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SUMMARIES = (r"ERROR SUMMARY: (\d+) error", r"RACECHECK SUMMARY: (\d+) hazard")
ALL_FINITE = "results, all finite"
PLAIN_SHARE = 0.5  # of the step's time


def temporal_conv3d(
    device: torch.device, dtype: torch.dtype, impl: str = "triton", more: Sequence[tuple[int, ...]] = ()
) -> Iterator[object]:
    for B, V, C_in, C_out, k, T, H, W in [(2, 2, 17, 33, 3, 3, 3, 5), (1, 2, 3, 8, 5, 1, 5, 3), *more]:
        x, residual = (random_rows((B, V, C, T, H, W), device, dtype) for C in (C_in, C_out))
        inputs = [tensor.requires_grad_() for tensor in (x, *folded(V, C_out, C_in, k, device, dtype), residual)]
        *inputs, residual = inputs
        out = sdr_kernels.temporal_conv3d(*inputs, residual=residual, relu=True, impl=impl)
        yield torch.autograd.grad(out, [*inputs, residual], torch.ones_like(out))


def temporal_stem(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    weights = folded(2, 9, 3, 5, device, dtype)
    yield sdr_kernels.temporal_stem(random_rows((2, 2, 3, 3, 12, 20), device, dtype), *weights, impl="triton")
    clip = torch.randint(0, 256, (2, 3, 3, 11, 21), dtype=torch.uint8).to(device)  # one for both branches
    yield sdr_kernels.temporal_stem(clip, *weights, normalise=(IMAGENET_MEAN, IMAGENET_STD), impl="triton")


def temporal_bottleneck(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    shapes = [
        Shape(24, 6, 24, 3, 3, 5),
        Shape(8, 8, 32, 3, 4, 5, branch1=True, time_pool=True),
        Shape(32, 16, 64, 1, 3, 7, branch1=True, pool=True),
        Shape(40, 300, 40, 3, 2, 3),  # wider than what the kernel keeps in registers
    ]
    for shape in shapes:
        positional, named = bottleneck_inputs(shape, 1, 2, device, dtype)
        yield sdr_kernels.temporal_bottleneck(*positional, **named, impl="triton")


def spatial_mean(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    yield sdr_kernels.spatial_mean(random_rows((2, 3, 33, 5, 3, 7), device, dtype), impl="triton")


def norm_linear(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    x, weight, residual = (torch.randn(shape, device=device).to(dtype) for shape in [(3, 5, 37), (45, 37), (3, 5, 45)])
    gamma, beta, bias = (torch.randn(size, device=device) for size in (37, 37, 45))
    yield sdr_kernels.norm_linear(
        x, weight, bias, norm=(gamma, beta, 1e-5), activation="gelu", residual=residual, impl="triton"
    )


def token_attention(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    yield sdr_kernels.token_attention(torch.randn(2, 17, 3 * 3 * 20, device=device).to(dtype), 3, impl="triton")


def info_nce(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    for N, D in [(70, 33), (3, 5)]:
        features = torch.randn(N, D, device=device).to(dtype).requires_grad_()
        labels = torch.arange(N, device=device) % 2
        yield torch.autograd.grad(sdr_kernels.info_nce(features, labels, impl="triton"), features)


def leave_one_out_kl(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    joint, loo = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in ((33, 3), (33, 2, 3)))
    value = sdr_kernels.leave_one_out_kl(joint, loo, detach_joint=False, impl="triton")
    yield torch.autograd.grad(value, (joint, loo))


def sdr_loss(
    device: torch.device, dtype: torch.dtype, impl: str = "triton", more: Sequence[tuple[int, ...]] = ()
) -> Iterator[object]:
    for B, V, D in [(5, 3, 33), (16, 4, 72), *more]:
        shapes = (B, V, D), (B,), (B, 2), (B, V, 2)
        x, z, joint, loo = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes)
        parts = sdr_kernels.sdr_loss(x, torch.arange(B, device=device) % 2, z, joint, loo, impl=impl)
        yield torch.autograd.grad(parts.sum(), (x, z, joint, loo), allow_unused=True)


def normed(
    device: torch.device, dtype: torch.dtype, C_in: int, C_out: int, k: int, V: int = 2
) -> sdr_kernels.NormedConv:
    """A layer of training."""
    weight, gamma, beta = folded(V, C_out, C_in, k, device, dtype)
    return sdr_kernels.NormedConv(*(value.requires_grad_() for value in (weight, gamma, beta)))


def normed_stem(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    conv = normed(device, dtype, 3, 9, 5)
    out = sdr_kernels.normed_stem(random_rows((1, 2, 3, 2, 9, 7), device, dtype), conv, impl="triton").out
    yield out, torch.autograd.grad(out, conv.tensors[:3], torch.ones_like(out))


def normed_bottleneck(device: torch.device, dtype: torch.dtype, scheme: str) -> Iterator[object]:
    """A block with branch1 and a pool, or one without and with the pool over time, by which scheme has it."""
    wide = scheme == "gram"
    C_in, inner, C_out = (16, 8, 33) if wide else (17, 6, 17)
    kernel = 3 if wide else 5  # so many taps that gradient rows are written out first
    sizes = [(C_in, inner, kernel), (inner, inner, 1), (inner, C_out, 1), *[(C_in, C_out, 1)] * wide]
    layers = [normed(device, dtype, *size) for size in sizes]
    block = sdr_kernels.NormedBottleneck(*layers, *[None] * (4 - len(layers)), pool=wide, time_pool=not wide)
    x = random_rows((1, 2, C_in, 3, 3, 5), device, dtype).requires_grad_()
    out = sdr_kernels.normed_bottleneck(x, block, scheme=scheme, impl="triton").out
    leaves = [x, *(tensor for layer in layers for tensor in layer.tensors[:3])]
    yield out, torch.autograd.grad(out, leaves, torch.ones_like(out))


def clip_views(device: torch.device, dtype: torch.dtype) -> Iterator[object]:
    B, V, T, H, W = 2, 3, 2, 35, 37
    planar = torch.randint(0, 256, (B, 3, T, H, W), dtype=torch.uint8).to(device)
    innermost = planar.movedim(1, -1).contiguous().movedim(-1, 1)
    for clips, F in ((planar, 1), (innermost, T)):
        sampling = torch.randn(B, V, F, 4, device=device) * torch.tensor([1.0, 40, 1, 40], device=device)
        sampling[:, 0] = torch.tensor([-1.0, W - 1, 1, 0], device=device)
        color = torch.randn(B, V, F, 3, 4, device=device)
        hole = torch.randint(-2, 40, (B, V, F, 4), dtype=torch.int32).to(device)
        statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        yield sdr_kernels.clip_views(clips, sampling, color, hole, **statistics, dtype=dtype, impl="triton")


SMALL_SHAPES: dict[str, Callable[[torch.device, torch.dtype], Iterator[object]]] = {
    "temporal_conv3d": temporal_conv3d,
    "temporal_stem": temporal_stem,
    "temporal_bottleneck": temporal_bottleneck,
    "spatial_mean": spatial_mean,
    "norm_linear": norm_linear,
    "token_attention": token_attention,
    "info_nce": info_nce,
    "leave_one_out_kl": leave_one_out_kl,
    "sdr_loss": sdr_loss,
    "clip_views": clip_views,
    "normed_stem": normed_stem,
    "normed_bottleneck gram": partial(normed_bottleneck, scheme="gram"),
    "normed_bottleneck fused": partial(normed_bottleneck, scheme="fused"),
}
# ops of csrc, which have no interpreter; they copy 16 bytes at a time where rows allow it, and have tiles of 128 rows
CUDA_SHAPES = {
    "temporal_conv3d in CUDA": partial(temporal_conv3d, impl="cuda", more=[(1, 2, 72, 80, 3, 2, 3, 5)]),
    "sdr_loss in CUDA": partial(sdr_loss, impl="cuda", more=[(17, 4, 72), (9, 8, 33)]),
}
CUDA_DTYPES = {"temporal_conv3d in CUDA": ("bfloat16",), "sdr_loss in CUDA": ("float32", "bfloat16")}


def small_runs(device: torch.device) -> list[str]:
    """Every op in every dtype that is run, as ``op:dtype``."""
    if device.type != "cuda":  # interpreted, bf16 products are wrong, and float16 runs no other code than float32
        return [f"{op}:float32" for op in SMALL_SHAPES]
    runs = [f"{op}:{dtype}" for op in SMALL_SHAPES for dtype in ("float32", "bfloat16")]
    cuda = [f"{op}:{dtype}" for op, dtypes in CUDA_DTYPES.items() for dtype in dtypes]
    return runs if why_not_cuda(device) else runs + cuda


def run_small_shapes(runs: Sequence[str], device: torch.device) -> int:
    """Run the kernels of some ops once; the number of results, all of them read back and finite.

    Raises:
        ValueError: a result is not finite.
    """
    count = 0
    for run in runs:
        op, _, dtype = run.partition(":")
        for result in (SMALL_SHAPES | CUDA_SHAPES)[op](device, getattr(torch, dtype)):
            for tensor in tensors_of(result):
                if not tensor.cpu().isfinite().all():
                    raise ValueError(f"{run} gave a value that is not finite")
                count += 1
    return count


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, in PATH, CUDA's usual places or a Python package; None where there is none."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    candidates = [*packages.glob("**/compute-sanitizer")]
    candidates += [file for place in PLACES for file in Path("/").glob(f"{place[1:]}/compute-sanitizer")]
    return next((str(file) for file in candidates if file.is_file() and os.access(file, os.X_OK)), None)


def count_errors(text: str) -> int | None:
    """Errors or hazards that the tool's summary names; None where it ended without a summary."""
    counts = [int(number) for pattern in SUMMARIES for number in re.findall(pattern, text)]
    return max(counts) if counts else None


def run_tool(command: list[str], limit_s: float, log: Path, environment: dict[str, str]) -> dict[str, object] | str:
    """Errors that one tool found, its seconds and, where it found some, the first of them."""
    start = time.monotonic()
    code = run_limited(command, limit_s, log, cwd=ROOT, env=environment)
    text = log.read_text(errors="replace")
    if code is None:
        return f"{NOT_MEASURED}it did not end within {limit_s:.0f} s"
    errors = count_errors(text)
    if errors is None or "Device not supported" in text:
        return f"{NOT_MEASURED}no summary, exit code {code}: {' '.join(text[-400:].split())}"
    result: dict[str, object] = {"errors": errors, "exit_code": code, "seconds": round(time.monotonic() - start, 1)}
    if errors or code:
        result["log"] = text[:3000]
    return result


def run_plainly(script: list[str], environment: dict[str, str], ledger: Ledger, machine: Machine) -> str:
    """Run the small shapes without a tool, which finds the compiled kernels in Triton's cache; "passed", or why not."""
    runs = small_runs(machine.device)
    groups = [runs] if machine.rehearsal else [[run] for run in runs]  # compiling takes the time, so all at once
    limit_s = PLAIN_SHARE * ledger.left()

    def run_group(i: int) -> str:
        log = ledger.path.with_suffix(f".{i}.log")
        code = run_limited([*script, *groups[i]], limit_s, log, cwd=ROOT, env=environment)
        if code is None:
            return f"{NOT_MEASURED}{' '.join(groups[i])} did not end within {limit_s:.0f} s"
        text = log.read_text(errors="replace")
        return "" if code == 0 or ALL_FINITE in text else text[-1500:]  # torch's threads may abort once all is done

    with ThreadPoolExecutor(min(len(groups), os.cpu_count() or 1)) as pool:
        problems = [problem for problem in pool.map(run_group, range(len(groups))) if problem]
    return "\n".join(sorted(problems, key=measured, reverse=True)) or "passed"


def run(ledger: Ledger, machine: Machine) -> None:
    """Enter each tool's count, and ``failed``: how many of them, or of the plain run, found something."""
    script = [sys.executable, str(Path(__file__).with_name("gpu.py")), *["--rehearse"] * machine.rehearsal]
    script.append("--sanitize-shapes")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ENVIRONMENT
    if machine.rehearsal:
        environment["TRITON_INTERPRET"] = "1"
    problem = why_not_cuda(machine.device)
    if machine.device.type == "cuda" and problem:
        ledger.put("kernels in CUDA", NOT_MEASURED + problem)
    plain = run_plainly(script, environment, ledger, machine)
    ledger.put("plain run", plain)
    ledger.put("failed", int(measured(plain) and plain != "passed"))
    sanitizer = find_sanitizer()
    if sanitizer is None or plain != "passed":
        reason = "compute-sanitizer not found" if sanitizer is None else "the plain run did not pass"
        for tool in TOOLS:
            ledger.put(tool, NOT_MEASURED + reason)
        return

    def run_one(tool: str) -> dict[str, object] | str:
        command, log = [sanitizer, "--tool", tool, *script], ledger.path.with_suffix(f".{tool}.log")
        return run_tool(command, ledger.left() - 2, log, environment)

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        for tool, result in zip(TOOLS, pool.map(run_one, TOOLS), strict=True):
            ledger.put(tool, result)
            bad = isinstance(result, dict) and bool(result["errors"] or result["exit_code"])
            ledger.put("failed", int(ledger.entries["failed"]) + bad)


def main(runs: Sequence[str], rehearsal: bool) -> int:
    """What the tools watch: the small shapes on the GPU, or interpreted on the CPU; all where ``runs`` is empty."""
    device = torch.device("cpu" if rehearsal else "cuda")
    print(f"{run_small_shapes(runs or small_runs(device), device)} {ALL_FINITE}", flush=True)
    return 0
