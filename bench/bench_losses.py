"""Losses of others beside ours: InfoNCE of many rows, its memory, and the leave-one-out KL.

bench_ops has our ops against the reference; here the same inputs go to what else computes them.
"""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from answers import optional
from cases import LOSS_ROWS, differentiated
from ledger import NOT_MEASURED
from losses import NO_LIGER_INFO_NCE, batch, liger_kl, metric_learning, rows
from timing import Moved, Row, time_op

from sdr_kernels import info_nce, leave_one_out_kl
from sdr_kernels.info_nce import info_nce_reference
from sdr_kernels.leave_one_out_kl import leave_one_out_kl_reference

KIND = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if KIND == "cuda" else "cpu"
DTYPE = torch.bfloat16 if KIND == "cuda" else torch.float32
ROWS, WIDTH = 16_384, 128  # whose memory is measured
LIMIT_BYTES = 1 << 30  # of the tiled implementation with torch itself; the matrix alone has as much
INFO_NCE = {
    "ours": lambda: partial(info_nce, impl=OURS),
    "pytorch-metric-learning": metric_learning,
    "torch.compile": lambda: torch.compile(info_nce_reference),
}
KL = {
    "ours": lambda: partial(leave_one_out_kl, impl="triton" if KIND == "cuda" else "reference"),
    "Liger": liger_kl,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # peers'
@pytest.mark.parametrize("peer", [*INFO_NCE, "Liger"])
def bench_info_nce(benchmark, peer, device, small):
    if peer == "Liger":
        pytest.skip(NOT_MEASURED + NO_LIGER_INFO_NCE)
    if peer == "torch.compile" and small:
        pytest.skip(f"{NOT_MEASURED}compiling takes longer than a check may")
    N, D = (40, 16) if small else (LOSS_ROWS[KIND], WIDTH)
    inputs = *rows(N, D, DTYPE, device), torch.ones((), device=device)
    work = [Moved(2 * N * N * D, N * D * DTYPE.itemsize), Moved(4 * N * N * D, 2 * N * D * DTYPE.itemsize)]
    impl = OURS if peer == "ours" else peer
    row = Row(f"InfoNCE of {N} x {D} with gradient", "info_nce", impl, work)
    time_loss(benchmark, peer, INFO_NCE[peer], info_nce_reference, inputs, row)


@pytest.mark.parametrize("peer", KL)
def bench_kl(benchmark, peer, device, small):
    joint, loo = batch(16 if small else 1024, DTYPE, device)[3:]
    joint = joint.detach()  # which Liger's has no gradient for; ours has none either unless it is asked for
    if peer == "Liger" and KIND == "cpu":
        pytest.skip(f"{NOT_MEASURED}Liger's kernels need a GPU")
    impl = KL[peer]().keywords["impl"] if peer == "ours" else peer
    row = Row("leave-one-out KL of 16 x 4 with gradient", "leave_one_out_kl", impl)
    inputs = joint, loo, torch.ones((), device=device)
    time_loss(benchmark, peer, KL[peer], leave_one_out_kl_reference, inputs, row)


def time_loss(benchmark, peer: str, build, reference, inputs: tuple, row: Row) -> None:
    """A loss and its gradient against the definition; a peer that is missing or wrong is not measured."""
    if peer == "ours":
        time_op(benchmark, differentiated(build()), differentiated(reference), inputs, row)
        return
    with optional(peer):
        time_op(benchmark, differentiated(build()), differentiated(reference), inputs, row)


# a process of its own, whose peak memory is this call's; getrusage's would begin with that of the process before it
CALL = """
import json, time
import torch
from sdr_kernels import info_nce
torch.set_num_threads(2)
features, labels = torch.randn({rows}, {width}, requires_grad=True), torch.arange({rows}) % 2
info_nce(features[:8], labels[:8], impl="{impl}").backward()
start = time.perf_counter()
loss = info_nce(features, labels, impl="{impl}")
loss.backward()
peak = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(dict(seconds=time.perf_counter() - start, peak_bytes=peak, loss=loss.item())))
"""


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def bench_info_nce_memory(benchmark, impl):
    """Seconds and memory of many rows on a CPU, by tiles and with the whole matrix."""
    count = 64 if benchmark.disabled and impl == "reference" else ROWS  # ours takes seconds: CI holds it to the limit
    code = CALL.format(rows=count, width=WIDTH, impl=impl)

    def call() -> dict[str, float]:
        return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    result = benchmark.pedantic(call, rounds=1)
    seconds = result.pop("seconds")
    benchmark.extra_info.update(
        result,
        subject=f"InfoNCE of {count} x {WIDTH} with gradient, a process",
        op="info_nce",
        impl=impl,
        shapes=[[count, WIDTH], [count]],
        dtype="float32",
        device="cpu",
        threads=2,
        cold_median_s=seconds,
    )
    assert impl != "cpu" or result["peak_bytes"] <= LIMIT_BYTES
