"""InfoNCE of many rows on a CPU: seconds and memory of the tiled implementation and of the whole matrix."""

import json
import subprocess
import sys

import pytest

ROWS, WIDTH = 16_384, 128
LIMIT_BYTES = 1 << 30  # of the tiled implementation with torch itself; the matrix alone has as much

# a process of its own, whose peak memory is this call's
CALL = """
import json, resource, time
import torch
from sdr_kernels import info_nce
torch.set_num_threads(2)
features, labels = torch.randn({rows}, {width}, requires_grad=True), torch.arange({rows}) % 2
info_nce(features[:8], labels[:8], impl="{impl}").backward()
start = time.perf_counter()
loss = info_nce(features, labels, impl="{impl}")
loss.backward()
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(dict(seconds=time.perf_counter() - start, peak_bytes=peak, loss=loss.item())))
"""


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def bench_info_nce(benchmark, impl):
    rows = 64 if benchmark.disabled and impl == "reference" else ROWS  # ours takes seconds: CI holds it to the limit
    code = CALL.format(rows=rows, width=WIDTH, impl=impl)

    def call() -> dict[str, float]:
        return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    result = benchmark.pedantic(call, rounds=1)
    benchmark.extra_info.update(result, rows=rows, width=WIDTH, threads=2)
    assert impl != "cpu" or result["peak_bytes"] <= LIMIT_BYTES
