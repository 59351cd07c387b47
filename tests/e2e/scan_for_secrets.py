"""Run inside the image: print every file that holds, or by its name is, a secret."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

NAMES = re.compile(r"\.netrc|\.git-credentials|\.pypirc|id_(rsa|dsa|ecdsa|ed25519)|.*\.(key|p12|pfx)|\.env|\.npmrc")
TEXTS = re.compile(
    rb"\bhf_[A-Za-z]{34}\b|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|-----BEGIN (?:RSA |EC |OPENSSH |ENCRYPTED )?PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}"
    rb"|index-url\s*=\s*\S+://[^/\s:@]+:[^/\s:@]+@"
)
# A text that `TEXTS` finds holds one of these; looking for them is much faster than the expression.
PARTS = (b"hf_", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_", b"AKIA", b"PRIVATE KEY", b"index-url")
SKIPPED = ("/proc", "/sys", "/dev")
MAX_BYTES = 4 << 20  # a library is larger; a secret is not
# What packages bring along: keys of test servers, examples in documentation, texts that compiled code looks for.
KNOWN = re.compile(r"/(tests?|testing)/|/share/(doc|man)/|\.dist-info/|\.so(\.[0-9.]+)?$")


def main() -> int:
    """Walk the whole file system; the exit code is 1 where something was found."""
    found = 0
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if str(Path(folder, name)) not in SKIPPED]
        for path in (Path(folder, name) for name in files):
            if path.is_symlink() or not path.is_file() or KNOWN.search(str(path)):
                continue
            if reason := suspicion(path):
                sys.stdout.write(f"{path}: {reason}\n")
                found += 1
    return 1 if found else 0


def suspicion(path: Path) -> str | None:
    """Return why a file may be a secret, or None."""
    if NAMES.fullmatch(path.name):
        return "its name"
    if path.stat().st_size > MAX_BYTES:
        return None
    content = path.read_bytes()
    match = TEXTS.search(content) if any(part in content for part in PARTS) else None
    return repr(match[0][:12]) if match else None


if __name__ == "__main__":
    sys.exit(main())
