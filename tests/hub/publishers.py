"""Trusted publishers: an id token of a CI provider in exchange for a short-lived token of the Hub (RFC 8693)."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.hub import jwt, refusals
from tests.hub.accounts import Token
from tests.hub.protocol import Request, Response, answer
from tests.hub.state import State

_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
SYSTEM_USER = "[OIDC]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """Jobs that may get a token for a resource.

    Attributes:
        resource: `owner/name` of a model, or a user name.
        issuer: address of the identity provider.
        claims: `repository`, `branch`, `workflow` and so on; each must be equal.
    """

    resource: str
    issuer: str
    claims: Mapping[str, str]

    def accepts(self, told: Mapping[str, Any]) -> bool:
        """Return whether the claims of an id token are those that are wanted."""
        return told.get("iss") == self.issuer and all(
            _claim(told, name) == wanted for name, wanted in self.claims.items()
        )


def _claim(told: Mapping[str, Any], name: str) -> object:
    if name == "branch":
        ref = str(told.get("ref", ""))
        return ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else None
    if name == "workflow":
        return str(told.get("workflow_ref", "")).partition("@")[0].rpartition("/")[2]
    return told.get(name)


async def exchange(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Give a token for a resource to a job that one of its publishers accepts."""
    wanted = await request.json()
    subject, resource = wanted.get("subject_token"), wanted.get("resource")
    if wanted.get("grant_type") != _GRANT or wanted.get("subject_token_type") != _ID_TOKEN:
        raise _refused("invalid_request", "grant_type or subject_token_type is not supported")
    if not isinstance(subject, str) or not isinstance(resource, str) or resource.count("/") > 1 or not resource:
        raise _refused("invalid_request", "subject_token or resource is missing or malformed")
    publishers = [publisher for publisher in state.publishers if publisher.resource == resource]
    if not publishers or ("/" in resource and state.repos.get(resource) is None):
        raise _refused("invalid_grant", f"No trusted publisher for {resource}")
    await _check(state, subject, publishers)
    lifetime_s = state.limits.publisher_token_s
    expires_s = time.time() + lifetime_s
    if "/" in resource:
        scope = ("model", resource, ["repo.write", "repo.content.read"])
        token = Token(user=SYSTEM_USER, role="fineGrained", scoped=(scope,), publisher="repo", expires_s=expires_s)
        text = state.accounts.add_token(token, prefix="hf_jwt_")
    else:
        token = Token(user=resource, role="read", publisher="user", expires_s=expires_s)
        text = state.accounts.add_token(token, prefix="hf_oauth_")
    body = {"access_token": text, "token_type": "bearer", "expires_in": int(lifetime_s)}
    return answer({**body, "issued_token_type": _ACCESS_TOKEN})


async def _check(state: State, subject: str, publishers: list[Publisher]) -> None:
    try:
        claims = jwt.claims_of(subject)
    except ValueError:
        raise _refused("invalid_grant", "The subject token is not a JSON Web Token") from None
    issuers = {publisher.issuer for publisher in publishers}
    if claims.get("iss") not in issuers:
        raise _refused("invalid_grant", "No publisher matches this issuer")
    if not jwt.is_signed_by(subject, await asyncio.to_thread(_keys, claims["iss"])):
        raise _refused("invalid_grant", "The signature of the subject token is wrong")
    if claims.get("aud") != state.endpoint:
        raise _refused("invalid_grant", "The subject token is for another audience")
    if not claims.get("nbf", 0) <= time.time() < claims.get("exp", 0):
        raise _refused("invalid_grant", "The subject token has expired, or is not valid yet")
    if not any(publisher.accepts(claims) for publisher in publishers):
        raise _refused("invalid_grant", "The claims of the subject token do not match")


def _keys(issuer: str) -> list[dict[str, str]]:
    """Return the keys that an issuer publishes; only issuers that a publisher names are asked."""
    found = _fetch(f"{issuer}/.well-known/openid-configuration")
    keys: list[dict[str, str]] = _fetch(found["jwks_uri"])["keys"]
    return keys


def _fetch(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answered:  # noqa: S310  # a loopback address given by the test
            value: dict[str, Any] = json.loads(answered.read())
            return value
    except OSError as error:
        raise _refused("invalid_grant", f"The issuer cannot be reached: {error}") from None


def _refused(error: str, message: str) -> refusals.RefusedError:
    return refusals.RefusedError(400, message, extra={"error": error, "error_description": message})
