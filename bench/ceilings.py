"""Step "ceilings": what the floors of later steps are computed from."""

import torch
from ledger import Ledger
from machine import Machine

from sdr.timing import measure_ceilings

SHRINK = 64  # in the rehearsal


def run(ledger: Ledger, machine: Machine) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    shrink = machine.scaled(1, SHRINK)
    ledger.attempt("ceilings", lambda: measure_ceilings(machine.device, dtypes, shrink=shrink)._asdict())
