"""The ASGI application: routes on the raw path, faults, and the log of what was asked."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from tests.hub import api, commits, lfs, listing, refusals, resolve
from tests.hub.faults import Fault
from tests.hub.protocol import (
    ClientGoneError,
    Message,
    Receive,
    Request,
    Response,
    Send,
    drop_connection,
    refusal_answer,
    send_response,
)
from tests.hub.state import Exchange, State

Handler = Callable[[State, Request, Mapping[str, str]], Awaitable[Response]]
Route = tuple[Handler, dict[str, str]]

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REV = r"(?P<rev>[^/]+)"
_LFS = rf"/{_REPO}\.git/info/lfs"

# The first match wins. Groups are matched while still encoded, so that a tag such as v1/beta stays one segment.
_API: tuple[tuple[str, str, Handler], ...] = (
    ("GET", r"/api/whoami-v2", api.whoami),
    ("POST", r"/api/repos/create", api.create),
    ("DELETE", r"/api/repos/delete", api.delete),
    ("POST", r"/api/validate-yaml", commits.validate_yaml),
    ("POST", r"/api/complete_multipart", lfs.complete),
    ("GET", _MODEL, api.info),
    ("GET", rf"{_MODEL}/revision/{_REV}", api.info),
    ("GET", rf"{_MODEL}/auth-check", api.auth_check),
    ("GET", rf"{_MODEL}/auth-check/write", api.auth_check_write),
    ("POST", rf"{_MODEL}/preupload/{_REV}", commits.preupload),
    ("POST", rf"{_MODEL}/commit/{_REV}", commits.commit),
    ("POST", rf"{_MODEL}/tag/{_REV}", api.create_tag),
    ("DELETE", rf"{_MODEL}/tag/{_REV}", api.delete_tag),
    ("POST", rf"{_MODEL}/branch/{_REV}", api.create_branch),
    ("DELETE", rf"{_MODEL}/branch/{_REV}", api.delete_branch),
    ("GET", rf"{_MODEL}/refs", api.refs),
    ("GET", rf"{_MODEL}/tree/{_REV}(?:/(?P<path>.*))?", listing.tree),
    ("POST", rf"{_MODEL}/paths-info/{_REV}", listing.paths_info),
    ("GET", rf"{_MODEL}/commits/{_REV}", listing.commits),
    ("GET", rf"{_MODEL}/xet-(?:read|write)-token/{_REV}", api.xet_token),
    ("POST", rf"{_LFS}/objects/batch", lfs.batch),
    ("POST", rf"{_LFS}/objects/verify", lfs.verify),
    ("GET", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", resolve.resolve),
)
_BLOB_HOST: tuple[tuple[str, str, Handler], ...] = (
    ("PUT", r"/blobs/[^/]+", lfs.put_object),
    ("PUT", r"/parts/[^/]+", lfs.put_part),
    ("GET", r"/blobs/[^/]+", lfs.get_object),
)


def _route(request: Request, blob_host: str) -> Route | None:
    method = "GET" if request.method == "HEAD" else request.method
    for wanted, pattern, handler in _BLOB_HOST if request.host == blob_host else _API:
        found = re.fullmatch(pattern, request.path) if wanted == method else None
        if found is not None:
            return handler, {name: unquote(text) for name, text in found.groupdict().items() if text is not None}
    return None


@dataclass(slots=True)
class App:
    """One Hub as an ASGI application."""

    state: State

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        with contextlib.suppress(ClientGoneError):
            await self._exchange(Request.of(scope, receive), send)

    async def _exchange(self, request: Request, send: Send) -> None:
        route = _route(request, self.state.blob_host)
        fault = self.state.faults.take(request.method, request.path)
        if fault is None:
            response = await self._serve(request, route)
        else:
            response = await self._fail(request, route, fault)
        # A server that answers before it has read the body breaks the connection under the client's hands.
        await request.body()
        dropped = fault is not None and fault.drop
        self.state.log.append(
            Exchange(
                method=request.method,
                path=request.path,
                query=request.query,
                status=0 if dropped else response.status,
                received_bytes=request.received_bytes,
                sent_bytes=0 if dropped or request.method == "HEAD" else response.size_bytes,
                signed_in="authorization" in request.headers,
                routed=route is not None,
            )
        )
        if dropped:
            await drop_connection(send)
        else:
            await send_response(response, send, head=request.method == "HEAD")

    async def _fail(self, request: Request, route: Route | None, fault: Fault) -> Response:
        await asyncio.sleep(fault.delay_s)
        if fault.status == 0:
            return await self._serve(request, route)
        if fault.after_apply:
            await self._serve(request, route)
        error = refusals.RefusedError(fault.status, f"Injected fault: {fault.status}", headers=fault.headers)
        return refusal_answer(error)

    async def _serve(self, request: Request, route: Route | None) -> Response:
        try:
            if route is None:
                self.state.caller(request)
                raise refusals.RefusedError(404, f"Sorry, we can't find the page you are looking for: {request.path}")
            handler, names = route
            return await handler(self.state, request, names)
        except refusals.RefusedError as refusal:
            return refusal_answer(refusal)
