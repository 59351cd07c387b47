"""This project's merge: plan, merge, and the sha256 of every file, as the action's worker does it."""

import json
import sys
import time
from pathlib import Path

from runner.worker.libraries import leave, quick_imports

with quick_imports():
    from runner.worker.merge.job import merge
    from runner.worker.merge.prepare import prepare

if __name__ == "__main__":
    base, out, adapter = map(Path, sys.argv[1:4])
    started = time.monotonic()
    prepared = prepare(base, adapter, dtype="auto")
    planned = time.monotonic()
    merge(prepared, into=out)
    print(json.dumps({"after_imports_s": time.monotonic() - started, "plan_s": planned - started}))
    leave(0)
