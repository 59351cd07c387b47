"""Whether a tag holds this release already: asked before any work, and again before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runner.protocol.errors import TagExists
from runner.protocol.verdict import Status
from runner.supervisor.hub import Hub, Target, Tree
from runner.supervisor.hub.translate import clean
from runner.supervisor.publish.contents import contradiction
from runner.supervisor.publish.wanted import Wanted

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A tagged revision.

    Attributes:
        repo_id: `owner/name`.
        tag: its name.
        commit: what the tag points to, 40 hex digits.
        url: page of the revision.
        created: False when the tag was there already and nothing was written.
        status: the verdict that its manifest records, or None where the tag holds something else ("skip").
        merged_digest: of its files, as its manifest records it, or None likewise.
        pull_request: page of the pull request that it is; then there is no tag yet.
    """

    repo_id: str
    tag: str
    commit: str
    url: str
    created: bool
    status: Status | None = None
    merged_digest: str | None = None
    pull_request: str | None = None


def find_existing(hub: Hub, target: Target, wanted: Wanted, input_digest: str) -> Release | None:
    """Return the release that makes a run unnecessary, or None when there is work to do.

    The same inputs under the same tag are found again if the tagged files still are what their manifest lists.

    Raises:
        TagExists: the tag holds something else, and `on_existing_tag` is "fail", or "replace" for a protected tag.
    """
    tag = wanted.tag
    commit = target.tag_commit
    if commit is None:
        return None
    found = Release(repo_id=target.repo_id, tag=tag, commit=commit, url=hub.url(target.repo_id, tag), created=False)
    tree = hub.tree(target.repo_id, commit)
    manifest = hub.read_manifest(target.repo_id, commit, tree)
    reason = _other_content(manifest, tree, input_digest)
    if reason is None:
        return replace(found, **recorded(manifest or {}))
    return found if may_skip(wanted, f"The tag {tag} of {target.repo_id}, on commit {commit[:12]},", reason) else None


def may_skip(wanted: Wanted, named: str, reason: str) -> bool:
    """Return True to leave a tag with other content as it is, and False to replace it.

    Raises:
        TagExists: neither is allowed.
    """
    if wanted.on_existing_tag == "skip":
        return True
    if wanted.on_existing_tag == "replace" and not wanted.is_protected:
        return False
    covered = ", and `protected-tags` covers it" if wanted.is_protected else ""
    raise TagExists(
        f"{named} exists, and {reason}{covered}.",
        why="A tag that people pinned must not change under them. Nothing was written.",
        fix="Choose a new tag" + ("." if covered else ", or set `on-existing-tag` to `skip` or `replace`."),
    )


def recorded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return `status` and `merged_digest` of a release as its manifest has them; {} where it has none that passed."""
    match manifest:
        case {"verdict": {"status": "PASS" | "PASS_LOSSY" | "NOT_VERIFIED" as status}, "merged_digest": str(digest)}:
            return {"status": Status(status), "merged_digest": digest if _DIGEST.fullmatch(digest) else None}
    return {}


def _other_content(manifest: Mapping[str, Any] | None, tree: Tree, input_digest: str) -> str | None:
    if manifest is None:
        return "it holds no merge-manifest.json, so something else published it"
    reason = other_inputs(manifest, input_digest)
    difference = contradiction(manifest, tree)
    return reason or (None if difference is None else f"it is not what its manifest says: {difference}")


def other_inputs(manifest: Mapping[str, Any], input_digest: str) -> str | None:
    """Return that a manifest names other inputs than `input_digest`, or None."""
    theirs = clean(manifest.get("input_digest"))[:64]
    if theirs == input_digest:
        return None
    return f"it was made from other inputs (input digest {theirs[:16]}… instead of {input_digest[:16]}…)"
