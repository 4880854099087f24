"""SDR: video-level deepfake detection with reduced spatial dependency (arXiv 2503.03270)."""

from sdr.config import FTCNConfig, LossConfig, SDRConfig, TPAConfig, ftcn_released, paper, tiny
from sdr.errors import SDRError
from sdr.ftcn import FTCN
from sdr.losses import SDRLoss
from sdr.model import SDRModel
from sdr.score import score_video

__all__ = [
    "FTCN",
    "FTCNConfig",
    "LossConfig",
    "SDRConfig",
    "SDRError",
    "SDRLoss",
    "SDRModel",
    "TPAConfig",
    "ftcn_released",
    "paper",
    "score_video",
    "tiny",
]
__version__ = "0.1.0"
