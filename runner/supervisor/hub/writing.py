"""The single writes to a Hub. Each is made once, and then read back: a lost answer is never guessed.

`landed` of each reads the effect from the Hub; see `Caller.settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from runner.protocol.errors import PublishError, RepoNotFound
from runner.supervisor.hub.login import Login
from runner.supervisor.hub.preflight import BRANCH
from runner.supervisor.hub.transport import Caller

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")
Landed = Callable[[bool | None], T | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What the Hub answered to a commit: its id, and of a pull request its page."""

    commit: str
    pull_url: str | None = None


class Writing:
    """The writes of a `Hub`."""

    _api: HfApi
    _caller: Caller
    _login: Login

    def _is_there(self, repo_id: str) -> bool | None:
        token = self._login.token()
        try:
            self._caller.read(f"look at {repo_id}", lambda: self._api.list_repo_refs(repo_id, token=token))
        except RepoNotFound:
            return None
        return True

    def create_repo(self, repo_id: str, *, private: bool) -> None:
        """Create the repository, or find that it is there already; then it can be read."""

        def write() -> bool:
            self._api.create_repo(repo_id, private=private, exist_ok=True, token=self._login.token())
            return True

        self._caller.settle(f"create {repo_id}", write, lambda _answer: self._is_there(repo_id))

    def preupload(
        self, repo_id: str, additions: Sequence[CommitOperationAdd], *, branch: str = BRANCH, create_pr: bool = False
    ) -> None:
        """Send the content of large files; it stays invisible until a commit names it. Small ones are announced only.

        A `.gitignore` in the repository counts for nothing: the client would leave out of the commit, without a word,
        what it ignores. An empty one is sent in its place.

        Raises:
            PublishError: the Hub says that a file is to be ignored all the same.
            HubError: it refuses, or cannot be reached.
        """
        named = additions[0].path_in_repo + (f" and {len(additions) - 1} more files" if additions[1:] else "")
        self._caller.read(
            f"upload {named} to {repo_id}",
            lambda: self._api.preupload_lfs_files(
                repo_id,
                additions,
                token=self._login.token(),
                revision=branch,
                create_pr=create_pr,
                num_threads=1,
                free_memory=False,
                gitignore_content="",
            ),
            attempts=3,  # the client repeats each request itself
        )
        if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
            raise PublishError(
                f"The Hub would leave {', '.join(ignored[:5])} out of a commit to {repo_id}.",
                why="Its answer to the announced files says that they are to be ignored, as by a `.gitignore`, and a "
                "release without them is not the one that was judged.",
                fix=f"Delete the `.gitignore` of {repo_id}, then run again.",
            )

    def commit(
        self,
        repo_id: str,
        operations: Sequence[Any],
        *,
        parent: str,
        message: str,
        description: str,
        landed: Callable[[Made | None], T | None],
        branch: str = BRANCH,
        create_pr: bool = False,
    ) -> T:
        """Make one commit on `branch`, or a pull request to it of one commit; return what `landed` confirms."""

        def write() -> Made:
            info = self._api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                commit_description=description,
                token=self._login.token(),
                revision=branch,
                create_pr=create_pr,
                parent_commit=parent,
                num_threads=1,
            )
            return Made(commit=str(info.oid), pull_url=info.pr_url)

        what = "open a pull request on" if create_pr else "commit to"
        return self._caller.settle(f"{what} {repo_id}", write, landed)

    def create_tag(self, repo_id: str, tag: str, commit: str, *, message: str, landed: Landed[T]) -> T:
        """Create the tag on `commit`, and return what `landed` confirms."""

        def write() -> bool:
            self._api.create_tag(repo_id, tag=tag, revision=commit, tag_message=message, token=self._login.token())
            return True

        return self._caller.settle(f"tag {repo_id} with {tag}", write, landed)

    def delete_tag(self, repo_id: str, tag: str, *, landed: Landed[T]) -> T:
        """Delete the tag, until `landed` confirms it."""

        def write() -> bool:
            self._api.delete_tag(repo_id, tag=tag, token=self._login.token())
            return True

        return self._caller.settle(f"delete the tag {tag} of {repo_id}", write, landed)

    def create_branch(self, repo_id: str, branch: str, commit: str, *, landed: Landed[T]) -> T:
        """Start the branch at `commit`, and return what `landed` confirms."""

        def write() -> bool:
            self._api.create_branch(repo_id, branch=branch, revision=commit, token=self._login.token())
            return True

        return self._caller.settle(f"start the branch {branch} of {repo_id}", write, landed)

    def delete_branch(self, repo_id: str, branch: str, *, landed: Landed[T]) -> T:
        """Delete the branch, until `landed` confirms it. Commits that a tag names stay."""

        def write() -> bool:
            self._api.delete_branch(repo_id, branch=branch, token=self._login.token())
            return True

        return self._caller.settle(f"delete the branch {branch} of {repo_id}", write, landed)
