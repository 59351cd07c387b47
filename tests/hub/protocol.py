"""HTTP as the handlers see it: a request with its raw path, a response that is bytes or a part of a file."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.hub import refusals
from tests.hub.faults import Kind, Rule

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_BLOCK_BYTES = 1 << 20


class ClientGoneError(Exception):
    """The client closed the connection in the middle of its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """Bytes `start` to `end` (not included) of a file."""

    path: Path
    start: int
    end: int


@dataclass(slots=True, kw_only=True)
class Response:
    """What is sent back.

    Attributes:
        status: HTTP status.
        body: bytes, or a part of a file that is streamed.
        headers: without Content-Length, which follows from the body.
    """

    status: int = 200
    body: bytes | FilePart = b""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Length of the body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.end - self.body.start


@dataclass(slots=True, kw_only=True)
class Request:
    """What came in.

    Attributes:
        method: upper case.
        host: of the Host header, without the port.
        path: raw, still percent-encoded, without the query.
        query: decoded; values by name.
        headers: by lower-case name.
        received_bytes: of the body, so far.
        rule: the injected fault that the handler has to carry out, or None.
    """

    method: str
    host: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    received_bytes: int = 0
    rule: Rule | None = None
    _receive: Receive
    _done: bool = False

    @classmethod
    def of(cls, scope: Message, receive: Receive) -> Request:
        """Return the request of an ASGI scope."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        return cls(
            method=scope["method"],
            host=headers.get("host", "").rsplit(":", 1)[0],
            path=scope["raw_path"].decode("latin-1").split("?")[0],
            query=parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True),
            headers=headers,
            _receive=receive,
        )

    def flag(self, name: str) -> bool:
        """Return whether a query parameter is set to something true."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def first(self, name: str) -> str | None:
        """Return the first value of a query parameter."""
        return next(iter(self.query.get(name, ())), None)

    def is_hit(self, kind: Kind) -> bool:
        """Return whether a fault of this kind is to be carried out."""
        return self.rule is not None and self.rule.kind is kind

    def byte_ranges(self, size_bytes: int) -> list[tuple[int, int]] | None:
        """Return the byte ranges (the end not included) that are asked for of something of this size.

        None where no range is asked for; those that lie outside are left out.
        """
        wanted = self.headers.get("range")
        if wanted is None:
            return None
        return byte_ranges(wanted, size_bytes)

    async def read_until(self, size_bytes: int) -> None:
        """Read the body until so much of it is here, or all."""
        async for _ in self.blocks():
            if self.received_bytes >= size_bytes:
                return

    async def wait_until_gone(self) -> None:
        """Return when the client has closed the connection, or the server has."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives."""
        while not self._done:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            self._done = not message.get("more_body", False)
            block = message.get("body", b"")
            self.received_bytes += len(block)
            yield block

    async def body(self) -> bytes:
        """Return the whole body."""
        return b"".join([block async for block in self.blocks()])

    async def json(self) -> dict[str, Any]:
        """Return the body as a JSON object; refuses anything else."""
        try:
            value = json.loads(await self.body())
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise refusals.bad_request("The body is not a JSON object")
        return value


def answer(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(
        status=status,
        body=json.dumps(value).encode(),
        headers={"Content-Type": "application/json; charset=utf-8", **(headers or {})},
    )


def refusal_answer(refusal: refusals.RefusedError) -> Response:
    """Return an error as the Hub sends it: in the headers and in the JSON body."""
    headers = {"X-Error-Message": " ".join(refusal.message.split()), **refusal.headers}
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    return answer({"error": refusal.message, **refusal.extra}, status=refusal.status, headers=headers)


def file_answer(request: Request, path: Path, headers: Mapping[str, str]) -> Response:
    """Return a file, or the byte ranges of it that were asked for; 416 when they lie outside."""
    size_bytes = path.stat().st_size
    sent = {"Accept-Ranges": "bytes", **headers}
    spans = request.byte_ranges(size_bytes)
    if spans is None:
        return Response(body=FilePart(path=path, start=0, end=size_bytes), headers=sent)
    if not spans:
        return Response(status=416, headers={**sent, "Content-Range": f"bytes */{size_bytes}"})
    if len(spans) > 1:
        return _parts_answer(path, spans, sent)
    start, end = spans[0]
    sent["Content-Range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    return Response(status=206, body=FilePart(path=path, start=start, end=end), headers=sent)


def _parts_answer(path: Path, spans: Sequence[tuple[int, int]], headers: Mapping[str, str]) -> Response:
    content = path.read_bytes()
    boundary = secrets.token_hex(16)
    body = b""
    for start, end in spans:
        head = f"\r\n--{boundary}\r\nContent-Range: bytes {start}-{end - 1}/{len(content)}\r\n\r\n"
        body += head.encode() + content[start:end]
    body = body.removeprefix(b"\r\n") + f"\r\n--{boundary}--\r\n".encode()
    sent = {**headers, "Content-Type": f"multipart/byteranges; boundary={boundary}"}
    return Response(status=206, body=body, headers=sent)


def byte_ranges(wanted: str, size_bytes: int) -> list[tuple[int, int]]:
    """Return what a `Range` header asks for, as `Request.byte_ranges`."""
    unit, _, text = wanted.partition("=")
    spans = [_span(part, size_bytes) for part in text.split(",")] if unit.strip() == "bytes" else []
    return [span for span in spans if span is not None]


def _span(wanted: str, size_bytes: int) -> tuple[int, int] | None:
    first, dash, last = wanted.strip().partition("-")
    if not dash or not (first + last).isdigit():
        return None
    if not first:
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(size_bytes, int(last) + 1) if last else size_bytes
    return (start, end) if start < end else None


async def send_response(response: Response, send: Send, *, head: bool) -> None:
    """Send a response; for HEAD only what precedes the body."""
    await send({"type": "http.response.start", "status": response.status, "headers": _raw_headers(response)})
    if isinstance(response.body, FilePart) and not head:
        left = response.body.end - response.body.start
        with response.body.path.open("rb") as file:
            file.seek(response.body.start)
            while left > 0 and (block := file.read(min(_BLOCK_BYTES, left))):
                left -= len(block)
                await send({"type": "http.response.body", "body": block, "more_body": True})
    small = response.body if isinstance(response.body, bytes) and not head else b""
    await send({"type": "http.response.body", "body": small, "more_body": False})


async def send_half(response: Response, send: Send) -> None:
    """Send the head of a response and the first half of its body."""
    half = response.size_bytes // 2
    await send({"type": "http.response.start", "status": response.status, "headers": _raw_headers(response)})
    if isinstance(response.body, bytes):
        block = response.body[:half]
    else:
        with response.body.path.open("rb") as file:
            file.seek(response.body.start)
            block = file.read(half)
    await send({"type": "http.response.body", "body": block, "more_body": True})


def _raw_headers(response: Response) -> list[tuple[bytes, bytes]]:
    headers = {"Content-Length": str(response.size_bytes), **response.headers}
    return [(name.lower().encode("latin-1"), text.encode("latin-1", "replace")) for name, text in headers.items()]
