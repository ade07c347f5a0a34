"""Runs the command line: `python -m fastdp`."""

import sys

from fastdp.cli import main

if __name__ == "__main__":
    sys.exit(main())
