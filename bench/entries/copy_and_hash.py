"""The least that any merge must do, in Python: copy the files, then sha256 the copies. No merge."""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

BUFFER_BYTES = 4 << 20

if __name__ == "__main__":
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    started = time.monotonic()
    out.mkdir()
    for path in sorted(base.iterdir()):
        with path.open("rb") as source, (out / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, BUFFER_BYTES)
    for path in sorted(out.iterdir()):
        with path.open("rb") as written:
            hashlib.file_digest(written, "sha256")
    print(json.dumps({"after_imports_s": time.monotonic() - started}))
