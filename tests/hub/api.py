"""Accounts and repositories: whoami, create, delete, info, rights, tags, branches, refs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import yaml

from tests.hub import cards, commits, refusals
from tests.hub.protocol import Request, Response, answer
from tests.hub.repos import Repository
from tests.hub.state import State


async def whoami(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say who the token belongs to and what it may do."""
    return answer(state.accounts.whoami(state.signed_in(request)))


async def create(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Create a repository with one commit; 409 with its URL when it exists."""
    token = state.signed_in(request)
    wanted = await request.json()
    namespace = wanted.get("organization") or token.user
    repo_id = f"{namespace}/{wanted.get('name')}"
    if (wanted.get("type") or "model") != "model":
        raise refusals.bad_request("This server has only models")
    if not state.accounts.may_create(token, namespace):
        message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        raise refusals.forbidden(message)
    url = f"{state.endpoint}/{repo_id}"
    if state.repos.get(repo_id) is not None:
        message = f"You already created this model repo: {repo_id}"
        raise refusals.RefusedError(409, message, extra={"url": url})
    private = wanted.get("visibility", "public") == "private"
    repo = state.repos.create(repo_id, private=private, creator=token.user, tree=commits.first_tree(state))
    return answer({"url": url, "name": repo_id, "id": _id(repo)})


async def delete(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Delete a repository."""
    token = state.signed_in(request)
    wanted = await request.json()
    repo, _ = state.writable(request, f"{wanted.get('organization') or token.user}/{wanted['name']}")
    state.repos.delete(repo.repo_id)
    return answer({})


async def auth_check(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say yes if the caller may download."""
    state.downloadable(request, names["repo"])
    return answer({})


async def auth_check_write(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say yes if the caller may commit."""
    state.writable(request, names["repo"])
    return answer({})


async def info(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Describe a repository at a revision (main if none is given)."""
    repo = state.readable(request, names["repo"])
    head = repo.commit(repo.resolve(names.get("rev", "main")))
    tree = repo.tree(head.oid)
    siblings: list[dict[str, Any]] = []
    for path, entry in sorted(tree.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if request.flag("blobs"):
            sibling |= {"size": entry.size_bytes, "blobId": entry.oid}
            if entry.sha256:
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size_bytes, "pointerSize": 130}
        siblings.append(sibling)
    card = _card(state, repo, head.oid)
    body = {
        "_id": _id(repo),
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.repo_id.partition("/")[0],
        "sha": head.oid,
        "lastModified": head.date,
        "createdAt": repo.commit(repo.state.commits[0]).date,
        "private": repo.state.private,
        "gated": repo.state.gated or False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [str(tag) for tag in card.get("tags") or []],
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card,
        "siblings": siblings,
    }
    return answer(body)


def _card(state: State, repo: Repository, commit: str) -> dict[str, Any]:
    entry = repo.tree(commit).get("README.md")
    if entry is None or entry.sha256 is not None:
        return {}
    try:
        return cards.front_matter(state.blobs.small_path(entry.oid).read_text()) or {}
    except (yaml.YAMLError, ValueError):
        return {}


def _id(repo: Repository) -> str:
    return hashlib.sha256(repo.repo_id.encode()).hexdigest()[:24]


async def create_tag(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Tag a revision; 409 when the name is taken, whatever it points to."""
    repo, _ = state.writable(request, names["repo"])
    wanted = await request.json()
    repo.add_tag(wanted["tag"], names["rev"], wanted.get("message", ""))
    return answer({})


async def delete_tag(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Remove a tag."""
    repo, _ = state.writable(request, names["repo"])
    repo.drop_tag(names["rev"])
    return answer({})


async def create_branch(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Start a branch at `startingPoint`, else at main."""
    repo, _ = state.writable(request, names["repo"])
    wanted = await request.json()
    repo.add_branch(names["rev"], wanted.get("startingPoint", "main"))
    return answer({})


async def delete_branch(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Remove a branch."""
    repo, _ = state.writable(request, names["repo"])
    repo.drop_branch(names["rev"])
    return answer({})


async def refs(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """List branches and tags with their commits."""
    repo = state.readable(request, names["repo"])

    def rows(kind: str, targets: Mapping[str, str]) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in sorted(targets.items())
        ]

    body: dict[str, Any] = {
        "branches": rows("heads", repo.state.branches),
        "tags": rows("tags", repo.state.tags),
        "converts": [],
    }
    if request.flag("include_prs"):
        body["pullRequests"] = [
            {"name": ref.removeprefix("refs/pr/"), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.state.pulls.items()
        ]
    return answer(body)
