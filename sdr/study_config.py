"""The studies on synthetic videos: how large they are, which models they compare, and what each model learns."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from sdr.config import TPA_METHODS, TPAConfig, check, check_count, paper, tiny
from sdr.datasets import SYNTH_METHODS
from sdr.loading import LoaderConfig
from sdr.shortcut import Cue
from sdr.train_config import TrainConfig, to_json

FORMAT = 1  # part of a study's settings: raise it when the same study gives other figures
FULL = "SDR"  # what the other models are compared with
MODELS = {  # of each study
    "heldout": ("FTCN", FULL, "SDR without TPA", "SDR without TRFI", "SDR without contrastive"),
    "shortcut": ("FTCN", FULL, "SDR without TPA", "SDR without TRFI", "plain 3D ResNet"),
}
UNSEEN, SEEN = "unseen type", "seen types"  # what a model of the first study is tested on


@dataclass(frozen=True)
class StudyConfig:
    """How large a study is.

    Args:
        train: of SDR; the other models are made from it.
        seeds: runs of each model, which differ in initialisation, order, augmentation and dropout, not in their data.
        identities: people in the synthetic videos.
        video_frames: of each video.
        video_size: width and height of each video in pixels.
        stride: frames from the start of one clip to the next.
        data_seed: of the synthetic videos.
        cue: of the shortcut.
    """

    train: TrainConfig
    seeds: int = 5
    identities: int = 64
    video_frames: int = 40
    video_size: int = 160
    stride: int = 12
    data_seed: int = 0
    cue: Cue = field(default_factory=Cue)

    def __post_init__(self) -> None:
        for name in ("seeds", "identities", "video_frames", "video_size", "stride"):
            check_count(name, getattr(self, name))
        check(self.seeds >= 2, "seeds", "be at least 2, or there is no interval", self.seeds)
        check(self.train.architecture == "sdr", "train.architecture", "be sdr", self.train.architecture)


def smallest() -> StudyConfig:
    """The smallest scale at which FTCN and SDR learn the types that they see: minutes on two cores."""
    model = replace(tiny(), num_frames=16, image_size=32, embed_dim=32, head_dim=8, mlp_dim=64)
    train = TrainConfig(model=model, epochs=8, lr=3e-3, checkpoint_every=40, loader=LoaderConfig(readers=1))
    return StudyConfig(validated_once(train))


def large() -> StudyConfig:
    """The paper's model on clips of its size, for a GPU."""
    train = TrainConfig(model=paper(), epochs=20, precision="bf16", accumulate=4, recompute=True, checkpoint_every=100)
    return StudyConfig(validated_once(train), video_frames=96, video_size=320, stride=32)


def validated_once(config: TrainConfig) -> TrainConfig:
    """Validated after the last update alone, so that the weights which are tested are the last ones of every model."""
    return replace(config, validate_every=config.epochs)


SCALES: Mapping[str, Callable[[], StudyConfig]] = {"smallest": smallest, "large": large}


class Run(NamedTuple):
    """One model to train; ``held_out`` is the forgery type that it never sees, "" where it sees all."""

    model: str
    seed: int
    held_out: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(re.sub(r"\W", "_", part) for part in (self.held_out or "all", self.model, str(self.seed)))

    @property
    def learned(self) -> tuple[str, ...]:
        """The types that it sees."""
        return tuple(method for method in SYNTH_METHODS if method != self.held_out)


def plan(study: str, config: StudyConfig) -> list[Run]:
    """The runs of a study, seed by seed."""
    held_out = SYNTH_METHODS if study == "heldout" else ("",)
    seeds = range(config.train.seed, config.train.seed + config.seeds)
    return [Run(model, seed, method) for seed in seeds for method in held_out for model in MODELS[study]]


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """Every model of the studies, made from SDR's configuration."""
    ftcn = replace(config, architecture="ftcn", implementation="reference", tpa=TPAConfig(methods=("none",)))
    mean, loss = replace(config.model, joint_feature="mean"), config.loss
    return {
        "FTCN": ftcn,
        FULL: config,
        "SDR without TPA": replace(config, tpa=replace(config.tpa, per_frame=frozenset(TPA_METHODS))),
        "SDR without TRFI": replace(config, model=mean, loss=replace(loss, mi=0.0, aux=0.0)),
        "SDR without contrastive": replace(config, loss=replace(loss, contrastive=0.0)),
        "plain 3D ResNet": replace(ftcn, model=replace(config.model, spatial_kernel=3)),
    }


def study_settings(study: str, config: StudyConfig) -> dict:
    """All that a study's figures depend on, as values of JSON."""
    return {"format": FORMAT, "study": study, **asdict(config), "train": to_json(config.train)}
