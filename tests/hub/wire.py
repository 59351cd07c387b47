"""The server's end of a TCP connection: real resets, and orderly ends in the wrong place.

An ASGI application cannot break its connection: one that raises is answered with a 500. So the protocol class of the
server hands the application its transport. With `SO_LINGER` 0 closing it makes the kernel send RST.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_TRANSPORT = "transport"


class Protocol(H11Protocol):  # type: ignore[misc]  # uvicorn is not followed
    """uvicorn's HTTP/1.1 with the transport in each request's scope."""

    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a new connection."""
        self.app_state = {**self.app_state, _TRANSPORT: transport}
        super().connection_made(transport)


class Connection:
    """The connection that a request came over."""

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        self._transport: asyncio.Transport = scope["state"][_TRANSPORT]

    async def end(self, *, orderly: bool) -> None:
        """End it now: with RST, or with FIN where it is to be orderly; what was written before is sent first."""
        while self._transport.get_write_buffer_size() > 0 and not self._transport.is_closing():
            await asyncio.sleep(0.001)
        connected: socket.socket = self._transport.get_extra_info("socket")
        if orderly:
            self._transport.close()
        else:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
