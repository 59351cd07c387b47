"""A model as the user names it: a local folder, or `owner/name[@revision]` on the Hub."""

from __future__ import annotations

from pathlib import Path

from runner.protocol.errors import InputError, Problem
from runner.protocol.repo_ref import RepoRef
from runner.protocol.syntax import repo_id_problem, revision_problem
from runner.supervisor.inputs.workspace import Workspace


def read_reference(name: str, text: str, workspace: Workspace) -> RepoRef:
    """Return what `text` names.

    Text that starts with `.`, `/` or `~` is a path. Other text is a path if there is such a folder (an output
    of an earlier step may look like `owner/name`), else a repository.

    Args:
        name: the input, for errors.
        text: its value.
        workspace: where relative paths start.

    Raises:
        InputError: no such folder, or neither a folder nor a name that the Hub could have.
    """
    if text.startswith((".", "/", "~")) or workspace.locate(name, text).exists():
        return RepoRef(path=_folder(name, text, workspace))
    repo_id, at, revision = text.partition("@")
    if reason := repo_id_problem(repo_id):
        raise InputError(
            [
                Problem(
                    what=f"`{name}` is {text!r}, which is neither a folder nor a repository on the Hub.",
                    why=f"There is no such folder in {str(workspace.root)!r}; as the name of a repository, {reason}.",
                    fix="Check the path, or write `owner/name` or `owner/name@revision`.",
                )
            ]
        )
    if at and (reason := revision_problem(revision)):
        raise InputError(
            [
                Problem(
                    what=f"`{name}` is {text!r}, whose revision {revision!r} cannot exist.",
                    why=f"As a revision, {reason}.",
                    fix="Write a branch, a tag or a commit after the `@`.",
                )
            ]
        )
    return RepoRef(repo_id=repo_id, revision=revision or None)


def _folder(name: str, text: str, workspace: Workspace) -> Path:
    path = workspace.locate(name, text)
    if path.is_dir():
        workspace.check_links(name, path)
        return path
    found = "a file" if path.exists() else "missing"
    raise InputError(
        [
            Problem(
                what=f"`{name}` is {text!r}, which is {found}.",
                why=f"A folder is needed, and it was looked for at {str(path)!r}.",
                fix="Give the folder that holds the files; for a repository on the Hub write `owner/name`.",
            )
        ]
    )
