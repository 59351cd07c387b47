"""A repository as it is on the server, past the protocol: for tests to look at, and to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.hub.commits import first_tree, stored
from tests.hub.disk import Blobs
from tests.hub.repos import Commit, Repository
from tests.hub.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoView:
    """A repository as it is on the server, past the protocol and its rights."""

    _repo: Repository
    _blobs: Blobs

    @property
    def private(self) -> bool:
        """Whether only members see it."""
        return self._repo.state.private

    @property
    def commits(self) -> list[str]:
        """All commit ids in the order they were made; the first is the initial commit."""
        return list(self._repo.state.commits)

    @property
    def branches(self) -> dict[str, str]:
        """Branch to commit id."""
        return dict(self._repo.state.branches)

    @property
    def pulls(self) -> dict[str, str]:
        """`refs/pr/<number>` to commit id."""
        return dict(self._repo.state.pulls)

    @property
    def tags(self) -> dict[str, str]:
        """Tag to commit id."""
        return dict(self._repo.state.tags)

    @property
    def tag_messages(self) -> dict[str, str]:
        """Tag to its message, '' where it has none."""
        return dict(self._repo.state.tag_messages)

    def commit(self, revision: str) -> Commit:
        """Return the commit of a branch, tag or commit id."""
        return self._repo.commit(self._repo.resolve(revision))

    def tree(self, revision: str = "main") -> dict[str, str]:
        """Return path to digest: sha256 for LFS files, git object id (sha1) for the others."""
        return {path: entry.digest for path, entry in self._repo.tree(revision).items()}

    def read(self, path: str, revision: str = "main") -> bytes:
        """Return the content of a file."""
        entry = self._repo.tree(revision)[path]
        if entry.sha256 is not None:
            return self._blobs.large_path(entry.sha256).read_bytes()
        return self._blobs.small_path(entry.oid).read_bytes()


def seed(state: State, repo_id: str, folder: Path, *, private: bool) -> str:
    """Make a repository whose second commit holds the files of `folder`; return that commit's id."""
    owner = repo_id.partition("/")[0]
    repo = state.repos.create(repo_id, private=private, creator=owner, tree=first_tree(state))
    tree = repo.tree("main")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        tree[name] = stored(state, repo, name, path)
    made = repo.add_commit(
        branch="main", parent=repo.resolve("main"), tree=tree, title="Upload", message="", author=owner
    )
    return made.oid
