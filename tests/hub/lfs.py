"""Large files in: the LFS batch call, one PUT or several, completion, verification; and out again by range."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from math import ceil
from typing import Any
from urllib.parse import unquote

from tests.hub import refusals
from tests.hub.disk import write_atomically
from tests.hub.faults import Kind
from tests.hub.protocol import Request, Response, answer, file_answer
from tests.hub.repos import Repository
from tests.hub.state import State

MEDIA_TYPE = "application/vnd.git-lfs+json"


async def batch(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say for each object whether it is here already, and if not, where to send it."""
    wanted = await request.json()
    repo = _receiver(state, request, names["repo"], wanted.get("ref"))
    if wanted.get("operation") != "upload" or wanted.get("hash_algo", "sha256") != "sha256":
        raise refusals.bad_request("Only uploads by sha256 are served")
    transfers = wanted.get("transfers", ["basic"])
    objects = [_instruction(state, repo, item, multipart="multipart" in transfers) for item in wanted["objects"]]
    room = state.room_bytes(repo.repo_id)
    missing = sum(item["size"] for item in objects if "actions" in item)
    if request.is_hit(Kind.QUOTA) or (room is not None and missing > room):
        full = {"error": {"code": 403, "message": refusals.storage_full().message}}
        objects = [{"oid": item["oid"], "size": item["size"], **full} for item in wanted["objects"]]
    parted = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in objects)
    body = {"transfer": "multipart" if parted else "basic", "objects": objects}
    return answer(body, headers={"Content-Type": MEDIA_TYPE})


def _receiver(state: State, request: Request, repo_id: str, ref: Mapping[str, str] | None) -> Repository:
    """Return the repository that takes the objects.

    Without a reference they may be for a pull request, and whoever may open one may send them.
    """
    if ref is None:
        return state.discussable(request, repo_id)[0]
    return state.committable(request, repo_id, unquote(ref["name"]))[0]


def _instruction(state: State, repo: Repository, item: Mapping[str, Any], *, multipart: bool) -> dict[str, Any]:
    oid, size = item["oid"], item["size"]
    told: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if len(oid) != 64 or not set(oid) <= set("0123456789abcdef"):
        return {**told, "error": {"code": 422, "message": "The oid is not a sha256"}}
    if repo.has_large(oid):
        return told
    fields = {"repo": repo.repo_id, "oid": oid, "size": str(size)}
    if multipart and size >= state.limits.multipart_threshold_bytes:
        upload = _parted(state, size, fields)
    else:
        upload = {"href": state.signed_url(state.blob_endpoint, f"/blobs/{oid}", **fields)}
    verify = {"href": f"{state.endpoint}/{repo.repo_id}.git/info/lfs/objects/verify"}
    return {**told, "actions": {"upload": upload, "verify": verify}}


def _parted(state: State, size: int, fields: Mapping[str, str]) -> dict[str, Any]:
    part_size = min(state.limits.part_size_bytes, state.limits.multipart_threshold_bytes)
    upload = secrets.token_hex(16)
    header = {"chunk_size": str(part_size)}
    for number in range(1, ceil(size / part_size) + 1):
        length = min(part_size, size - (number - 1) * part_size)
        part = {"upload": upload, "part": str(number), "length": str(length)}
        header[f"{number:05d}"] = state.signed_url(state.blob_endpoint, f"/parts/{fields['oid']}", **part)
    href = state.signed_url(state.endpoint, "/api/complete_multipart", **fields, upload=upload)
    return {"href": href, "header": header}


async def put_object(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Take a whole object; refuses bytes that do not match its sha256 and size."""
    fields = state.signed_fields(request)
    oid = fields["oid"]
    with state.blobs.incoming() as incoming:
        async for block in request.blocks():
            incoming.write(block)
        incoming.store(state.blobs.large_path(oid), sha256=oid, size_bytes=int(fields["size"]))
    _arrived(state, request, fields)
    return Response(headers={"ETag": f'"{oid}"'})


async def put_part(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Take one part; refuses one of the wrong length."""
    fields = state.signed_fields(request)
    content = await request.body()
    if len(content) != int(fields["length"]):
        raise refusals.bad_request(f"Part {fields['part']} has {len(content)} bytes, not {fields['length']}")
    write_atomically(state.blobs.part_path(fields["upload"], int(fields["part"])), content)
    return Response(headers={"ETag": f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'})


async def complete(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Join the parts; refuses missing parts, wrong ETags and bytes that do not match sha256 and size."""
    fields = state.signed_fields(request)
    wanted = await request.json()
    oid, upload = fields["oid"], fields["upload"]
    if wanted.get("oid") != oid:
        raise refusals.bad_request("The completion is for another object")
    with state.blobs.incoming() as incoming:
        for number, part in enumerate(wanted["parts"], start=1):
            path = state.blobs.part_path(upload, number)
            content = path.read_bytes() if path.exists() else b""
            if part != {"partNumber": number, "etag": f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'}:
                raise refusals.bad_request(f"Part {number} is missing or has another ETag")
            incoming.write(content)
        incoming.store(state.blobs.large_path(oid), sha256=oid, size_bytes=int(fields["size"]))
    state.blobs.drop_parts(upload)
    _arrived(state, request, fields)
    return answer({"success": True})


def _arrived(state: State, request: Request, fields: Mapping[str, str]) -> None:
    if request.is_hit(Kind.DAMAGED):
        state.blobs.rot(fields["oid"])
    repo = state.repos.get(fields["repo"])
    if repo is None:
        raise refusals.repo_not_found()
    repo.mark_large(fields["oid"])


async def verify(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Confirm that an object is here with the size that the client thinks."""
    repo, _ = state.discussable(request, names["repo"])
    wanted = await request.json()
    path = state.blobs.large_path(wanted["oid"])
    if not repo.has_large(wanted["oid"]) or path.stat().st_size != wanted["size"]:
        raise refusals.RefusedError(404, "The object is not here, or has another size")
    return answer({}, headers={"Content-Type": MEDIA_TYPE})


async def duplicate(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Give files of one repository to another one, without sending them."""
    source = state.downloadable(request, names["repo"])
    wanted = await request.json()
    target, _ = state.writable(request, wanted["target"]["name"])
    failed = []
    for file in wanted["files"]:
        if source.has_large(file["sha256"]):
            target.mark_large(file["sha256"], file["xetHash"])
        else:
            failed.append({"sha256": file["sha256"], "error": "Not in this repository"})
    return answer({"success": not failed, "failed": failed})


async def get_object(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Serve an object from the blob host, whole or a range of it."""
    fields = state.signed_fields(request)
    headers = {
        "ETag": f'"{fields["oid"]}"',
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f'attachment; filename="{fields["filename"]}"',
    }
    return file_answer(request, state.blobs.large_path(fields["oid"]), headers)
