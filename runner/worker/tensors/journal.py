"""What of a merge is finished: a small file beside the partial folder, from which a killed run is taken up again.

It is replaced as a whole, so a kill leaves the old one or the new one. Nothing is forced to the disk: after a power
failure, a shard (or the journal) that did not get there is found by its digest and made again.
No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.protocol.digests import FileDigest
from runner.protocol.syntax import parse_json
from runner.protocol.wire import from_data, to_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Finished shards of one merge.

    Attributes:
        fingerprint: what decides the bytes, part by part: name → digest or version.
        files: the shards that have their final names, in the order in which they were finished.
    """

    fingerprint: Mapping[str, str]
    files: tuple[FileDigest, ...]

    def write(self, path: Path) -> None:
        """Replace the file at `path`, whole or not at all."""
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps(to_data(self)), encoding="utf-8")
        beside.replace(path)


def read_journal(path: Path) -> Journal | None:
    """Return the journal at `path`; None where there is none, or none that can be read."""
    try:
        return from_data(Journal, parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
