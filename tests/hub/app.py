"""The ASGI application: one exchange from request to answer, with the faults and the log of what was asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from tests.hub import refusals
from tests.hub.faults import Kind, Rule
from tests.hub.protocol import (
    ClientGoneError,
    Message,
    Receive,
    Request,
    Response,
    Send,
    refusal_answer,
    send_half,
    send_response,
)
from tests.hub.routes import Route, find_route
from tests.hub.state import Exchange, State
from tests.hub.wire import Connection


@dataclass(slots=True)
class App:
    """One Hub as an ASGI application."""

    state: State

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request.of(scope, receive)
        route = find_route(request, self.state.blob_host)
        rule = self.state.faults.take(route[0] if route else "", request.method, request.path)
        with contextlib.suppress(ClientGoneError):
            if rule is not None and rule.ends_connection:
                await self._break(request, route, rule, Connection(scope), send)
            else:
                await self._exchange(request, route, rule, send)

    async def _exchange(self, request: Request, route: Route | None, rule: Rule | None, send: Send) -> None:
        request.rule = rule
        limited = self.state.meter.refusal() if request.path.startswith("/api/") else None
        if limited is not None:
            response = refusal_answer(limited)
        elif rule is not None and rule.kind in (Kind.STATUS, Kind.APPLIED_STATUS):
            if rule.kind is Kind.APPLIED_STATUS:
                await self._serve(request, route)
            response = refusal_answer(_injected(rule))
        else:
            if rule is not None:
                await asyncio.sleep(rule.delay_s)
            response = await self._serve(request, route)
        # A server that answers before it has read the body breaks the connection under the client's hands.
        await request.body()
        if request.path.startswith("/api/"):
            response.headers = {**self.state.meter.headers(), **response.headers}
        self._log(request, route, response)
        await send_response(response, send, head=request.method == "HEAD")

    async def _break(self, request: Request, route: Route | None, rule: Rule, wire: Connection, send: Send) -> None:
        """Carry out as much of the exchange as the rule says, and end the connection."""
        response: Response | None = None
        if rule.kind is Kind.RESET_IN:
            await request.read_until(rule.after_bytes)
        elif rule.kind in (Kind.RESET_AFTER, Kind.SILENT):
            await request.body()
        elif rule.kind in (Kind.APPLIED_RESET, Kind.RESET_ANSWER):
            response = await self._serve(request, route)
            await request.body()
        self._log(request, route, None)
        if rule.kind is Kind.RESET_ANSWER and response is not None:
            await send_half(response, send)
        if rule.kind is not Kind.SILENT:
            await wire.end(orderly=rule.orderly)
        await request.wait_until_gone()

    def _log(self, request: Request, route: Route | None, response: Response | None) -> None:
        sent = 0 if response is None or request.method == "HEAD" else response.size_bytes
        self.state.log.append(
            Exchange(
                endpoint=route[0] if route else "",
                method=request.method,
                path=request.path,
                query=request.query,
                status=0 if response is None else response.status,
                received_bytes=request.received_bytes,
                sent_bytes=sent,
                signed_in="authorization" in request.headers,
                routed=route is not None,
            )
        )

    async def _serve(self, request: Request, route: Route | None) -> Response:
        try:
            if route is None:
                if request.host != self.state.blob_host:
                    self.state.caller(request)
                raise refusals.RefusedError(404, f"Sorry, we can't find the page you are looking for: {request.path}")
            name, handler, names = route
            if request.is_hit(Kind.QUOTA) and name != "lfs-batch":
                raise refusals.storage_full()
            return await handler(self.state, request, names)
        except refusals.RefusedError as refusal:
            return refusal_answer(refusal)


_TEXTS: Mapping[int, str] = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you are not allowed to do this.",
    412: "A commit has happened since. Please refresh and try again.",
    429: "We had to rate limit you, you hit the quota of api requests.",
}


def _injected(rule: Rule) -> refusals.RefusedError:
    headers = rule.headers
    if rule.status == 429 and not headers:
        headers = {"Retry-After": "1", "RateLimit": '"api";r=0;t=1'}
    text = str(rule.body.get("error_description") or _TEXTS.get(rule.status, "Injected fault"))
    return refusals.RefusedError(rule.status, text, extra=rule.body, headers=headers)
