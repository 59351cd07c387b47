"""What the target of a publish looks like before any work is done. Only questions: nothing is left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from runner.errors import AccessDenied, HubError, RepoNotFound
from runner.hub.rights import refuse_creation, refuse_read_only
from runner.hub.select import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from runner.hub.snapshot import Tree
from runner.hub.transport import Caller

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BRANCH = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refs:
    """Names of a repository, each with the commit it points to."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The repository to publish to, as the preflight found it.

    Attributes:
        repo_id: `owner/name`.
        exists: whether it is there; if not, nothing speaks against creating it.
        private: None where it does not exist.
        head: commit of the branch `main`, or None.
        tag_commit: commit of the tag that the run wants, or None where it is free.
        branches: names of all branches.
        tags: names of all tags.
    """

    repo_id: str
    exists: bool
    private: bool | None
    head: str | None
    tag_commit: str | None
    branches: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class Reader(Protocol):
    """What the preflight reads a repository with."""

    def refs(self, repo_id: str) -> Refs:
        """Return the branches and tags."""
        ...

    def tree(self, repo_id: str, revision: str) -> Tree:
        """Return the files."""
        ...


def inspect(api: HfApi, caller: Caller, reader: Reader, *, repo_id: str, tag: str) -> Target:
    """Return the state of the repository to publish to.

    Args:
        api: the client; it holds the token.
        caller: makes its calls.
        reader: reads refs and files.
        repo_id: `owner/name` of the target.
        tag: name of the release.

    Raises:
        AccessDenied: no token, a wrong one, one that may only read, or one that may not write there.
        HubError: the tag is a branch's name, or the repository holds an adapter.
    """
    who = _whoami(api, caller, repo_id)
    refuse_read_only(who, repo_id)
    try:
        info = caller.read(f"look at {repo_id}", lambda: api.model_info(repo_id, token=api.token))
    except RepoNotFound:
        refuse_creation(who, repo_id)
        return Target(repo_id=repo_id, exists=False, private=None, head=None, tag_commit=None)
    _check_write(api, caller, repo_id, who)
    refs = reader.refs(repo_id)
    if tag in refs.branches:
        raise HubError(
            f"{repo_id} has a branch {tag!r}, so a tag of that name could not be told from it.",
            why="Loaders resolve such a name to the branch.",
            fix="Choose another tag, or delete the branch.",
        )
    head = refs.branches.get(BRANCH)
    if head is not None:
        _refuse_adapter_repo(repo_id, reader.tree(repo_id, head))
    return Target(
        repo_id=repo_id,
        exists=True,
        private=info.private,
        head=head,
        tag_commit=refs.tags.get(tag),
        branches=tuple(sorted(refs.branches)),
        tags=tuple(sorted(refs.tags)),
    )


def _whoami(api: HfApi, caller: Caller, repo_id: str) -> Mapping[str, Any]:
    doing = f"check the rights on {repo_id}"
    if not api.token:
        raise AccessDenied(
            f"Could not {doing}: there is no token.",
            why="Publishing needs one that may write.",
            fix="Store a write token as a secret and pass it as `hf-token`.",
        )
    who = caller.read(doing, lambda: api.whoami(token=api.token), attempts=3)  # its rate limit is strict
    if not isinstance(who, Mapping):
        raise HubError(
            f"Could not {doing}: the answer to whoami is not a JSON object.",
            why="The endpoint answers, but not like a Hub.",
            fix="Check `HF_ENDPOINT`.",
        )
    return who


def _check_write(api: HfApi, caller: Caller, repo_id: str, who: Mapping[str, Any]) -> None:
    doing = f"check that this token may write to {repo_id}"
    try:
        caller.read(doing, lambda: api.auth_check(repo_id, write=True, token=api.token))
    except RepoNotFound:  # an older Hub, without that question: judge by what whoami says
        refuse_creation(who, repo_id)


def _refuse_adapter_repo(repo_id: str, tree: Tree) -> None:
    found = [path for path in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if path in tree]
    if found:
        raise HubError(
            f"{repo_id} holds an adapter ({found[0]}), so no merged model is published there.",
            why="A release would have to delete it, since loaders would apply it a second time on the merged weights.",
            fix="Choose another `target-repo`.",
        )
