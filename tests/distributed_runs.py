"""One process of several that train; started by torchrun from ``test_train_distributed``.

Arguments: cache, folder of the runs, JSON of the jobs: name of the run's folder, settings, and after how many updates
rank 1 asks to stop, or 0. They are done one after the other, since starting processes takes longer than training.
"""

import json
import sys
from pathlib import Path

import torch
from train_runs import config, model

from sdr.clip_cache import ClipCache
from sdr.engine import processes
from sdr.errors import SDRError
from sdr.train import train


def main(cache: str, folder: str, jobs: str) -> None:
    torch.set_num_threads(1)
    data, validation = ClipCache(cache, split="train"), ClipCache(cache, split="val")
    for name, fields, stop_after in json.loads(jobs):
        asked = iter(range(1, 10**6))
        stop = lambda asked=asked, last=stop_after: processes().rank == 1 and next(asked) == last  # noqa: E731
        settings = config(model=model(dropout=0.0), ema=0.5, **fields)
        try:
            said = (
                "finished" if train(settings, data, validation, Path(folder) / name, stop=stop).finished else "stopped"
            )
        except SDRError as error:
            said = f"refused: {error}"
        if processes().rank == 0:
            print(f"{name} {said}", flush=True)
        torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
