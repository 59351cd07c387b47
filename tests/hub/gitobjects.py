"""Git's names for trees and commits, and the checks that git makes on paths and references."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tests.hub import refusals
from tests.hub.disk import git_blob_oid

BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|\.lock(/|$)|(^|/)\.|\.$|/$|^/|^-|^@$|^$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a tree.

    Attributes:
        oid: git object id; of the pointer file where the content is in LFS.
        size_bytes: of the content.
        sha256: of the content where it is in LFS, else None.
    """

    oid: str
    size_bytes: int
    sha256: str | None = None

    @property
    def digest(self) -> str:
        """sha256 for LFS, git object id for the rest: what `ETag` and read-back show."""
        return self.sha256 or self.oid


def pointer(sha256: str, size_bytes: int) -> bytes:
    """Return the LFS pointer file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def lfs_entry(sha256: str, size_bytes: int) -> Entry:
    """Return the entry of a file whose content is in LFS."""
    return Entry(oid=git_blob_oid(pointer(sha256, size_bytes)), size_bytes=size_bytes, sha256=sha256)


def folder_oids(tree: Mapping[str, Entry]) -> dict[str, str]:
    """Return the git tree id of every folder by its path; the root is ''."""
    children: dict[str, dict[str, tuple[bytes, str]]] = {"": {}}
    for path, entry in tree.items():
        parent, _, name = path.rpartition("/")
        children.setdefault(parent, {})[name] = (b"100644", entry.oid)
        while parent:
            children.setdefault(parent.rpartition("/")[0], {})
            parent = parent.rpartition("/")[0]
    oids: dict[str, str] = {}
    # Deepest first, so that each folder's id is known before its parent needs it.
    for folder in sorted(children, key=lambda path: -path.count("/") if path else 1):
        # Git sorts a folder as if its name ended with a slash.
        rows = sorted(children[folder].items(), key=lambda row: row[0] + ("/" if row[1][0] == b"40000" else ""))
        body = b"".join(mode + b" " + name.encode() + b"\0" + bytes.fromhex(oid) for name, (mode, oid) in rows)
        oids[folder] = hashlib.sha1(b"tree %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        if folder:
            parent, _, name = folder.rpartition("/")
            children[parent][name] = (b"40000", oids[folder])
    return oids


def commit_oid(*, tree: str, parent: str | None, author: str, date_s: int, message: str) -> str:
    """Return the git commit id; `date_s` is in seconds since 1970, UTC."""
    who = f"{author} <{author}@users.noreply.localhost> {date_s} +0000"
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
    body = ("\n".join(lines) + f"\n\n{message}").encode()
    return hashlib.sha1(b"commit %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def checked_ref(name: str) -> str:
    """Return `name`; refuses what `git check-ref-format` refuses."""
    if BAD_REF.search(name):
        raise refusals.bad_request(f"Invalid reference name: {name!r}")
    return name


def checked_path(path: object) -> str:
    """Return `path`; refuses what is not a plain relative path of git."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..", ".git") for part in parts):
        raise refusals.bad_request(f"Invalid path in repository: {path!r}")
    return "/".join(parts)
