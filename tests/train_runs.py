"""Runs of a model so small that an update takes milliseconds, for the tests of training."""

from dataclasses import replace
from pathlib import Path

from sdr.config import SDRConfig, tiny
from sdr.train_config import TrainConfig


def model(**fields) -> SDRConfig:
    """tiny, for clips of ``clip_caches``: 8 frames of 16 pixels."""
    return replace(tiny(), **{"num_frames": 8, "image_size": 16, "width": 4, "embed_dim": 16} | fields)


def config(**fields) -> TrainConfig:
    """12 updates on 24 clips; several looks, checkpoints and validations."""
    defaults = {"model": model(), "epochs": 4, "batch_size": 8, "lr": 3e-3, "warmup_epochs": 0.0}
    return TrainConfig(**defaults | {"log_every": 5, "checkpoint_every": 2} | fields)


def results(out: Path) -> dict[str, bytes]:
    """Every byte of a run that a repetition must give again."""
    names = ("losses.csv", "validation.csv", "best.safetensors", "last.safetensors", "model.safetensors", "result.json")
    return {name: (out / name).read_bytes() for name in names}
