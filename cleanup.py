#!/usr/bin/env python3
"""Process 1 of the action's post step: removes what a step that was killed has left."""

import os
import sys

from runner.supervisor.cleanup import main

if __name__ == "__main__":
    sys.exit(main(os.environ))
