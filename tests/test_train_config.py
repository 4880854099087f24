"""Settings of a run: checked, written and read back, and the schedule that they stand for."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sdr.config import GroupedConfig, LossConfig, SDRConfig, TPAConfig, ftcn_released, paper, tiny
from sdr.train_config import TRAIN_PRESETS, TrainConfig, flatten, learning_rate, to_json


def test_presets_train_the_model_of_their_name():
    models = {name: preset().model for name, preset in TRAIN_PRESETS.items()}
    assert models == {"paper": paper(), "ftcn_released": ftcn_released(), "tiny": tiny()}
    stated = TRAIN_PRESETS["paper"]()
    assert (stated.batch_size, stated.lr, stated.weight_decay, stated.epochs, stated.warmup) == (16, 1e-4, 0, 100, 10)
    assert (stated.precision, stated.loss) == ("bf16", LossConfig(ce=1, mi=1, contrastive=0.1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 3}, "batch_size must be a multiple of 2"),
        ({"batch_size": 12, "accumulate": 4}, "batch_size must be a multiple of 8"),
        ({"warmup_epochs": 101.0}, "warmup_epochs must lie in 0..epochs"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"seed": -1}, "seed must be"),
        ({"keep_last": 1}, "keep_last must be at least 2"),
        ({"validate_every": 0.0}, "validate_every must be positive"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"strategy": "zero"}, "strategy must be one of"),
        ({"compile": 1}, "compile must be true or false"),
        ({"architecture": "ftcn", "implementation": "fast"}, "implementation must be reference for ftcn"),
        ({"compile": True, "recompute": True}, "compile must be false with recompute"),
        ({"bn": "frozen"}, "bn must be batch or sync without init"),
        ({"bn": "none"}, "bn must be one of batch, sync, frozen"),
        ({"grouped": GroupedConfig(recompute=("res5",))}, "grouped.recompute must name the model's parts"),
        (
            {"compile": True, "implementation": "fast", "grouped": GroupedConfig(recompute=("res2",))},
            "compile must be false with recompute",
        ),
        ({"strategy": "fsdp", "precision": "fp16"}, "precision must be bf16 or fp32 for fsdp"),
    ],
    ids=str,
)
def test_rejects_wrong_settings(fields, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**fields)


def test_learning_rate_warms_up_then_follows_a_cosine():
    config = TrainConfig(lr=2.0, epochs=110, warmup_epochs=10.0)
    assert [learning_rate(config, e) for e in (0, 5, 10)] == [0, 1, 2]
    assert learning_rate(config, 60) == pytest.approx(1)
    assert learning_rate(config, 35) == pytest.approx(1 + np.cos(np.pi / 4))
    assert learning_rate(config, 110) == pytest.approx(0)
    assert replace(config, warmup_epochs=None).warmup == 11


def test_settings_are_json_and_flat():
    config = TrainConfig(tpa=TPAConfig(per_frame=frozenset({"flip", "crop"})))
    written = json.loads(json.dumps(to_json(config)))
    assert written == to_json(config)
    flat = flatten(written)
    assert flat["tpa.per_frame"] == ["crop", "flip"]
    assert (flat["model.num_branches"], flat["loss.mi"], flat["lr"]) == (4, 1.0, 1e-4)


def test_an_ftcn_reads_one_view_of_the_same_shapes():
    config = TrainConfig(architecture="ftcn", model=SDRConfig(num_branches=3, width=16))
    assert (config.num_views, config.shape) == (1, config.model.branch())
    assert TrainConfig(model=config.model).num_views == 3
