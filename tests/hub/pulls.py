"""Discussions and pull requests of a repository: numbers, events, and the merge of one into main."""

from __future__ import annotations

import hashlib
from typing import Any

from tests.hub import refusals
from tests.hub.repos import Commit, Repository, Tree, date_text

BASE = "main"


def open_discussion(repo: Repository, *, title: str, description: str, author: str) -> dict[str, Any]:
    """Start a discussion; return its record."""
    with repo.lock:
        record: dict[str, Any] = {
            "num": len(repo.state.discussions) + 1,
            "title": title,
            "author": {"name": author, "type": "user"},
            "createdAt": _now(repo),
            "status": "open",
            "isPullRequest": False,
            "events": [],
        }
        repo.state.discussions.append(record)
        add_event(repo, record, "comment", author, comment_data(description))
        repo.save()
        return record


def open_pull(repo: Repository, *, title: str, description: str, author: str, start: str, status: str = "open") -> str:
    """Start a pull request at the commit `start`; return its reference."""
    with repo.lock:
        record = open_discussion(repo, title=title, description=description, author=author)
        ref = f"refs/pr/{record['num']}"
        record |= {"isPullRequest": True, "status": status, "start": start}
        repo.state.pulls[ref] = start
        repo.save()
        return ref


def note_commit(repo: Repository, branch: str, commit: Commit) -> None:
    """Show a commit in the pull request that it was made to, if it was made to one."""
    for record in repo.state.discussions:
        if branch == f"refs/pr/{record['num']}":
            add_event(repo, record, "commit", commit.author, {"subject": commit.title, "oid": commit.oid})
            repo.save()


def add_event(repo: Repository, record: dict[str, Any], kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    """Append an event to a discussion and return it; the caller saves."""
    name = f"{repo.repo_id}/{record['num']}/{len(record['events'])}"
    event = {
        "id": hashlib.sha256(name.encode()).hexdigest()[:24],
        "type": kind,
        "author": {"name": author},
        "createdAt": _now(repo),
        "data": data,
    }
    record["events"].append(event)
    return event


def comment_data(text: str) -> dict[str, Any]:
    """Return what a comment holds."""
    return {"edited": False, "hidden": False, "latest": {"raw": text}}


def set_status(repo: Repository, record: dict[str, Any], status: str, author: str) -> dict[str, Any]:
    """Change the status of a discussion; return the event."""
    with repo.lock:
        if record["status"] == "merged":
            raise refusals.bad_request("This pull request is merged")
        record["status"] = status
        event = add_event(repo, record, "status-change", author, {"status": status})
        repo.save()
        return event


def conflicts(repo: Repository, record: dict[str, Any]) -> list[str]:
    """Return the paths that the pull request and main have both changed, differently, since it was started."""
    start, ours, theirs = (repo.tree(commit) for commit in _sides(repo, record))
    return sorted(
        path
        for path in {*start, *ours, *theirs}
        if ours.get(path) != theirs.get(path) and start.get(path) not in (ours.get(path), theirs.get(path))
    )


def merge(repo: Repository, record: dict[str, Any], author: str) -> Commit:
    """Bring the changes of a pull request to main in one commit."""
    with repo.lock:
        if not record["isPullRequest"] or record["status"] not in ("open", "draft"):
            raise refusals.bad_request("Only an open pull request can be merged")
        if paths := conflicts(repo, record):
            raise refusals.RefusedError(409, f"Merge conflict in {', '.join(paths)}")
        start, pull, main = _sides(repo, record)
        before, wanted, tree = repo.tree(start), repo.tree(pull), repo.tree(main)
        merged: Tree = {path: entry for path, entry in tree.items() if path in wanted or path not in before}
        merged |= {path: entry for path, entry in wanted.items() if before.get(path) != entry}
        title = f"{record['title']} (#{record['num']})"
        made = repo.add_commit(branch=BASE, parent=main, tree=merged, title=title, message="", author=author)
        record["mergeCommitId"] = made.oid
        record["status"] = "merged"
        add_event(repo, record, "status-change", author, {"status": "merged"})
        repo.save()
        return made


def _sides(repo: Repository, record: dict[str, Any]) -> tuple[str, str, str]:
    return record["start"], repo.state.pulls[f"refs/pr/{record['num']}"], repo.state.branches[BASE]


def _now(repo: Repository) -> str:
    return date_text(len(repo.state.commits))
