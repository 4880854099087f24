"""``python -m sdr``: the command line, for torchrun."""

import sys

from sdr.cli import main

if __name__ == "__main__":
    sys.exit(main())
