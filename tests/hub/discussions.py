"""The calls for discussions and pull requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.hub import pulls, refusals
from tests.hub.protocol import Request, Response, answer
from tests.hub.repos import Repository
from tests.hub.state import State


async def create(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Start a discussion, or a pull request that is a draft without changes."""
    repo, token = state.discussable(request, names["repo"])
    wanted = await request.json()
    title, description = str(wanted["title"]), str(wanted.get("description", ""))
    if len(title) < 3:
        raise refusals.bad_request("The title of a discussion has at least 3 characters")
    if wanted.get("pullRequest"):
        start = repo.resolve(pulls.BASE)
        ref = pulls.open_pull(
            repo, title=title, description=description, author=token.user, start=start, status="draft"
        )
        number = int(ref.removeprefix("refs/pr/"))
    else:
        number = pulls.open_discussion(repo, title=title, description=description, author=token.user)["num"]
    return answer({"num": number, "url": f"{state.endpoint}/{repo.repo_id}/discussions/{number}"})


async def show_all(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """List discussions and pull requests, the newest first, in pages; by type, status and author."""
    repo = state.readable(request, names["repo"])
    kind, status, author = (request.first(name) for name in ("type", "status", "author"))
    rows = [
        _summary(repo, record)
        for record in reversed(repo.state.discussions)
        if kind in (None, "all", "pull_request" if record["isPullRequest"] else "discussion")
        and status in (None, "all", "open" if record["status"] in ("open", "draft") else "closed")
        and author in (None, record["author"]["name"])
    ]
    size = max(1, state.limits.page_entries // 20)
    start = int(request.first("p") or 0) * size
    return answer({"count": len(rows), "start": start, "discussions": rows[start : start + size]})


async def show(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Describe one discussion with its events, and what a pull request would change."""
    repo = state.readable(request, names["repo"])
    record = _record(repo, names["num"])
    body: dict[str, Any] = {**_summary(repo, record), "events": record["events"]}
    if record["isPullRequest"]:
        changes = {"base": f"refs/heads/{pulls.BASE}"}
        if "mergeCommitId" in record:
            changes["mergeCommitId"] = record["mergeCommitId"]
        merged = record["status"] == "merged"
        body |= {"changes": changes, "filesWithConflicts": [] if merged else pulls.conflicts(repo, record), "diff": ""}
    return answer(body)


async def comment(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Add a comment."""
    repo, token = state.discussable(request, names["repo"])
    record = _record(repo, names["num"])
    text = str((await request.json())["comment"])
    event = pulls.add_event(repo, record, "comment", token.user, pulls.comment_data(text))
    repo.save()
    return answer({"newMessage": event})


async def status(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Open or close; who started it may, and who may write."""
    repo, user = _steerer(state, request, names)
    wanted = (await request.json())["status"]
    if wanted not in ("open", "closed"):
        raise refusals.bad_request(f"Invalid status: {wanted!r}")
    return answer({"newStatus": pulls.set_status(repo, _record(repo, names["num"]), wanted, user)})


async def merge(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Merge a pull request into main."""
    repo, token = state.writable(request, names["repo"])
    pulls.merge(repo, _record(repo, names["num"]), token.user)
    return answer({})


def _steerer(state: State, request: Request, names: Mapping[str, str]) -> tuple[Repository, str]:
    repo, token = state.discussable(request, names["repo"])
    if _record(repo, names["num"])["author"]["name"] != token.user:
        repo, token = state.writable(request, names["repo"])
    return repo, token.user


def _record(repo: Repository, number: str) -> dict[str, Any]:
    for record in repo.state.discussions:
        if str(record["num"]) == number:
            return record
    raise refusals.RefusedError(404, f"No discussion {number}")


def _summary(repo: Repository, record: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: record[name] for name in ("num", "title", "author", "createdAt", "status", "isPullRequest")}
    return {**told, "repo": {"name": repo.repo_id, "type": "model"}}
