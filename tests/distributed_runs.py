"""One process of several that train; started by torchrun from ``test_train_distributed``.

Arguments: cache, folder of the runs, JSON of the jobs: name of the run's folder, settings, how often rank 1 is asked
before it wishes to stop, or 0, and the update in which rank 1's clips are not finite, or 0. They are done one after the
other, since starting processes takes longer than training. No update may meet a barrier, which would wait for a GPU.
"""

import json
import os
import sys
from pathlib import Path

import torch
from train_runs import config, model

from sdr.clip_cache import ClipCache
from sdr.config import GroupedConfig
from sdr.engine import processes
from sdr.errors import SDRError
from sdr.terminal import leave_processes
from sdr.train import train
from sdr.trainer import Trainer


def main(cache: str, folder: str, jobs: str) -> None:
    torch.set_num_threads(1)
    data, validation = ClipCache(cache, split="train"), ClipCache(cache, split="val")
    step, barrier = Trainer.step, torch.distributed.barrier

    def guarded(self, batches, *, epoch):
        count = next(updates)
        if count == guarded.bad_update and processes().rank == 1:
            batches = [batch._replace(views=batch.views * float("nan")) for batch in batches]
        torch.distributed.barrier = None
        try:
            return step(self, batches, epoch=epoch)
        finally:
            torch.distributed.barrier = barrier

    Trainer.step = guarded
    for name, fields, stop_after, bad_update in json.loads(jobs):
        updates, guarded.bad_update = iter(range(1, 10**6)), bad_update
        asked = iter(range(1, 10**6))
        stop = lambda asked=asked, last=stop_after: processes().rank == 1 and next(asked) == last  # noqa: E731
        if "grouped" in fields:
            fields["grouped"] = GroupedConfig(**fields["grouped"])
        settings = config(model=model(dropout=0.0), ema=0.5, **fields)
        try:
            said = (
                "finished" if train(settings, data, validation, Path(folder) / name, stop=stop).finished else "stopped"
            )
        except SDRError as error:
            said = f"refused: {error}"
        os.write(1, f"{processes().rank} {name} {said}\n".encode())  # at once: the processes share the pipe
        torch.distributed.barrier()
    leave_processes()
    os._exit(0)  # gloo's threads can outlive the group and abort Python's own end, now and then, after FSDP


if __name__ == "__main__":
    main(*sys.argv[1:])
