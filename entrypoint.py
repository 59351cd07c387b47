#!/usr/bin/env python3
"""Process 1 of the container, and the program of a checkout: `python entrypoint.py --help`."""

import os
import sys

from runner.supervisor.main import main

if __name__ == "__main__":
    sys.exit(main(os.environ, sys.argv[1:]))
