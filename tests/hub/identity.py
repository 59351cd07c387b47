"""A fake identity provider on a loopback socket: what a job on GitHub asks for its id token, and its public keys."""

from __future__ import annotations

import http.server
import json
import secrets
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.hub.jwt import Key, sign

LIFETIME_S = 300


class IdentityProvider:
    """A running provider; use `start`, and `with` or `stop`.

    Attributes:
        issuer: its address, which is the claim `iss` of its tokens.
        claims: what it says about the job; tests may change it between two requests.
        lifetime_s: of the tokens that it makes from now on.
    """

    def __init__(self, claims: Mapping[str, str]) -> None:
        self.claims = dict(claims)
        self.lifetime_s = LIFETIME_S
        self.minted = 0
        self._refusals: list[int] = []
        self._key = Key.make()
        self._request_token = secrets.token_hex(16)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.issuer = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @classmethod
    def start(
        cls, repository: str, *, ref: str = "refs/heads/main", workflow: str = "publish.yml", event: str = "release"
    ) -> Self:
        """Return a provider for a job of a workflow of a repository.

        Args:
            repository: `owner/name` on GitHub.
            ref: full name of what the workflow runs for.
            workflow: file name in `.github/workflows`.
            event: what started it.
        """
        path = f"{repository}/.github/workflows/{workflow}@{ref}"
        provider = cls(
            {
                "sub": f"repo:{repository}:ref:{ref}",
                "repository": repository,
                "repository_owner": repository.partition("/")[0],
                "ref": ref,
                "ref_type": "tag" if ref.startswith("refs/tags/") else "branch",
                "workflow": "Publish",
                "workflow_ref": path,
                "job_workflow_ref": path,
                "event_name": event,
                "run_id": "1",
            }
        )
        provider._thread.start()
        return provider

    def mint(self, audience: str, **more: Any) -> str:
        """Return an id token for an audience; `more` replaces claims."""
        now_s = int(time.time())
        times = {"iat": now_s, "nbf": now_s - 5, "exp": now_s + self.lifetime_s}
        self.minted += 1
        return sign({"iss": self.issuer, "aud": audience, **times, **self.claims, **more}, self._key)

    def refuse(self, status: int, *, times: int) -> None:
        """Answer the next `times` requests for an id token with `status`."""
        self._refusals = [status] * times

    def env(self) -> dict[str, str]:
        """Return what a job with `permissions: id-token: write` has in its environment."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.issuer}/token?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self._request_token,
        }

    def stop(self) -> None:
        """Close the socket and end the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, Any]]:
        place = urlsplit(path)
        if place.path == "/.well-known/openid-configuration":
            return 200, {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/.well-known/jwks"}
        if place.path == "/.well-known/jwks":
            return 200, {"keys": [self._key.jwk()]}
        if place.path != "/token":
            return 404, {"message": "not found"}
        if authorization != f"Bearer {self._request_token}":
            return 401, {"message": "unauthorized"}
        if self._refusals:
            return self._refusals.pop(), {"message": "refused on demand"}
        audience = parse_qs(place.query).get("audience", ["https://github.com/"])[0]
        return 200, {"count": 1, "value": self.mint(audience)}

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, value = provider._answer(self.path, self.headers.get("Authorization"))
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any, **more: Any) -> None:
                """Keep the tests' output free of it."""

        return Handler
