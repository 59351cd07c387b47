"""What the target of a publish looks like before any work is done. Only questions: nothing is left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from runner.protocol.errors import AccessDenied, HubError, RepoNotFound
from runner.supervisor.hub.login import Login
from runner.supervisor.hub.rights import refuse_creation, refuse_read_only, wider_than_needed
from runner.supervisor.hub.select import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from runner.supervisor.hub.snapshot import Tree
from runner.supervisor.hub.transport import Caller

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BRANCH = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refs:
    """Names of a repository, each with the commit it points to; `pulls` by `refs/pr/N`, where they were asked for."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]
    pulls: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The repository to publish to, as the preflight found it.

    Attributes:
        repo_id: `owner/name`.
        exists: whether it is there; if not, nothing speaks against creating it.
        private: None where it does not exist.
        head: commit of `branch`, or None where that does not exist.
        tag_commit: commit of the tag that the run wants, or None where it is free.
        branches: names of all branches.
        tags: names of all tags.
        branch: that the release's commit goes to.
        notes: what the user should know of the token, one sentence each.
        large: sha256 of the large files at `head`.
    """

    repo_id: str
    exists: bool
    private: bool | None
    head: str | None
    tag_commit: str | None
    branches: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    branch: str = BRANCH
    notes: tuple[str, ...] = ()
    large: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """Where in a repository a release is to appear, as far as the preflight must know it.

    Attributes:
        branch: that its commit goes to.
        also_tags: tags that are moved to it.
        create_pr: whether it becomes a pull request.
        allows_adapter: whether `branch`, unless it is `main`, may hold an adapter, which then goes from there.
    """

    branch: str = BRANCH
    also_tags: tuple[str, ...] = ()
    create_pr: bool = False
    allows_adapter: bool = False


class Reader(Protocol):
    """What the preflight reads a repository with."""

    def refs(self, repo_id: str) -> Refs:
        """Return the branches and tags."""
        ...

    def tree(self, repo_id: str, revision: str) -> Tree:
        """Return the files."""
        ...


def inspect(
    api: HfApi, caller: Caller, reader: Reader, login: Login, *, repo_id: str, tag: str, wishes: Wishes
) -> Target:
    """Return the state of the repository to publish to.

    Args:
        api: the client.
        caller: makes its calls.
        reader: reads refs and files.
        login: gives the token.
        repo_id: `owner/name` of the target.
        tag: name of the release.
        wishes: where in the repository it is to appear.

    Raises:
        AccessDenied: no token, a wrong one, one that may only read, or one that may not write there.
        HubError: a tag is a branch's name, or the repository holds an adapter.
    """
    who: Mapping[str, Any] = {}
    if not login.is_keyless:  # such a token is good for this repository and nothing else, and belongs to nobody
        who = _whoami(api, caller, login, repo_id)
        refuse_read_only(who, repo_id)
    try:
        info = caller.read(f"look at {repo_id}", lambda: api.model_info(repo_id, token=login.token()))
    except RepoNotFound:
        _refuse_absent(repo_id, who, login, wishes)
        notes = wider_than_needed(who, repo_id, exists=False)
        return Target(
            repo_id=repo_id, exists=False, private=None, head=None, tag_commit=None, branch=wishes.branch, notes=notes
        )
    _check_write(api, caller, login, repo_id, who, wishes)
    refs = reader.refs(repo_id)
    for name in (tag, *wishes.also_tags):
        _refuse_branch_name(repo_id, name, refs)
    head = refs.branches.get(wishes.branch)
    tree = reader.tree(repo_id, head) if head is not None else {}
    if not wishes.allows_adapter or wishes.branch == BRANCH:
        _refuse_adapter_repo(repo_id, tree)
    return Target(
        repo_id=repo_id,
        exists=True,
        private=info.private,
        head=head,
        tag_commit=refs.tags.get(tag),
        branches=tuple(sorted(refs.branches)),
        tags=tuple(sorted(refs.tags)),
        branch=wishes.branch,
        notes=wider_than_needed(who, repo_id, exists=True),
        large=frozenset(file.sha256 for file in tree.values() if file.sha256 is not None),
    )


def _refuse_absent(repo_id: str, who: Mapping[str, Any], login: Login, wishes: Wishes) -> None:
    if login.is_keyless:
        raise AccessDenied(
            f"{repo_id} does not exist, and a job without `hf-token` cannot create it.",
            why="The token of a trusted publisher is good for one repository, which must exist.",
            fix="Create the repository on the Hub, add this workflow to its Trusted Publishers, and run again.",
        )
    if wishes.create_pr:
        raise RepoNotFound(
            f"{repo_id} does not exist (or this token may not see it), so no pull request can be opened on it.",
            why="`create-pr` proposes a change to a repository.",
            fix="Create the repository, or set `create-pr: false`.",
        )
    refuse_creation(who, repo_id)


def _refuse_branch_name(repo_id: str, tag: str, refs: Refs) -> None:
    if tag in refs.branches:
        raise HubError(
            f"{repo_id} has a branch {tag!r}, so a tag of that name could not be told from it.",
            why="Loaders resolve such a name to the branch.",
            fix="Choose another tag, or delete the branch.",
        )


def _whoami(api: HfApi, caller: Caller, login: Login, repo_id: str) -> Mapping[str, Any]:
    doing = f"check the rights on {repo_id}"
    if not login.token():
        raise AccessDenied(
            f"Could not {doing}: there is no token.",
            why="Publishing needs one that may write.",
            fix="Store a write token as a secret and pass it as `hf-token`.",
        )
    who = caller.read(doing, lambda: api.whoami(token=login.token()), attempts=3)  # its rate limit is strict
    if not isinstance(who, Mapping):
        raise HubError(
            f"Could not {doing}: the answer to whoami is not a JSON object.",
            why="The endpoint answers, but not like a Hub.",
            fix="Check `hub-endpoint`.",
        )
    return who


def _check_write(
    api: HfApi, caller: Caller, login: Login, repo_id: str, who: Mapping[str, Any], wishes: Wishes
) -> None:
    doing = f"check that this token may write to {repo_id}"
    try:
        caller.read(doing, lambda: api.auth_check(repo_id, write=True, token=login.token()))
    except RepoNotFound:  # an older Hub, without that question: judge by what whoami says
        if who:
            refuse_creation(who, repo_id)
    except AccessDenied:
        if not wishes.create_pr:  # a pull request may be opened by who may not write
            raise


def _refuse_adapter_repo(repo_id: str, tree: Tree) -> None:
    found = [path for path in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if path in tree]
    if found:
        raise HubError(
            f"{repo_id} holds an adapter ({found[0]}), so no merged model is published there.",
            why="A release would have to delete it, since loaders would apply it a second time on the merged weights.",
            fix="Choose another `target-repo`; or keep the adapter on its branch, and give the release one of its own: "
            "`allow: same-repo` and `target-revision: merged`.",
        )
