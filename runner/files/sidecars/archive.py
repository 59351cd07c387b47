"""The adapter in the release: its own files under `adapter/`, since a merge cannot be undone.

Several adapters lie in `adapter/1/`, `adapter/2/` … in the order of the inputs. Loaders look for an adapter only beside
the model, so none of them is applied to the merged weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.files.sidecars.names import is_template, is_tokenizer
from runner.protocol.digests import FileDigest, digest_file

FOLDER = "adapter/"
_TEXTS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Archived:
    """One file of an adapter in a release.

    Attributes:
        source: on this machine.
        file: its path in the release, size and sha256.
    """

    source: Path
    file: FileDigest


def archive(roots: Sequence[Path]) -> tuple[Archived, ...]:
    """Return the files of the adapters that go into a release: weights, config, tokenizer, card and licence."""
    found = []
    for number, root in enumerate(roots, start=1):
        prefix = FOLDER if len(roots) == 1 else f"{FOLDER}{number}/"
        for path in sorted(path.name for path in root.iterdir() if path.is_file() and _is_kept(path.name)):
            digest = digest_file(root, path)
            file = FileDigest(path=prefix + path, size_bytes=digest.size_bytes, sha256=digest.sha256)
            found.append(Archived(source=root / path, file=file))
    return tuple(found)


def _is_kept(name: str) -> bool:
    is_adapter = name == "adapter_config.json" or (name.startswith("adapter") and name.endswith(".safetensors"))
    return is_adapter or is_tokenizer(name) or is_template(name) or name in _TEXTS
