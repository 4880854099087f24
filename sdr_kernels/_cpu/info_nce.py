"""InfoNCE on a CPU: tiles of the upper half of the similarity matrix, each for its rows and for its columns.

In float64: at low temperatures the exponents of float32 similarities are wrong in the fifth digit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sdr_kernels.info_nce import ZERO_NORM, normalise

TILE = 1024  # rows and columns


def _tiles(N: int) -> Iterator[tuple[slice, slice]]:
    """Of the diagonal and above."""
    starts = range(0, N, TILE)
    for i in starts:
        for j in starts[i // TILE :]:
            yield slice(i, i + TILE), slice(j, j + TILE)


class _RunningRows:
    """Of every row so far: largest similarity; sums of exponentials and of positives, less it; number of positives."""

    def __init__(self, unit: Tensor) -> None:
        self.largest, self.total, self.positive, self.count = unit.new_zeros(4, len(unit)).unbind()
        self.largest.fill_(-torch.inf)

    def add(self, rows: slice, logits: Tensor, same: Tensor) -> None:
        """logits: [M, N] of these rows, -inf where a row meets itself; same: where it meets a positive."""
        # not -inf, of which a difference would be NaN and not 0's logarithm
        highest = torch.maximum(self.largest[rows], logits.amax(1)).clamp(min=torch.finfo(logits.dtype).min)
        shift, logits = self.largest[rows] - highest, logits - highest[:, None]
        self.positive[rows] += torch.where(self.count[rows] > 0, shift * self.count[rows], 0)
        self.positive[rows] += logits.where(same, 0).sum(1)
        self.count[rows] += same.sum(1)
        self.total[rows] *= shift.exp_()
        self.total[rows] += logits.exp_().sum(1)
        self.largest[rows] = highest


def _logits(unit: Tensor, rows: slice, columns: slice, temperature: float) -> Tensor:
    return (unit[rows] @ unit[columns].T).div_(temperature)


def info_nce_fwd(features: Tensor, labels: Tensor, temperature: float, real_anchors: bool) -> tuple[Tensor, Tensor]:
    """The loss; and of every row 1 / norm, largest similarity, weight over sum, weight of each of its positives."""
    unit = normalise(features.double())
    running = _RunningRows(unit)
    for rows, columns in _tiles(len(unit)):
        logits = _logits(unit, rows, columns, temperature)
        same = labels[rows, None] == labels[None, columns]
        if rows == columns:
            logits.fill_diagonal_(-torch.inf)
            same.fill_diagonal_(False)
        else:
            running.add(columns, logits.T, same.T)
        running.add(rows, logits, same)
    is_anchor = labels == 0 if real_anchors else torch.ones_like(labels, dtype=torch.bool)
    anchor = is_anchor & (running.count > 0)
    weight = anchor.to(unit.dtype) / is_anchor.sum().clamp(min=1)
    each = weight / running.count.clamp(min=1)
    loss = (running.total.log() * weight - running.positive * each).where(anchor, 0).sum()
    norm = torch.linalg.vector_norm(features.double(), dim=1)
    inverse = torch.where(norm < ZERO_NORM, 0, 1 / norm)
    rows = torch.stack([inverse, running.largest, torch.where(anchor, weight / running.total, 0), each])
    return loss.to(torch.promote_types(features.dtype, torch.float32)), rows


def info_nce_bwd(features: Tensor, labels: Tensor, rows: Tensor, dloss: Tensor, temperature: float) -> Tensor:
    """The gradient of features, in their dtype."""
    unit = normalise(features.double())
    inverse, largest, weight, each = rows
    dunit = torch.zeros_like(unit)
    for i, j in _tiles(len(unit)):
        logits = _logits(unit, i, j, temperature)
        # what row i asks of the pair and what row j asks of it
        pull = (logits - largest[i, None]).exp_().mul_(weight[i, None])
        pull += logits.sub_(largest[j]).exp_().mul_(weight[j])
        pull -= (each[i, None] + each[j]).where(labels[i, None] == labels[None, j], 0)
        if i == j:
            pull.fill_diagonal_(0)
        else:
            dunit[j].addmm_(pull.T, unit[i])
        dunit[i].addmm_(pull, unit[j])
    along = (dunit * unit).sum(1, keepdim=True)
    return ((dunit - unit * along) * (inverse * (dloss / temperature))[:, None]).to(features.dtype)
