"""The Xet protocol: tokens of the Hub for its storage, and the storage's own calls on the blob host."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from tests.hub import refusals
from tests.hub.faults import Kind
from tests.hub.protocol import Request, Response, answer, byte_ranges, file_answer
from tests.hub.reconstruction import Fetch, Span, reconstruct
from tests.hub.repos import Repository
from tests.hub.state import State

_SHARD_LIMIT_BYTES = 64 << 20
_XORB_LIMIT_BYTES = 64 << 20


async def read_token(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Give a token that reads the files of one repository."""
    repo = state.downloadable(request, names["repo"])
    repo.resolve(names["rev"])
    return _token(state, repo, "read")


async def write_token(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Give a token that adds files to one repository."""
    repo, _ = state.committable(request, names["repo"], names["rev"])
    if not request.flag("create_pr"):  # the client then writes None where the revision stands
        repo.resolve(names["rev"])
    return _token(state, repo, "write")


def _token(state: State, repo: Repository, scope: str) -> Response:
    if not state.xet:
        raise refusals.RefusedError(404, "Xet storage is not available on this server")
    expires_s = int(time.time() + state.limits.xet_token_s)
    fields = {"repo": repo.repo_id, "scope": scope, "exp": str(expires_s), "nonce": secrets.token_hex(4)}
    signed = {**fields, "signature": state.signature("xet", fields)}
    token = "xet_" + base64.urlsafe_b64encode(json.dumps(signed).encode()).decode()
    headers = {
        "X-Xet-Cas-Url": state.blob_endpoint,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires_s),
    }
    return answer({"casUrl": state.blob_endpoint, "accessToken": token, "exp": expires_s}, headers=headers)


def _authorized(state: State, request: Request, scope: str) -> Repository:
    """Return the repository that a storage token is for; refuses unknown, expired and too narrow ones."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    try:
        fields: dict[str, str] = json.loads(base64.urlsafe_b64decode(token.removeprefix("xet_")))
        signature = fields.pop("signature")
    except (binascii.Error, ValueError, KeyError):
        raise refusals.RefusedError(401, "Unauthorized") from None
    if request.is_hit(Kind.EXPIRED):
        state.expire(signature)
    known = kind.lower() == "bearer" and signature == state.signature("xet", fields)
    if not known or state.is_expired(signature) or int(fields["exp"]) <= time.time():
        raise refusals.RefusedError(401, "Unauthorized")
    if scope == "write" and fields["scope"] != "write":
        raise refusals.forbidden("This token only reads")
    repo = state.repos.get(fields["repo"])
    if repo is None:
        raise refusals.repo_not_found()
    return repo


async def chunk(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say which xorb holds a chunk, for any repository of this Hub."""
    _authorized(state, request, "read")
    shard = state.xet_store.chunk_shard(names["hash"]) if state.limits.xet_knows_chunks else None
    if shard is None:
        raise refusals.RefusedError(404, "This chunk is not known")
    return Response(body=shard, headers={"Content-Type": "application/octet-stream"})


async def put_xorb(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Take a xorb; refuses bytes that are none."""
    _authorized(state, request, "write")
    body = await request.body()
    if len(body) > _XORB_LIMIT_BYTES:
        raise refusals.bad_request("The xorb is larger than 64 MiB")
    try:
        inserted = await asyncio.to_thread(state.xet_store.put_xorb, names["hash"], body)
    except ValueError as error:
        raise refusals.bad_request(f"Not a xorb: {error}") from None
    return answer({"was_inserted": inserted})


async def grant(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Refuse to name another place to send a xorb to; clients then send it here."""
    raise refusals.RefusedError(404, "Xorbs are sent to this server")


async def head_xorb(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say whether a xorb is here, and how large it is."""
    _authorized(state, request, "read")
    path = state.xet_store.xorb_path(names["hash"])
    if not path.exists():
        raise refusals.RefusedError(404, "This xorb is not known")
    return file_answer(request, path, {"Content-Type": "application/octet-stream"})


async def put_shard(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Take a shard: its files are from now on in the repository; refuses what its xorbs do not hold."""
    return answer({"result": await _registered(state, request)})


async def stream_shard(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Do the same with an answer of one event for each stage; a refusal is the last event of an answer 200."""
    events: list[dict[str, object]]
    try:
        events = [{"type": "committing", "stage": "syncing"}, {"type": "result", "result": 0}]
        events[-1]["result"] = await _registered(state, request)
    except refusals.RefusedError as refusal:
        if refusal.status != 400:
            raise
        events = [{"type": "error", "message": refusal.message}]
    body = "".join(f"{json.dumps(event)}\n" for event in events).encode()
    return Response(body=body, headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-cache"})


async def _registered(state: State, request: Request) -> int:
    repo = _authorized(state, request, "write")
    body = await request.body()
    if len(body) > _SHARD_LIMIT_BYTES:
        raise refusals.bad_request("The shard is too large")
    try:
        files = await asyncio.to_thread(state.xet_store.put_shard, body)
    except ValueError as error:
        raise refusals.bad_request(f"The shard is refused: {error}") from None
    room = state.room_bytes(repo.repo_id)
    new = {sha256 for _, sha256 in files if not repo.has_large(sha256)}
    if room is not None and sum(state.blobs.large_path(sha256).stat().st_size for sha256 in new) > room:
        raise refusals.storage_full()
    for xet_hash, sha256 in files:
        repo.mark_large(sha256, xet_hash)
        file = state.xet_store.file(xet_hash)
        if request.is_hit(Kind.DAMAGED) and file is not None:
            state.xet_store.rot(file.terms[-1].xorb)
            state.blobs.rot(sha256)
    return 1


async def reconstruction(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say which chunks make up a file or a range of it, with one signed URL for each xorb."""
    offset, terms, fetches = _plan(state, request, names["hash"])
    xorbs: dict[str, list[dict[str, Any]]] = {}
    for fetch in fetches:
        rows = [{"chunks": _span(part.chunks), "bytes": _inclusive(part.bytes)} for part in fetch.parts]
        url = _signed(state, fetch.xorb, [part.bytes for part in fetch.parts])
        xorbs[fetch.xorb] = [{"url": url, "ranges": rows}]
    return answer({"offset_into_first_range": offset, "terms": terms, "xorbs": xorbs})


async def reconstruction_v1(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say the same as older storages do: one signed URL for each range of a xorb."""
    offset, terms, fetches = _plan(state, request, names["hash"])
    info = {
        fetch.xorb: [
            {
                "range": _span(part.chunks),
                "url": _signed(state, fetch.xorb, [part.bytes]),
                "url_range": _inclusive(part.bytes),
            }
            for part in fetch.parts
        ]
        for fetch in fetches
    }
    return answer({"offset_into_first_range": offset, "terms": terms, "fetch_info": info})


def _plan(state: State, request: Request, xet_hash: str) -> tuple[int, list[dict[str, Any]], list[Fetch]]:
    repo = _authorized(state, request, "read")
    file = state.xet_store.file(xet_hash)
    if file is None or not repo.has_large(str(file.sha256)):
        raise refusals.RefusedError(404, "This file is not known")
    size_bytes = sum(term.size_bytes for term in file.terms)
    wanted = request.byte_ranges(size_bytes)
    if wanted is not None and len(wanted) != 1:
        raise refusals.RefusedError(416, "The range starts behind the end of the file")
    start, end = (0, size_bytes) if wanted is None else wanted[0]
    offset, kept, fetches = reconstruct(file.terms, state.xet_store.chunks, start=start, end=end)
    terms = [
        {"hash": term.xorb, "unpacked_length": term.size_bytes, "range": _span((term.start, term.end))} for term in kept
    ]
    return offset, terms, fetches


def _span(span: Span) -> dict[str, int]:
    return {"start": span[0], "end": span[1]}


def _inclusive(span: Span) -> dict[str, int]:
    return {"start": span[0], "end": span[1] - 1}


def _signed(state: State, xorb: str, spans: list[Span]) -> str:
    ranges = ",".join(f"{start}-{end - 1}" for start, end in spans)
    return state.signed_url(state.blob_endpoint, f"/xorbs/{xorb}", **{"X-Xet-Signed-Range": f"bytes={ranges}"})


async def get_xorb(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Serve ranges of a xorb that lie in those that the URL was signed for."""
    fields = state.signed_fields(request)
    path = state.xet_store.xorb_path(names["hash"])
    size_bytes = path.stat().st_size
    signed = byte_ranges(fields["X-Xet-Signed-Range"], size_bytes)
    wanted = request.byte_ranges(size_bytes)
    if not wanted or not all(any(first <= start and end <= last for first, last in signed) for start, end in wanted):
        raise refusals.forbidden("The URL was signed for other ranges")
    return file_answer(request, path, {"Content-Type": "application/octet-stream"})


async def telemetry(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Take what clients tell about themselves, and forget it."""
    return answer({})
