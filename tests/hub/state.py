"""What all handlers share: accounts, repositories, blobs, limits, and who may do what."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from tests.hub import gates, refusals
from tests.hub.accounts import Accounts, Token
from tests.hub.disk import Blobs
from tests.hub.faults import Faults, Kind
from tests.hub.meter import Meter
from tests.hub.protocol import Request
from tests.hub.repos import Repositories, Repository
from tests.hub.xetstore import XetStore

if TYPE_CHECKING:
    from tests.hub.publishers import Publisher


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes at which the Hub changes its behaviour; tests make them small.

    Attributes:
        multipart_threshold_bytes: LFS files of this size or more are uploaded in parts.
        part_size_bytes: of each part but the last.
        lfs_threshold_bytes: files of this size or more go to LFS whatever their name.
        page_entries: entries on a page of a listing (a twentieth of it when expanded).
        api_calls: allowed in each window; 0 for no limit.
        window_s: length of such a window.
        xet_token_s: how long a token of the Xet storage is valid.
        publisher_token_s: how long a token is valid that a trusted publisher got.
        xet_knows_chunks: whether the storage tells clients which chunks it has already.
    """

    multipart_threshold_bytes: int = 64 << 20
    part_size_bytes: int = 16 << 20
    lfs_threshold_bytes: int = 10 << 20
    page_entries: int = 1000
    api_calls: int = 0
    window_s: float = 300.0
    xet_token_s: float = 3600.0
    publisher_token_s: float = 3600.0
    xet_knows_chunks: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request that was answered.

    Attributes:
        endpoint: its name; '' for a request that this server does not know.
        method: upper case.
        path: raw, without the query.
        query: decoded.
        status: of the answer; 0 if the connection was broken.
        received_bytes: of the request's body.
        sent_bytes: of the answer's body.
        signed_in: whether it carried an Authorization header.
        routed: False for a request that this server does not know.
    """

    endpoint: str
    method: str
    path: str
    query: Mapping[str, list[str]]
    status: int
    received_bytes: int
    sent_bytes: int
    signed_in: bool
    routed: bool


@dataclass(slots=True, kw_only=True)
class State:
    """One Hub.

    Attributes:
        endpoint: URL of the API.
        blob_endpoint: URL of the blob host; another origin, so that clients must not send their token there.
        blob_host: its host name.
        xet: whether clients may use the Xet protocol; else only LFS.
        publishers: which jobs get a token without having one.
        storage_bytes: how much each namespace may store; those that are not here, anything.
        log: all exchanges so far.
    """

    accounts: Accounts
    repos: Repositories
    blobs: Blobs
    limits: Limits
    endpoint: str
    blob_endpoint: str
    blob_host: str
    xet: bool
    xet_store: XetStore
    publishers: list[Publisher] = field(default_factory=list)
    storage_bytes: dict[str, int] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    log: list[Exchange] = field(default_factory=list)
    meter: Meter = field(init=False)
    _expired: set[str] = field(default_factory=set)
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    def __post_init__(self) -> None:
        self.meter = Meter(calls=self.limits.api_calls, window_s=self.limits.window_s)

    def caller(self, request: Request) -> Token | None:
        """Return whose request it is; refuses unknown tokens."""
        authorization = request.headers.get("authorization")
        if authorization is not None and request.is_hit(Kind.EXPIRED):
            self.accounts.revoke(authorization.partition(" ")[2])
        return self.accounts.identify(authorization)

    def signed_in(self, request: Request) -> Token:
        """Return whose request it is; refuses anonymous ones."""
        token = self.caller(request)
        if token is None:
            raise refusals.not_signed_in()
        return token

    def readable(self, request: Request, repo_id: str) -> Repository:
        """Return a repository; one that the caller may not see is answered like one that is not there."""
        token = self.caller(request)
        repo = self.repos.get(repo_id)
        if repo is not None and request.is_hit(Kind.STALE):
            repo = repo.before()
        if repo is not None and not repo.state.private:
            return repo
        if token is None:
            # Over https the client takes any such 401 for an absent repository; over http it needs to be told.
            raise refusals.not_signed_in(code="RepoNotFound")
        if repo is None or not self.accounts.may_read(token, repo_id):
            raise refusals.repo_not_found()
        return repo

    def downloadable(self, request: Request, repo_id: str) -> Repository:
        """Return a repository whose files the caller may read; gated ones only to members and accepted users."""
        repo = self.readable(request, repo_id)
        if repo.state.gated:
            refusal = gates.refusal(self.accounts, repo, self.caller(request), self.endpoint)
            if refusal is not None:
                raise refusal
        return repo

    def writable(self, request: Request, repo_id: str) -> tuple[Repository, Token]:
        """Return a repository that the caller may change, and the caller."""
        repo = self.readable(request, repo_id)
        token = self.signed_in(request)
        if not self.accounts.may_write(token, repo_id, repo.state.creator):
            if token.role == "read":
                raise refusals.forbidden("Forbidden: you must use a write token to upload to a repository.")
            raise refusals.forbidden(f"Forbidden: this token has no write access to {repo_id}.")
        return repo, token

    def discussable(self, request: Request, repo_id: str) -> tuple[Repository, Token]:
        """Return a repository on which the caller may open discussions and pull requests, and the caller."""
        repo = self.readable(request, repo_id)
        token = self.signed_in(request)
        if not self.accounts.may_discuss(token, repo_id):
            raise refusals.forbidden(f"Forbidden: this token may not discuss {repo_id}.")
        return repo, token

    def committable(self, request: Request, repo_id: str, revision: str) -> tuple[Repository, Token]:
        """Return a repository to whose branch or pull request the caller may push, and the caller."""
        if request.flag("create_pr"):
            return self.discussable(request, repo_id)
        if revision.startswith("refs/pr/"):
            repo, token = self.discussable(request, repo_id)
            number = revision.removeprefix("refs/pr/")
            mine = [pull for pull in repo.state.discussions if str(pull["num"]) == number]
            if mine and mine[0]["author"]["name"] == token.user:
                return repo, token
        return self.writable(request, repo_id)

    def room_bytes(self, repo_id: str) -> int | None:
        """Return how many more bytes of large files the namespace of a repository may store; None for any number."""
        namespace = repo_id.partition("/")[0]
        if namespace not in self.storage_bytes:
            return None
        stored = self.repos.root.glob(f"{namespace}/*/lfs/*")
        return self.storage_bytes[namespace] - sum(self.blobs.large_path(path.name).stat().st_size for path in stored)

    def signed_url(self, base: str, path: str, **fields: str) -> str:
        """Return a URL that needs no token: its fields are covered by a signature."""
        fields["nonce"] = secrets.token_hex(8)
        query = urlencode({**fields, "signature": self.signature(path, fields)})
        return f"{base}{quote(path)}?{query}"

    def signed_fields(self, request: Request) -> dict[str, str]:
        """Return the fields of a signed URL; refuses a wrong signature, and a token sent to where none belongs."""
        if "authorization" in request.headers:
            raise refusals.bad_request("Only one auth mechanism allowed; a signed URL must come without Authorization")
        fields = {name: values[0] for name, values in request.query.items()}
        signature = fields.pop("signature", "")
        if not hmac.compare_digest(signature, self.signature(request.path, fields)):
            raise refusals.forbidden("The signature of this URL does not match")
        if request.is_hit(Kind.EXPIRED):
            self.expire(signature)
        if self.is_expired(signature):
            raise refusals.forbidden("Request has expired")
        return fields

    def expire(self, signature: str) -> None:
        """Refuse from now on what carries this signature."""
        self._expired.add(signature)

    def is_expired(self, signature: str) -> bool:
        """Return whether something that was signed has expired."""
        return signature in self._expired

    def signature(self, path: str, fields: Mapping[str, str]) -> str:
        """Return the signature of a URL or token."""
        text = path + "?" + urlencode(sorted(fields.items()))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()
