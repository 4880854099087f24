"""Video-level metrics: what the paper's tables report."""

from collections.abc import Sequence

import numpy as np

from sdr.errors import SDRError


def video_metrics(scores: Sequence[float], labels: Sequence[int], *, threshold: float = 0.5) -> dict[str, float]:
    """AUC, accuracy at ``threshold``, EER and AP of one score per video.

    Args:
        scores: higher means more likely fake.
        labels: 1 = fake, 0 = real.
        threshold: a score at or above it counts as fake.

    Returns:
        ``video AUC``, ``video accuracy``, ``video EER``, ``video AP``; an AUC counts a tie as one half.

    Raises:
        ValueError: different lengths, a label other than 0 and 1, or only one class, for which no AUC exists.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores and labels must be of one length, got {scores.shape} and {labels.shape}")
    if not np.isin(labels, (0, 1)).all() or len(np.unique(labels)) != 2:
        raise ValueError(f"labels must hold both 0 and 1 and nothing else, got {sorted(set(labels.tolist()))}")
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    except ImportError as error:
        raise SDRError("scikit-learn", "is not installed", "pip install 'sdr[train]'") from error
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {
        "video AUC": float(roc_auc_score(labels, scores)),
        "video accuracy": float(np.mean((scores >= threshold) == labels)),
        "video EER": equal_error_rate(fpr, tpr),
        "video AP": float(average_precision_score(labels, scores)),
    }


def equal_error_rate(fpr: np.ndarray, tpr: np.ndarray) -> float:
    """Where the ROC curve, taken as straight between its points, meets false positives = false negatives."""
    gap = fpr - (1 - tpr)  # rises from -1 to 1
    i = int(np.argmax(gap >= 0))
    if gap[i] == 0:
        return float(fpr[i])
    share = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(fpr[i - 1] + share * (fpr[i] - fpr[i - 1]))
