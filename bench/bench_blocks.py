"""One bottleneck of all branches: the kernels, and what else could run it, on the same rows.

Two branches on a CPU, four on a GPU; each peer's answer is checked against float64 as every row's is.
"""

import copy
from dataclasses import replace
from functools import partial

import peers
import pytest
import torch
from answers import matches, optional
from cases import Sizes, of_clips
from cudnn_peer import fused_blocks
from ledger import NOT_MEASURED
from timing import Row, time_op
from torch import Tensor

from sdr import SDRConfig
from sdr.layers import layers_of
from sdr.packing import pack_blocks
from sdr_kernels import bottleneck_chain

KIND = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "triton" if KIND == "cuda" else "cpu"
CLIPS = 16 if KIND == "cuda" else 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# how it is built, dtypes, channels innermost in memory
PEERS = {
    "reference": (peers.block_loop, ["fp32", "bf16"], False),
    "eager channels_last_3d": (peers.block_loop, ["fp32", "bf16"], True),
    "grouped conv3d": (peers.block_grouped, ["fp32", "bf16"], True),
    "torch.func.vmap": (peers.block_stacked, ["fp32"], True),
    "torch.compile": (peers.block_compiled, ["fp32", "bf16"], True),
    "cuDNN frontend": (fused_blocks, ["bf16"], True),
}
ROWS = {f"{peer} {dtype}": (peer, dtype) for peer, (_, dtypes, _) in PEERS.items() for dtype in dtypes}


def config_of(small: bool) -> SDRConfig:
    config = Sizes(KIND, small).config()
    return config if KIND == "cuda" else replace(config, num_branches=2)


def row_of(impl: str, baseline: str, config: SDRConfig, clips: int, dtype: torch.dtype) -> Row:
    work = [layer for layer in layers_of(config, clips, dtype.itemsize) if layer.name == peers.BLOCK]
    subject = of_clips(f"block {peers.BLOCK}", clips, config.num_branches)
    return Row(subject, "temporal_bottleneck", impl, work, clips, baseline)


@torch.no_grad()
def check_of(blocks: list, rows: list[Tensor]):
    """Against float64, as the modules err in their own dtype."""
    exact = [copy.deepcopy(block).double()(x.double()) for block, x in zip(blocks, rows, strict=True)]
    return matches(exact, peers.block_loop(blocks, rows)(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def bench_block(benchmark, dtype, device, small):
    config, dtype, clips = config_of(small), DTYPES[dtype], 1 if small else CLIPS
    blocks, rows = peers.block_inputs(config, clips, device, dtype, channels_last=False)
    packed = [pack_blocks(blocks, dtype, time_pool=False)]
    # the layout that each side's previous block leaves behind
    innermost = torch.stack(rows, 1).movedim(2, -1).contiguous().movedim(-1, 2)
    plain = peers.block_loop(blocks, rows)
    row = row_of(OURS, "reference", config, clips, dtype)
    time_op(
        benchmark,
        lambda x: list(bottleneck_chain(x, packed, impl=OURS).unbind(1)),
        None,
        (innermost,),
        row,
        check=check_of(blocks, rows),
        baseline=lambda _: plain(rows),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # compilers'
@pytest.mark.parametrize(("peer", "dtype"), ROWS.values(), ids=ROWS)
def bench_peer(benchmark, peer, dtype, device, small):
    build, _, channels_last = PEERS[peer]
    if small and peer == "torch.compile":
        build = partial(build, backend="eager")  # a check of the builder: inductor takes a minute
    config, dtype, clips = config_of(small), DTYPES[dtype], 1 if small else CLIPS
    if peer == "cuDNN frontend" and KIND == "cpu":
        pytest.skip(f"{NOT_MEASURED}cuDNN needs a GPU")
    blocks, rows = peers.block_inputs(config, clips, device, dtype, channels_last=channels_last)
    check = check_of(blocks, rows)
    with optional(peer), torch.no_grad():
        call = build(blocks, rows)
        time_op(benchmark, call, None, (rows,), row_of(peer, "", config, clips, dtype), check=check)
