"""Listings: trees, single paths, commits; in pages that a Link header joins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlencode

from tests.hub import refusals
from tests.hub.gitobjects import Entry, folder_oids, pointer
from tests.hub.protocol import Request, Response, answer
from tests.hub.repos import Commit, Repository
from tests.hub.state import State


async def tree(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """List a folder, or everything below it, sorted by path."""
    repo = state.readable(request, names["repo"])
    commit = repo.resolve(names["rev"])
    files = repo.tree(commit)
    folders = folder_oids(files)
    root = (names.get("path") or "").strip("/")
    if root not in folders:
        raise refusals.entry_not_found(root, commit)
    prefix = f"{root}/" if root else ""
    recursive, expand = request.flag("recursive"), request.flag("expand")
    paths = sorted(
        path
        for path in (*files, *folders)
        if path and path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix))
    )
    touched = _last_commits(repo, commit) if expand else {}
    rows = [_row(repo, path, files, folders, touched) for path in paths]
    size = max(1, state.limits.page_entries // (20 if expand else 1))
    return _page(state, request, rows, size, commit)


async def paths_info(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Describe the paths that exist, in the order they were asked for; the others are left out."""
    repo = state.readable(request, names["repo"])
    commit = repo.resolve(names["rev"])
    body = await request.body()
    if request.headers.get("content-type", "").startswith("application/json"):
        wanted = json.loads(body)
        paths, expand = wanted["paths"], bool(wanted.get("expand"))
    else:
        form = parse_qs(body.decode())
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"
    files = repo.tree(commit)
    folders = folder_oids(files)
    touched = _last_commits(repo, commit) if expand else {}
    return answer([_row(repo, path, files, folders, touched) for path in paths if path in files or path in folders])


async def commits(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """List the commits of a revision, newest first."""
    repo = state.readable(request, names["repo"])
    rows = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repo.history(names["rev"])
    ]
    size = max(1, state.limits.page_entries // 20)
    return _page(state, request, rows, size, repo.resolve(names["rev"]))


def _row(
    repo: Repository, path: str, files: Mapping[str, Entry], folders: Mapping[str, str], touched: Mapping[str, Commit]
) -> dict[str, Any]:
    entry = files.get(path)
    row: dict[str, Any]
    if entry is None:
        row = {"type": "directory", "oid": folders[path], "size": 0, "path": path}
    else:
        row = {"type": "file", "oid": entry.oid, "size": entry.size_bytes, "path": path}
        if entry.sha256 is not None:
            size = len(pointer(entry.sha256, entry.size_bytes))
            row["lfs"] = {"oid": entry.sha256, "size": entry.size_bytes, "pointerSize": size}
            if xet_hash := repo.xet_hash(entry.sha256):
                row["xetHash"] = xet_hash
    if path in touched:
        commit = touched[path]
        row["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return row


def _last_commits(repo: Repository, head: str) -> dict[str, Commit]:
    """Return for every file and folder the newest commit that changed it."""
    touched: dict[str, Commit] = {}
    for commit in repo.history(head):
        now = _names(repo, commit.oid)
        before = _names(repo, commit.parent) if commit.parent else {}
        for path, oid in now.items():
            if before.get(path) != oid:
                touched.setdefault(path, commit)
    return touched


def _names(repo: Repository, commit: str) -> dict[str, str]:
    files = repo.tree(commit)
    return {path: entry.oid for path, entry in files.items()} | folder_oids(files)


def _page(state: State, request: Request, rows: Sequence[object], size: int, commit: str) -> Response:
    limit = int(request.first("limit") or size)
    start = int(request.first("cursor") or 0)
    end = start + min(limit, size)
    headers = {"X-Repo-Commit": commit}
    if end < len(rows):
        query = {name: values[0] for name, values in request.query.items()} | {"cursor": str(end)}
        headers["Link"] = f'<{state.endpoint}{request.path}?{urlencode(query)}>; rel="next"'
    return answer(rows[start:end], headers=headers)
