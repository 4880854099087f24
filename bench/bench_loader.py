"""The whole loader on a CPU, from shards on disk to batches of views: clips per second by augmentation."""

from contextlib import closing

import pytest
import torch
from clips import NoiseClips

from sdr import TPAConfig
from sdr.loading import LoaderConfig, TrainingLoader

BATCH, VIEWS = 4, 4


@pytest.mark.parametrize("augmentation", ["reference", "dali"])
def bench_loader(benchmark, tmp_path, augmentation):
    frames, size = (2, 32) if benchmark.disabled else (32, 224)
    clips = NoiseClips(tmp_path, 16, (frames, size, size, 3))
    config = LoaderConfig(augmentation=augmentation, readers=1)
    loader = TrainingLoader(clips, config, TPAConfig(), batch_size=BATCH, num_views=VIEWS)
    with closing(iter(loader)) as batches:
        for _ in range(4):
            next(batches)  # until the batches made ahead no longer count
        benchmark.pedantic(lambda: next(batches), rounds=11)
    benchmark.extra_info.update(clip=list(clips.shape), batch=BATCH, views=VIEWS, threads=torch.get_num_threads())
    if not benchmark.disabled:
        benchmark.extra_info["clips_per_s"] = BATCH / benchmark.stats.stats.median
