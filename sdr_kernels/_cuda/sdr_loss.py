"""All of SDR's losses and gradients: launcher of ``csrc/sdr_loss.cu``.

One launch for float32 logits and int64 labels; others are converted first, by a launch each.
"""

from torch import Tensor

from sdr_kernels._cuda.loader import launch
from sdr_kernels.sdr_loss import empty_results

COLUMNS, STAGES, STAGE_ROW_BYTES, THREADS = 32, 4, 144, 256  # as in csrc/sdr_loss.cu


def shared_bytes(rows: int) -> int:
    """Of a block: stages of features, in whose place come all products, columns, an integer and six floats a row."""
    return rows * (max(STAGES * STAGE_ROW_BYTES, 4 * (rows + 4)) + 4 * COLUMNS + 8 + 6 * 4)


def sdr_loss_fwd(
    features: Tensor, labels: Tensor, logits: Tensor, joint_logits: Tensor, loo_logits: Tensor,
    temperature: float, mi_temperature: float, real_anchors: bool, detach_joint: bool, reverse: bool,
    complementary: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, V, D = features.shape
    _, W, K = loo_logits.shape
    rows = 64 if B * V <= 64 else 128
    out = empty_results(features, joint_logits, loo_logits)
    launch(
        f"sdr_loss_{str(features.dtype).removeprefix('torch.')}_rows{rows}", features,
        (-(-D // COLUMNS) + 1,), (THREADS,),
        [
            features.contiguous(), labels.long().contiguous(),
            *(x.float().contiguous() for x in (logits, joint_logits, loo_logits)), *out,
            B, V, D, W, K, temperature, mi_temperature,
            *map(int, (real_anchors, detach_joint, reverse, complementary)),
        ],
        shared_bytes(rows),
    )  # fmt: skip
    return out
