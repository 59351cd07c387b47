"""What a release is, compared with what a repository holds. Pure but for the reading of small local files.

A repository's own files (pictures, notes, `.gitattributes`) stay; what a loader of models would pick up, and what an
earlier release brought, goes when the new release does not have it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files.sidecars.archive import Archived
from runner.files.sidecars.names import WEIGHT_SUFFIXES
from runner.protocol.digests import FileDigest, digest_of
from runner.protocol.errors import PublishError
from runner.supervisor.documents.provenance import CARD, MANIFEST, SIGNATURE, is_added_at_publish, released
from runner.supervisor.hub import RemoteFile, Tree

SERVER_OWNED = ".gitattributes"  # the Hub adds rules to it in the commit that needs them
_LOADED_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".model", ".jinja", ".py")
_LOADED_NAMES = frozenset({"vocab.txt", "merges.txt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """One file of a release, with where its bytes are.

    Attributes:
        file: its path in the repository, size and sha256.
        source: a local file, or the bytes themselves.
    """

    file: FileDigest
    source: Path | bytes

    def git_blob_id(self) -> str:
        """Return git's id of the content: sha1 over a header with the size, and the bytes.

        Raises:
            PublishError: the local file is not what it was when its sha256 was taken.
        """
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.file.sha256:
            raise changed(self.file.path)
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All files of a release by path, the digests that name it, and the fingerprint of the key that signed it."""

    by_path: Mapping[str, Content]
    input_digest: str
    merged_digest: str
    signed_by: str | None = None

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(content.file.size_bytes for content in self.by_path.values())

    def is_same(self, path: str, remote: RemoteFile | None) -> bool:
        """Return whether `remote` has the content of the release's `path`."""
        content = self.by_path[path]
        if remote is None or remote.size_bytes != content.file.size_bytes:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == content.file.sha256
        return remote.blob_sha1 == content.git_blob_id()

    def difference(self, tree: Tree, before: Tree, gone: Collection[str]) -> str | None:
        """Return how `tree` differs from this release put on top of `before` without the paths in `gone`, or None."""
        kept = {path: file for path, file in before.items() if path not in self.by_path and path not in gone}
        for path in self.by_path:
            if not self.is_same(path, tree.get(path)):
                return f"{path} is {'other content' if path in tree else 'missing'}"
        for path, file in tree.items():
            if path in self.by_path or path == SERVER_OWNED:
                continue
            if path not in kept:
                return f"{path} is there and should not be"
            if file.digest != kept[path].digest:
                return f"{path} was changed"
        lost = sorted(path for path in kept if path not in tree and path != SERVER_OWNED)
        return f"{lost[0]} is gone and should have stayed" if lost else None

    def is_adoptable(self, tree: Tree, manifest: Mapping[str, Any] | None) -> bool:
        """Return whether `tree` is this release from a run that did not come to its tag.

        All carried files are equal and nothing is stale. What is added at publish may differ: in measured numbers,
        which depend on the processor, and in a signature's random part. The manifest must name the same inputs and
        outputs and, where this release is signed, the same key.
        """
        if manifest is None or CARD not in tree or self.stale(tree, manifest):
            return False
        wanted = {"input_digest": self.input_digest, "merged_digest": self.merged_digest, "signed_by": self.signed_by}
        same = all(manifest.get(name) == value for name, value in wanted.items())
        return (
            same
            and (SIGNATURE in tree) == (SIGNATURE in self.by_path)
            and all(self.is_same(path, tree.get(path)) for path in self.by_path if not is_added_at_publish(path))
        )

    def stale(self, tree: Tree, manifest: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Return the files of `tree` that must go: a loader would read them, or an earlier release brought them."""
        earlier = listed(manifest)
        return tuple(
            sorted(
                path
                for path in tree
                if path not in self.by_path
                and path != SERVER_OWNED
                and (path in earlier or is_added_at_publish(path) or _is_loaded(path))
            )
        )


def gather(
    folder: Path,
    files: Iterable[FileDigest],
    *,
    documents: Mapping[str, bytes],
    input_digest: str,
    archived: Iterable[Archived] = (),
) -> Contents:
    """Return the release that consists of a merged folder, the documents that go with it, and archived adapters.

    Raises:
        PublishError: a file is missing, or its size is not what it was when it was judged.
    """
    carried = released(files)
    by_path: dict[str, Content] = {}
    for file in carried:
        source = folder / file.path
        if not source.is_file() or source.stat().st_size != file.size_bytes:
            raise changed(file.path)
        by_path[file.path] = Content(file=file, source=source)
    for kept in archived:
        by_path[kept.file.path] = Content(file=kept.file, source=kept.source)
    for path, content in documents.items():
        digest = hashlib.sha256(content).hexdigest()
        by_path[path] = Content(file=FileDigest(path=path, size_bytes=len(content), sha256=digest), source=content)
    return Contents(
        by_path=by_path,
        input_digest=input_digest,
        merged_digest=digest_of(carried),
        signed_by=json.loads(documents[MANIFEST]).get("signed_by"),
    )


def contradiction(manifest: Mapping[str, Any], tree: Tree) -> str | None:
    """Return how the repository differs from its own manifest, or None.

    Large files are compared by sha256, small ones by size: their sha256 is not in the Hub's listing.
    """
    files = listed(manifest)
    if not files:
        return "its manifest lists no files"
    for path, (size_bytes, sha256) in files.items():
        remote = tree.get(path)
        if remote is None:
            return f"{path} is missing"
        if remote.size_bytes != size_bytes or remote.sha256 not in (None, sha256):
            return f"{path} is other content"
    return None


def listed(manifest: Mapping[str, Any] | None) -> dict[str, tuple[int, str]]:
    """Return path → (size, sha256) of a manifest that anybody may have written; entries of other forms are left out."""
    lists = [manifest.get(name) for name in ("files", "archive")] if manifest is not None else []
    found: dict[str, tuple[int, str]] = {}
    for entry in (entry for entries in lists if isinstance(entries, list) for entry in entries):
        if isinstance(entry, Mapping):
            path, size_bytes, sha256 = entry.get("path"), entry.get("size_bytes"), entry.get("sha256")
            if isinstance(path, str) and isinstance(size_bytes, int) and isinstance(sha256, str):
                found[path] = (size_bytes, sha256)
    return found


def changed(path: str) -> PublishError:
    """Return the error for a file that changed after it was judged."""
    return PublishError(
        f"{path} is not the file that was judged.",
        why="It was changed or removed in the work folder between the verdict and the upload.",
        fix="Run again, and let nothing else write to `work-dir`.",
    )


def _is_loaded(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if folder not in ("", "additional_chat_templates"):
        return False
    return name.endswith(_LOADED_SUFFIXES) or name in _LOADED_NAMES
