"""Repositories on disk: commits and trees by id, branches and tags, one JSON file each."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from threading import RLock
from typing import Any

from tests.hub import refusals
from tests.hub.disk import write_atomically
from tests.hub.gitobjects import Entry, checked_ref, commit_oid, folder_oids

Tree = dict[str, Entry]
_EPOCH_S = 1_700_000_000  # commits are dated by their number, so that equal content gives equal ids
_OID = re.compile(r"[0-9a-f]{7,40}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One commit.

    Attributes:
        oid: 40 hex digits.
        parent: of the commit before, None for the first.
        tree: git tree id of the root.
        title: first line of the message.
        message: the rest.
        author: user name.
        number: counts all commits of the repository from 0.
    """

    oid: str
    parent: str | None
    tree: str
    title: str
    message: str
    author: str
    number: int

    @property
    def date(self) -> str:
        """ISO date as the Hub writes it."""
        return date_text(self.number)


def date_text(number: int) -> str:
    """Return the ISO date of what was made after `number` commits, as the Hub writes it."""
    return datetime.fromtimestamp(_EPOCH_S + number, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(slots=True, kw_only=True)
class State:
    """What of a repository can change; the content of `repo.json`.

    Attributes:
        private: only members see it.
        creator: user name.
        gated: '' for not gated, else `auto` or `manual`.
        access: user to `pending`, `accepted` or `rejected`, where it is gated.
        commits: ids in the order they were made.
        branches: name to commit.
        tags: name to commit.
        tag_messages: name to message.
        pulls: `refs/pr/<number>` to commit.
        discussions: as the protocol shows them, without what follows from the rest; number 1 first.
        protected: patterns of full reference names that nobody may delete, move or push to.
    """

    private: bool
    creator: str
    gated: str = ""
    access: dict[str, str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    tag_messages: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    protected: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Repository:
    """One model repository.

    Attributes:
        repo_id: `owner/name`.
        folder: where it is kept.
        state: branches, tags and settings as of now.
    """

    repo_id: str
    folder: Path
    state: State
    lock: RLock = field(default_factory=RLock)
    _texts: tuple[str, ...] = ()

    def save(self) -> None:
        """Write `state` to disk; references move only by this one replacement."""
        text = json.dumps(asdict(self.state), indent=1)
        write_atomically(self.folder / "repo.json", text)
        self._texts = (*self._texts[-1:], text)

    def before(self) -> Repository | None:
        """Return the repository as it was before its last change, to read only; None if it did not exist then."""
        if len(self._texts) < 2:
            return None
        return Repository(repo_id=self.repo_id, folder=self.folder, state=State(**json.loads(self._texts[0])))

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, tag, full `refs/…` name or commit id (7 digits or more)."""
        state = self.state
        if revision in state.pulls:
            return state.pulls[revision]
        for prefix, names in (("refs/heads/", state.branches), ("refs/tags/", state.tags)):
            if revision.startswith(prefix) and revision.removeprefix(prefix) in names:
                return names[revision.removeprefix(prefix)]
        found = state.branches.get(revision) or state.tags.get(revision)
        if found is None and _OID.fullmatch(revision):
            matches = [oid for oid in state.commits if oid.startswith(revision)]
            found = matches[0] if len(matches) == 1 else None
        if found is None:
            raise refusals.revision_not_found(revision)
        return found

    def commit(self, oid: str) -> Commit:
        """Return a commit by its full id."""
        return Commit(**json.loads((self.folder / "commits" / f"{oid}.json").read_text()))

    def tree(self, revision: str) -> Tree:
        """Return all files of a revision by path."""
        commit = self.commit(self.resolve(revision))
        rows = json.loads((self.folder / "trees" / f"{commit.tree}.json").read_text())
        return {path: Entry(**entry) for path, entry in rows.items()}

    def heads(self, name: str) -> dict[str, str]:
        """Return the references that can be committed to, among which `name` is or would be one."""
        return self.state.pulls if name.startswith("refs/pr/") else self.state.branches

    def refuse_protected(self, ref: str) -> None:
        """Refuse a change of a protected reference, by its full name."""
        if any(fnmatch(ref, pattern) for pattern in self.state.protected):
            raise refusals.forbidden(f"{ref} is protected")

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield the commits of a revision, newest first."""
        oid: str | None = self.resolve(revision)
        while oid is not None:
            commit = self.commit(oid)
            yield commit
            oid = commit.parent

    def add_commit(
        self, *, branch: str, parent: str | None, tree: Mapping[str, Entry], title: str, message: str, author: str
    ) -> Commit:
        """Store tree and commit, then move the branch; refuses a `parent` that is not the branch's head."""
        with self.lock:
            if self.heads(branch).get(branch) != parent:
                raise stale_parent()
            number = len(self.state.commits)
            root = folder_oids(tree)[""]
            text = f"{title}\n\n{message}" if message else title
            oid = commit_oid(tree=root, parent=parent, author=author, date_s=_EPOCH_S + number, message=text)
            commit = Commit(
                oid=oid, parent=parent, tree=root, title=title, message=message, author=author, number=number
            )
            rows = {path: asdict(tree[path]) for path in sorted(tree)}
            write_atomically(self.folder / "trees" / f"{root}.json", json.dumps(rows, indent=1))
            write_atomically(self.folder / "commits" / f"{oid}.json", json.dumps(asdict(commit), indent=1))
            self.state.commits.append(oid)
            self.heads(branch)[branch] = oid
            self.save()
            return commit

    def add_tag(self, tag: str, revision: str, message: str) -> None:
        """Put a tag on the commit of `revision`; refuses a name that is taken."""
        with self.lock:
            oid = self.resolve(revision)
            if checked_ref(tag) in self.state.tags:
                raise refusals.RefusedError(409, f"Tag reference exists already: {tag}")
            self.state.tags[tag] = oid
            self.state.tag_messages[tag] = message
            self.save()

    def drop_tag(self, tag: str) -> None:
        """Remove a tag; refuses a protected one."""
        with self.lock:
            self.refuse_protected(f"refs/tags/{tag}")
            if self.state.tags.pop(tag, None) is None:
                raise refusals.revision_not_found(tag)
            self.state.tag_messages.pop(tag, None)
            self.save()

    def add_branch(self, branch: str, revision: str) -> None:
        """Start a branch at the commit of `revision`; refuses a name that is taken."""
        with self.lock:
            oid = self.resolve(revision)
            if checked_ref(branch).startswith("refs/"):
                raise refusals.bad_request(f"Invalid branch name: {branch!r}")
            if branch in self.state.branches:
                raise refusals.RefusedError(409, f"Reference already exists: {branch}")
            self.state.branches[branch] = oid
            self.save()

    def drop_branch(self, branch: str) -> None:
        """Remove a branch; commits that a tag names stay reachable. Refuses `main` and protected ones."""
        with self.lock:
            self.refuse_protected(f"refs/heads/{branch}")
            if branch == "main":
                raise refusals.forbidden("Cannot delete branch main")
            if self.state.branches.pop(branch, None) is None:
                raise refusals.revision_not_found(branch)
            self.save()

    def has_large(self, sha256: str) -> bool:
        """Return whether this large file was uploaded to this repository."""
        return (self.folder / "lfs" / sha256).exists()

    def mark_large(self, sha256: str, xet_hash: str = "") -> None:
        """Record that this large file was uploaded to this repository, and how Xet calls it if it came that way."""
        write_atomically(self.folder / "lfs" / sha256, xet_hash or self.xet_hash(sha256) or "")

    def xet_hash(self, sha256: str) -> str | None:
        """Return how Xet calls a large file, None where it did not come that way."""
        path = self.folder / "lfs" / sha256
        return (path.read_text() or None) if path.exists() else None


@dataclass(slots=True, kw_only=True)
class Repositories:
    """All model repositories of one Hub, each in `root/<owner>/<name>`; opened once, kept in memory."""

    root: Path
    _open: dict[str, Repository] = field(default_factory=dict)
    _lock: RLock = field(default_factory=RLock)

    def get(self, repo_id: str) -> Repository | None:
        """Return a repository, or None where there is none."""
        with self._lock:
            folder = self.root / repo_id
            if repo_id not in self._open and _REPO_ID.fullmatch(repo_id) and (folder / "repo.json").exists():
                state = State(**json.loads((folder / "repo.json").read_text()))
                repo = Repository(repo_id=repo_id, folder=folder, state=state)
                repo.save()
                self._open[repo_id] = repo
            return self._open.get(repo_id)

    def create(self, repo_id: str, *, private: bool, creator: str, tree: Mapping[str, Entry]) -> Repository:
        """Make a repository whose first commit holds `tree`; refuses a name that git or the Hub would refuse."""
        if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith((".git", ".")):
            raise refusals.bad_request(f"Invalid repository name: {repo_id!r}")
        with self._lock:
            state = State(private=private, creator=creator)
            repo = Repository(repo_id=repo_id, folder=self.root / repo_id, state=state)
            repo.add_commit(branch="main", parent=None, tree=tree, title="initial commit", message="", author=creator)
            self._open[repo_id] = repo
            return repo

    def delete(self, repo_id: str) -> None:
        """Remove a repository with its history; blobs stay."""
        with self._lock:
            repo = self._open.pop(repo_id)
            shutil.rmtree(repo.folder)


def stale_parent() -> refusals.RefusedError:
    """Return the answer to a commit whose parent is not the branch's head any more."""
    return refusals.RefusedError(412, "A commit has happened since. Please refresh and try again.")
