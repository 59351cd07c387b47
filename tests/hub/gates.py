"""Gated repositories: who may download, who has asked, and who decides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.hub import refusals
from tests.hub.accounts import Accounts, Token
from tests.hub.protocol import Request, Response, answer
from tests.hub.repos import Repository, date_text

if TYPE_CHECKING:
    from tests.hub.state import State

_CODE = "GatedRepo"
_DECISIONS = ("pending", "accepted", "rejected")


def refusal(accounts: Accounts, repo: Repository, token: Token | None, endpoint: str) -> refusals.RefusedError | None:
    """Return why a caller may not download from a gated repository, None where they may."""
    name = repo.repo_id
    if token is None:
        text = f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
        return refusals.RefusedError(401, f"{text} Please log in.", code=_CODE)
    if accounts.may_read(token, name):
        return None
    decision = "accepted" if accounts.is_member(token, name) else repo.state.access.get(token.user)
    if decision == "accepted":
        if token.role != "fineGrained" or token.reads_gated:
            return None
        text = "Please enable access to public gated repositories in your fine-grained token settings"
        return refusals.RefusedError(403, f"{text} to view this repository.", code=_CODE)
    text = {
        "pending": f"Your request to access model {name} is awaiting a review from the repo authors.",
        "rejected": f"Your request to access model {name} has been rejected by the repo's authors.",
    }.get(decision or "", f"Access to model {name} is restricted and you are not in the authorized list.")
    return refusals.RefusedError(403, f"{text} Visit {endpoint}/{name} to ask for access.", code=_CODE)


def ask(repo: Repository, user: str) -> str:
    """Note that a user asks for access, as they do on the website; return what follows."""
    decision = "accepted" if repo.state.gated == "auto" else "pending"
    repo.state.access.setdefault(user, decision)
    repo.save()
    return repo.state.access[user]


async def settings(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Change who sees a repository and who may download from it."""
    repo, _ = state.writable(request, names["repo"])
    wanted = await request.json()
    if wanted.get("gated", False) not in (False, "auto", "manual"):
        raise refusals.bad_request("gated is auto, manual or false")
    if "gated" in wanted:
        repo.state.gated = wanted["gated"] or ""
    if "visibility" in wanted:
        repo.state.private = wanted["visibility"] == "private"
    repo.save()
    return answer({"private": repo.state.private, "gated": repo.state.gated or False})


async def requests(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """List who has asked for access, by decision."""
    repo = _gated(state, request, names)
    rows: list[dict[str, Any]] = [
        {
            "user": {"user": user, "fullname": user, "email": f"{user}@localhost"},
            "requestId": hashlib.sha256(user.encode()).hexdigest()[:24],
            "status": decision,
            "timestamp": date_text(0),
        }
        for user, decision in repo.state.access.items()
        if decision == names["decision"]
    ]
    return answer(rows)


async def handle(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Decide about a request."""
    repo = _gated(state, request, names)
    wanted = await request.json()
    user, decision = wanted.get("user"), wanted.get("status")
    if user not in repo.state.access:
        raise refusals.RefusedError(404, f"{user} has not asked for access")
    if decision not in _DECISIONS:
        raise refusals.bad_request(f"Invalid status: {decision!r}")
    repo.state.access[user] = decision
    repo.save()
    return answer({})


async def grant(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Accept a user who has not asked."""
    repo = _gated(state, request, names)
    user = (await request.json())["user"]
    if user not in state.accounts.users:
        raise refusals.RefusedError(404, f"There is no user {user}")
    if user in repo.state.access:
        raise refusals.bad_request(f"{user} has asked for access already")
    repo.state.access[user] = "accepted"
    repo.save()
    return answer({})


def _gated(state: State, request: Request, names: Mapping[str, str]) -> Repository:
    repo, _ = state.writable(request, names["repo"])
    if not repo.state.gated:
        raise refusals.bad_request("This repository is not gated")
    return repo
