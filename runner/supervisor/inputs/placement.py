"""Where and how a release appears, as the user asks for it: the inputs about publishing, beside token and tag.

Covered: a repository on the Hub, and a folder (`dir:///path`) for machines without a Hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from runner.protocol.repo_ref import RepoRef
from runner.protocol.syntax import endpoint_problem, repo_id_problem, revision_problem, tag_problem
from runner.supervisor.inputs.form import Form

FOLDER = "dir:"
MAIN = "main"
# What a folder cannot have.
_OF_THE_HUB = ("staging", "create-pr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a release goes.

    Attributes:
        repo_id: `owner/name`; None for a folder, and where nothing is published.
        folder: absolute; None for the Hub.
        endpoint: address of the Hub, or None for the public one.
        branch: that the release's commit goes to.
        also_tags: tags that are moved to the release.
        protected_tags: patterns of tags that are never moved.
        is_staged: whether the branch follows after the tag.
        create_pr: whether the release becomes a pull request.
        archives_adapter: whether the release holds the adapter, under `adapter/`.
    """

    repo_id: str | None
    folder: Path | None
    endpoint: str | None
    branch: str
    also_tags: tuple[str, ...]
    protected_tags: tuple[str, ...]
    is_staged: bool
    create_pr: bool
    archives_adapter: bool

    def is_protected(self, tag: str) -> bool:
        """Return whether a tag is one that is never moved."""
        return any(fnmatchcase(tag, pattern) for pattern in self.protected_tags)

    def public(self, folder: str) -> dict[str, str | bool | int]:
        """Return the inputs behind it by name; `folder` is how the folder is to be shown."""
        return {
            "target-repo": self.repo_id or (f"{FOLDER}{folder}" if self.folder else ""),
            "target-revision": self.branch,
            "also-tags": "\n".join(self.also_tags),
            "protected-tags": "\n".join(self.protected_tags),
            "staging": self.is_staged,
            "create-pr": self.create_pr,
            "archive-adapter": self.archives_adapter,
            "upload-early": True,  # always; there for readers of reports
            "hub-endpoint": self.endpoint or "",
        }


def read_placement(form: Form) -> Placement:
    """Return what the form says of where the release goes; what is wrong with it is noted in the form."""
    repo_id, folder = _target(form)
    endpoint = _endpoint(form)
    return Placement(
        repo_id=repo_id,
        folder=folder,
        endpoint=endpoint.rstrip("/") if endpoint else None,
        branch=form.checked("target-revision", branch_problem, "a branch") or MAIN,
        also_tags=_names(form, "also-tags"),
        protected_tags=form.words("protected-tags"),
        is_staged=form.boolean("staging"),
        create_pr=form.boolean("create-pr"),
        archives_adapter=form.boolean("archive-adapter"),
    )


def check_placement(form: Form, placement: Placement, tag: str | None) -> None:
    """Note what contradicts itself when a release is to be published.

    Args:
        form: where problems are noted.
        placement: what was read.
        tag: of the release.
    """
    _check_aliases(form, placement, tag)
    if placement.create_pr and (placement.is_staged or placement.branch != MAIN):
        form.add(
            f"`create-pr` and {'`staging`' if placement.is_staged else '`target-revision`'} are both given.",
            why="A pull request is opened for `main`, and whoever merges it decides when that moves.",
            fix="Choose one of the two.",
        )
    if placement.folder is not None:
        _check_folder(form, placement)


def check_sources(form: Form, placement: Placement, sources: Sequence[tuple[str, RepoRef | None]]) -> None:
    """Note where a release would replace what it is made from.

    Args:
        form: where problems are noted.
        placement: what was read.
        sources: the adapters and the base, with the names of their inputs.
    """
    for name, ref in sources:
        if ref is not None:
            _check_source(form, placement, name, ref)


def _check_source(form: Form, placement: Placement, name: str, ref: RepoRef) -> None:
    if placement.repo_id and ref.repo_id and ref.repo_id.lower() == placement.repo_id.lower():
        form.add(
            f"`target-repo` and `{name}` are both {placement.repo_id!r}.",
            why="The release replaces the files of its repository, so it would overwrite what it was made from.",
            fix="Publish to a repository of its own. If you mean it, set `allow: same-repo`; in an adapter's "
            "repository also `target-revision` to a branch for releases, so that the adapter stays where it is.",
        )
    if placement.folder and ref.path and placement.folder.is_relative_to(ref.path):
        form.add(
            f"`target-repo` lies in the folder of `{name}`, {str(ref.path)!r}.",
            why="The release would become a part of what it was made from.",
            fix="Name a folder outside. If you mean it, set `allow: same-repo`.",
        )


def branch_problem(branch: str) -> str | None:
    """Return why `branch` cannot be the branch of a release, or None."""
    if reason := revision_problem(branch):
        return reason
    if branch.startswith(("refs/", "staging/")) or branch == "HEAD":
        return "it must be the short name of a branch, and `staging/…` is kept for releases on their way"
    if re.fullmatch("[0-9a-fA-F]{7,40}", branch):
        return "it reads as a commit id, so nobody could tell what it names"
    return None


def _target(form: Form) -> tuple[str | None, Path | None]:
    text = form.values.get("target-repo", "")
    if not text.startswith(FOLDER):
        return form.checked("target-repo", repo_id_problem, "a repository on the Hub, nor `dir:///path`"), None
    path = text.removeprefix(FOLDER)
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
        if host or path in ("", "/"):
            form.add(
                f"`target-repo` is {text!r}, which names no folder.",
                why="After `dir://` comes an absolute path, with a third slash; no machine can be named.",
                fix="Write `dir:///srv/models/my-model`, or `dir:models/my-model` for a folder in the workspace.",
            )
            return None, None
    return None, form.folder_at("target-repo", path)


def _endpoint(form: Form) -> str | None:
    text = form.values.get("hub-endpoint", "")
    if "@" not in text:
        return form.checked("hub-endpoint", endpoint_problem, "the address of a Hub")
    form.add(
        "`hub-endpoint` holds `@`, so it holds a user or a password, or is no address.",
        why="It is shown in logs and reports.",
        fix="Write the address alone, and give tokens as inputs; if that was a password, change it.",
    )
    return None


def _check_folder(form: Form, placement: Placement) -> None:
    wrong = [name for name in _OF_THE_HUB if form.values.get(name) not in ("", "false", "False", "FALSE", None)]
    wrong += ["target-revision"] if placement.branch != MAIN else []
    for name in wrong:
        form.add(
            f"`{name}` is given, but `target-repo` is a folder.",
            why="A folder has one sub-folder for each tag, no branches and no pull requests.",
            fix=f"Remove `{name}`, or publish to a repository on the Hub.",
        )


def _check_aliases(form: Form, placement: Placement, tag: str | None) -> None:
    for alias in placement.also_tags:
        if alias == tag:
            form.add(
                f"`also-tags` names {alias!r}, which is the tag of the release.",
                why="A moving tag and the release's own, which must not move, cannot be one.",
                fix="Remove it from `also-tags`.",
            )
        elif placement.is_protected(alias):
            form.add(
                f"`also-tags` names {alias!r}, which `protected-tags` covers.",
                why="A protected tag is never moved, and those of `also-tags` are.",
                fix="Remove it from one of the two.",
            )


def _names(form: Form, name: str) -> tuple[str, ...]:
    words = form.words(name)
    for word in words:
        if reason := tag_problem(word):
            form.add(
                f"`{name}` names {word!r}, which is not a name for a tag.",
                why=f"{reason[0].upper()}{reason[1:]}.",
                fix=f"Correct `{name}`.",
            )
    return words
