"""The experiments on small caches, with a training that only pretends."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from clip_caches import make_cache

from sdr import FTCN, SDRConfig, SDRModel
from sdr.checkpoint import WeightsInfo, load_model, save_weights
from sdr.clip_cache import ClipCache
from sdr.evaluate import Group
from sdr.protocol import plan
from sdr.reproduce import Line, Result, reproduce, tabulate
from sdr.train import TrainResult
from sdr.train_config import TrainConfig

PAPER = ("Deepfakes", "FaceSwap", "Face2Face", "NeuralTextures")
MODEL = SDRConfig(
    num_frames=8,
    image_size=16,
    width=2,
    backbone_stages=1,
    blocks=(1,),
    embed_dim=8,
    num_heads=1,
    head_dim=8,
    mlp_dim=8,
)
CONFIG = TrainConfig(model=MODEL, epochs=2, batch_size=4, lr=1e-3)
COUNTS = {"real": 2, "fake": 2}
DFDC = {"layout": "dfdc", "splits": ("test",), "seed": 2}


def make_caches(folder: Path, *, methods=PAPER, synthetic=False, splits=("train", "val", "test")) -> dict[str, Path]:
    """One small cache of each layout; the paper's four methods stand in another order than its own."""
    shared = COUNTS | {"synthetic": synthetic, "clips": 2}
    ffpp = make_cache(folder / "ff", methods=tuple(sorted(methods)), layout="ffpp", splits=splits, **shared)
    celeb = make_cache(folder / "celeb", layout="celebdf", splits=("train", "test"), seed=1, **shared)
    return {"ffpp": ffpp, "celebdf": celeb, "dfdc": make_cache(folder / "dfdc", **shared, **DFDC)}


FIGURES = {"total": 0.7, "clips_per_second": 3.0, "memory_gb": 0.0}


class Call(NamedTuple):
    config: TrainConfig
    data: ClipCache
    validation: ClipCache | None
    out: Path


class FakeTrain:
    """Keeps the contract of ``sdr.train.train`` with random weights; ``trained`` are the calls that made some."""

    def __init__(self, at_second: Callable[[], None] = lambda: None) -> None:
        self.trained: list[Call] = []
        self.at_second = at_second  # is done when a second model is to be trained

    def __call__(self, config, data, validation, out, *, origin, device, progress, stop) -> TrainResult:
        weights = Path(out) / "model.safetensors"
        assert device == torch.device("cpu")
        if not weights.exists():
            if len(self.trained) == 1:
                self.at_second()
            progress(1, 2, FIGURES)
            if stop():
                return TrainResult(weights, {}, finished=False)
            weights.parent.mkdir(parents=True, exist_ok=True)
            self.trained.append(Call(config, data, validation, Path(out)))
            torch.manual_seed(len(self.trained))
            model = FTCN(config.shape) if config.architecture == "ftcn" else SDRModel(config.shape)
            metrics = {"validation threshold": 0.25} if validation else {}
            save_weights(weights, model.eval(), WeightsInfo(origin, metrics=metrics))
        return TrainResult(weights, load_model(weights)[1].metrics, finished=True)


def group(auc: float, accuracy: float) -> Group:
    """Figures of 140 real and 140 fake videos, and an interval around each."""
    metrics = {"video AUC": auc, "video accuracy": accuracy, "video EER": 0.1, "video AP": 0.9}
    return Group("ffpp", "all", 140, 140, metrics, {name: (v - 0.01, v + 0.02) for name, v in metrics.items()})


def result_of(experiment: str, caches, groups: dict[tuple[str, str], Group], *, synthetic: bool = False) -> Result:
    """An experiment of which only these tests, by row and layout, have been run."""
    runs = {r.row: r for r in plan(experiment, CONFIG, caches)}
    ours = {key: (runs[key[0]], g) for key, g in groups.items()}
    return Result(experiment, CONFIG, tuple(runs.values()), tuple(tabulate(experiment, ours, synthetic)), synthetic)


def whole(experiment: str, caches, *, synthetic: bool = False) -> Result:
    """An experiment of which all has been run; every test has figures of its own."""
    keys = [(r.row, test.settings["layout"]) for r in plan(experiment, CONFIG, caches) for test in r.tests]
    groups = {key: group(0.5 + 0.02 * number, 0.6) for number, key in enumerate(keys)}
    return result_of(experiment, caches, groups, synthetic=synthetic)


def run(experiment: str, caches, out: Path, train: FakeTrain, config: TrainConfig = CONFIG, **options) -> Result:
    return reproduce(experiment, config, caches, out, train=train, device="cpu", **options)


def by_line(result: Result) -> dict[tuple[str, str], Line]:
    lines = {(line.row, line.dataset): line for line in result.lines}
    assert len(lines) == len(result.lines)
    return lines
