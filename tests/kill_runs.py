"""Trains in child processes that are killed, until one comes to its end; run as a script by ``test_train_killed``.

Arguments: cache, folder of the run, signal, number of kills; SDR_SEED draws their moments. The children are forks, so
that PyTorch is imported once. Prints how each one ended: ``-9`` for SIGKILL, or its exit code.
"""

import os
import signal
import sys
import time
from pathlib import Path

import draws
import torch
from train_runs import config

from sdr.clip_cache import ClipCache
from sdr.stopping import EXIT_CODES, stopping
from sdr.train import train

CONFIG = config(epochs=10, ema=0.5, log_every=3)  # 30 updates


def child(cache: str, out: Path) -> int:
    torch.set_num_threads(1)
    data, validation = ClipCache(cache, split="train"), ClipCache(cache, split="val")
    with stopping() as stop:
        result = train(CONFIG, data, validation, out, stop=stop)
    return 0 if result.finished else EXIT_CODES[stop.signal]


def main(cache: str, out: str, name: str, kills: str) -> None:
    rng, number = draws.draw(f"train {name}", 0), getattr(signal, name)
    left = int(kills)
    while True:
        pid = os.fork()
        if pid == 0:
            os._exit(child(cache, Path(out)))
        if left:
            time.sleep(float(rng.uniform(0.05, 1.2)))
            os.kill(pid, number)
            left -= 1
        began = time.monotonic()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(code, round(time.monotonic() - began, 1), flush=True)
        if code == 0 and not left:
            return
        if code not in (0, -number, EXIT_CODES.get(number)):
            sys.exit("a run failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
