"""The documents of a published release, and what they say of its files: what of it was written for the release.

They exist once a merge has passed and was published, so that a folder that is judged before has none of them. A
release names its files twice: `merge-manifest.json` with size and sha256 (the archived adapter's apart), and
`checksums.txt`, where the pictures are, too. The card, `README.md`, may be edited later by anybody. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runner.judge.sidecars.listing import MAX_JSON_BYTES, Listing, json_of, same_bytes, sha256_of, shown
from runner.judge.sidecars.names import is_weights

CARD = "README.md"
MANIFEST = "merge-manifest.json"
CHECKSUMS = "checksums.txt"
SIGNATURE = "model.sig"
REPORT_FOLDER = "merge-report/"
ARCHIVE_FOLDER = "adapter/"
_LINE = re.compile(r"(?P<escaped>\\?)(?P<sha256>[0-9a-f]{64})  (?P<path>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a release's own documents list; all empty where it has none.

    Attributes:
        files: path → (size, sha256) of what was in the merged folder.
        archive: the same, of the adapter's own files.
        checksums: path → sha256.
        is_signed: whether the release says that it is signed.
    """

    files: Mapping[str, tuple[int, str]]
    archive: Mapping[str, tuple[int, str]]
    checksums: Mapping[str, str]
    is_signed: bool

    def allows(self, path: str) -> bool:
        """Return whether the path is one that we write beside the merged files."""
        if path in (CARD, MANIFEST) or (path == SIGNATURE and self.is_signed):
            return True
        if path == CHECKSUMS:
            return bool(self.files)
        return path in self.archive or (path.startswith(REPORT_FOLDER) and path in self.checksums)


def is_document(path: str) -> bool:
    """Return whether the path is one that each release writes anew."""
    return path in (CARD, MANIFEST, CHECKSUMS, SIGNATURE) or path.startswith((REPORT_FOLDER, ARCHIVE_FOLDER))


def read_manifest(merged: Listing, base: Listing) -> Manifest:
    """Return what the folder's documents list; those that are the base's own speak of the base."""
    content = None if same_bytes(MANIFEST, merged, base) else json_of(MANIFEST, merged)
    content = content if isinstance(content, dict) else {}
    return Manifest(
        files=_listed(content.get("files")),
        archive={path: said for path, said in _listed(content.get("archive")).items() if path.startswith("adapter/")},
        checksums=_checksums(merged) if content else {},
        is_signed=bool(content.get("signed_by")),
    )


def contradictions(manifest: Manifest, merged: Listing) -> Iterator[tuple[str, str, bool]]:
    """Yield (path, how it is not what the release's documents list, whether the model is whole without it).

    Weights are compared by size alone: what they hold is judged, and reading them again would take as long.
    """
    for path, (size, sha256) in (*manifest.files.items(), *manifest.archive.items()):
        if path not in merged:
            yield path, f"{shown(path)}, which {MANIFEST} lists, is missing", path in manifest.archive
        elif merged.sizes[path] != size or (not is_weights(path) and sha256_of(merged.names(path)) != sha256):
            yield path, f"{shown(path)} is not what {MANIFEST} lists", False
    for path, sha256 in manifest.checksums.items():
        if path in merged and _is_listed_once(path) and sha256_of(merged.names(path)) != sha256:
            yield path, f"{shown(path)} is not what {CHECKSUMS} lists", False
        elif path not in merged and path.startswith(REPORT_FOLDER):
            yield path, f"{shown(path)}, a picture that {CHECKSUMS} lists, is missing", True
    if manifest.files and CHECKSUMS not in merged:
        yield CHECKSUMS, f"{CHECKSUMS} of the release is missing", False
    if manifest.is_signed and SIGNATURE not in merged:
        yield SIGNATURE, f"{SIGNATURE}, the signature that {MANIFEST} tells of, is missing", True


def _is_listed_once(path: str) -> bool:
    """Return whether a document's digest is in the checksums alone; the card may be edited."""
    return path == MANIFEST or path.startswith(REPORT_FOLDER)


def _listed(entries: object) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"path": str(path), "size_bytes": int(size), "sha256": str(sha256)}:
                found[path] = (size, sha256)
    return found


def _checksums(merged: Listing) -> dict[str, str]:
    if not 0 < merged.sizes.get(CHECKSUMS, 0) <= MAX_JSON_BYTES:
        return {}
    text = merged.names(CHECKSUMS).read_text("utf-8", "surrogateescape")
    lines = [line for line in map(_LINE.fullmatch, text.splitlines()) if line and not line["escaped"]]
    return {line["path"]: line["sha256"] for line in lines}
