"""``python -m sdr``: the command line, for torchrun."""

import os
import sys

from sdr.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # everything is written; gloo's threads can outlive their group and abort Python's own end, after FSDP
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
