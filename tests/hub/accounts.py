"""Users, organisations and tokens, and what each token may do."""

from __future__ import annotations

import hashlib
import json
import secrets
import string
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, Literal

from tests.hub import refusals
from tests.hub.disk import write_atomically

Role = Literal["read", "write", "fineGrained"]
Scope = tuple[str, str, list[str]]

_READ_ROLES = frozenset({"read", "contributor", "write", "admin"})
_WRITE_ROLES = frozenset({"write", "admin"})
_CREATE_ROLES = _WRITE_ROLES | {"contributor"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One access token, without its secret text.

    Attributes:
        user: who it belongs to.
        role: read, write or fineGrained.
        scoped: for fineGrained: (entity type, entity name, permissions), the type being model, user or org.
        reads_gated: for fineGrained: whether it may read gated repositories that are not in its scopes.
        publisher: `repo` or `user` for a token that a trusted publisher got, else ''. It has what `scoped` says and
            no membership; one of a user reads public and gated files only.
        expires_s: when it expires, in seconds since 1970; None for never.
    """

    user: str
    role: Role
    scoped: tuple[Scope, ...] = ()
    reads_gated: bool = False
    publisher: Literal["", "repo", "user"] = ""
    expires_s: float | None = None

    def grants(self, permission: str, repo_id: str) -> bool:
        """Return whether a fine-grained scope gives `permission` on the repository; writing includes reading."""
        namespace = repo_id.partition("/")[0]
        wanted = {permission, "repo.write"} if permission == "repo.content.read" else {permission}
        return any(
            wanted & set(permissions) and (name == repo_id if kind == "model" else name == namespace)
            for kind, name, permissions in self.scoped
        )


@dataclass(slots=True, kw_only=True)
class Accounts:
    """All accounts of one Hub; kept in `file`, with tokens only as their sha256."""

    file: Path
    users: set[str] = field(default_factory=set)
    orgs: dict[str, dict[str, str]] = field(default_factory=dict)
    _tokens: dict[str, Token] = field(default_factory=dict)
    _lock: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        if not self.file.exists():
            return
        known = json.loads(self.file.read_text())
        self.users = set(known["users"])
        self.orgs = known["orgs"]
        for digest, token in known["tokens"].items():
            scoped = tuple((kind, name, permissions) for kind, name, permissions in token.pop("scoped"))
            self._tokens[digest] = Token(**token, scoped=scoped)

    def add_user(self, name: str) -> None:
        """Add a user; adding one twice changes nothing."""
        with self._lock:
            self.users.add(name)
            self._save()

    def add_org(self, name: str, members: Mapping[str, str]) -> None:
        """Add an organisation, or replace its members (user to role: read, contributor, write, admin)."""
        with self._lock:
            self.orgs[name] = dict(members)
            self._save()

    def add_token(self, token: Token, *, prefix: str = "hf_") -> str:
        """Return the text of a new token; it is kept nowhere else."""
        if token.publisher != "repo" and token.user not in self.users:
            raise ValueError(f"no user {token.user!r}")
        text = prefix + "".join(secrets.choice(string.ascii_letters) for _ in range(34))
        with self._lock:
            self._tokens[_digest(text)] = token
            self._save()
        return text

    def revoke(self, text: str) -> None:
        """Forget a token, if it is known."""
        with self._lock:
            self._tokens.pop(_digest(text), None)
            self._save()

    def identify(self, authorization: str | None) -> Token | None:
        """Return whose request it is, None if anonymous; refuses a token that is not known or has expired."""
        if authorization is None:
            return None
        kind, _, text = authorization.partition(" ")
        token = self._tokens.get(_digest(text.strip()))
        if kind.lower() != "bearer" or token is None or (token.expires_s or time.time() + 1) <= time.time():
            raise refusals.wrong_token()
        return token

    def role_in(self, token: Token, namespace: str) -> str | None:
        """Return the role of the token's user in a namespace; `admin` in their own, None in a foreign one."""
        if namespace == token.user:
            return "admin"
        return self.orgs.get(namespace, {}).get(token.user)

    def may_read(self, token: Token, repo_id: str) -> bool:
        """Return whether a token sees a private repository."""
        if token.publisher:
            return token.grants("repo.content.read", repo_id)
        if self.role_in(token, repo_id.partition("/")[0]) not in _READ_ROLES:
            return False
        return token.role != "fineGrained" or token.grants("repo.content.read", repo_id)

    def is_member(self, token: Token, repo_id: str) -> bool:
        """Return whether the token's user belongs to the namespace of a repository."""
        return self.role_in(token, repo_id.partition("/")[0]) in _READ_ROLES

    def may_write(self, token: Token, repo_id: str, creator: str) -> bool:
        """Return whether a token may change a repository; contributors only what they created."""
        if token.publisher:
            return token.grants("repo.write", repo_id)
        role = self.role_in(token, repo_id.partition("/")[0])
        allowed = role in _WRITE_ROLES or (role == "contributor" and creator == token.user)
        if token.role == "fineGrained":
            return allowed and token.grants("repo.write", repo_id)
        return allowed and token.role == "write"

    def may_discuss(self, token: Token, repo_id: str) -> bool:
        """Return whether a token may open discussions and pull requests on a repository that it sees."""
        if token.role == "fineGrained":
            return token.grants("discussion.write", repo_id) or token.grants("repo.write", repo_id)
        return token.role == "write"

    def may_create(self, token: Token, namespace: str) -> bool:
        """Return whether a token may create repositories in a namespace; scopes on one model do not suffice."""
        if self.role_in(token, namespace) not in _CREATE_ROLES:
            return False
        if token.role == "fineGrained":
            return token.grants("repo.write", f"{namespace}/")
        return token.role == "write"

    def whoami(self, token: Token) -> dict[str, Any]:
        """Return the body of `whoami-v2`."""
        access: dict[str, Any] = {"displayName": f"{token.user}-{token.role}", "role": token.role}
        if token.role == "fineGrained":
            access["fineGrained"] = {
                "canReadGatedRepos": token.reads_gated,
                "global": [],
                "scoped": [
                    {"entity": {"_id": _digest(name)[:24], "type": kind, "name": name}, "permissions": permissions}
                    for kind, name, permissions in token.scoped
                ],
            }
        orgs = [
            {"type": "org", "id": _digest(name)[:24], "name": name, "fullname": name, "roleInOrg": members[token.user]}
            for name, members in sorted(self.orgs.items())
            if token.user in members
        ]
        return {
            "type": "user",
            "id": _digest(token.user)[:24],
            "name": token.user,
            "fullname": token.user,
            "isPro": False,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }

    def _save(self) -> None:
        tokens = {digest: asdict(token) for digest, token in self._tokens.items()}
        write_atomically(self.file, json.dumps({"users": sorted(self.users), "orgs": self.orgs, "tokens": tokens}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
