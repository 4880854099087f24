"""The figures that the paper published, in percent, by experiment, row of its table and dataset.

Chu, Xu, Zhang, You, Zhou, "Reduced Spatial Dependency for More General Video-level Deepfake Detection", arXiv
2503.03270. Figure 2 is a plot whose values are not stated; of its points only V = 4 is known, the SDR of Table II.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """Video-level AUC and, where the paper has it, accuracy, in percent."""

    auc: float
    accuracy: float | None = None


MANIPULATIONS = ("Deepfakes", "FaceSwap", "Face2Face", "NeuralTextures")  # of FaceForensics++, in Table I's order
SOURCE = "Chu et al., arXiv 2503.03270"
AVERAGE = "average"
FTCN_PUBLISHED = "FTCN (published)"  # FTCN's own figures, which Tables I and II quote

PUBLISHED: Mapping[str, Mapping[tuple[str, str], Published]] = {
    "table1": {
        ("Deepfakes", "ffpp"): Published(99.7, 97.5),
        ("FaceSwap", "ffpp"): Published(99.7, 97.9),
        ("Face2Face", "ffpp"): Published(99.6, 98.6),
        ("NeuralTextures", "ffpp"): Published(99.4, 98.7),
        (AVERAGE, "ffpp"): Published(99.6, 98.2),
        (f"{FTCN_PUBLISHED}, {AVERAGE}", "ffpp"): Published(99.5),
    },
    "table2": {
        ("SDR", "celebdf"): Published(88.5),
        ("SDR", "dfdc"): Published(76.2),
        (FTCN_PUBLISHED, "celebdf"): Published(86.9),
        (FTCN_PUBLISHED, "dfdc"): Published(74.0),
    },
    "table3": {
        ("FTCN", "celebdf"): Published(86.4),
        ("FTCN", "dfdc"): Published(72.5),
        ("+ TRFI", "celebdf"): Published(87.9),
        ("+ TRFI", "dfdc"): Published(74.3),
        ("+ TPA", "celebdf"): Published(88.2),
        ("+ TPA", "dfdc"): Published(75.8),
        ("+ contrastive", "celebdf"): Published(88.5),
        ("+ contrastive", "dfdc"): Published(76.2),
    },
    "figure2": {
        ("V = 4", "celebdf"): Published(88.5),
        ("V = 4", "dfdc"): Published(76.2),
    },
}
