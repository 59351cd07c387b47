"""The endpoints by name: what faults are injected into, and what is counted."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

from tests.hub import api, cas, commits, discussions, gates, lfs, listing, publishers, resolve
from tests.hub.protocol import Request, Response
from tests.hub.state import State

Handler = Callable[[State, Request, Mapping[str, str]], Awaitable[Response]]
Route = tuple[str, Handler, dict[str, str]]

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REV = r"(?P<rev>[^/]+)"
_NUM = r"(?P<num>\d+)"
_HASH = r"(?P<hash>[0-9a-f]{64})"
_LFS = rf"/{_REPO}\.git/info/lfs"

# Name, method, raw path, handler; the first match wins. Groups are matched while still encoded, so that a tag such as
# v1/beta stays one segment.
_API: tuple[tuple[str, str, str, Handler], ...] = (
    ("whoami", "GET", r"/api/whoami-v2", api.whoami),
    ("exchange", "POST", r"/oauth/token", publishers.exchange),
    ("create-repo", "POST", r"/api/repos/create", api.create),
    ("delete-repo", "DELETE", r"/api/repos/delete", api.delete),
    ("validate-yaml", "POST", r"/api/validate-yaml", commits.validate_yaml),
    ("lfs-complete", "POST", r"/api/complete_multipart", lfs.complete),
    ("info", "GET", _MODEL, api.info),
    ("info", "GET", rf"{_MODEL}/revision/{_REV}", api.info),
    ("auth-check", "GET", rf"{_MODEL}/auth-check", api.auth_check),
    ("auth-check-write", "GET", rf"{_MODEL}/auth-check/write", api.auth_check_write),
    ("preupload", "POST", rf"{_MODEL}/preupload/{_REV}", commits.preupload),
    ("commit", "POST", rf"{_MODEL}/commit/{_REV}", commits.commit),
    ("create-tag", "POST", rf"{_MODEL}/tag/{_REV}", api.create_tag),
    ("delete-tag", "DELETE", rf"{_MODEL}/tag/{_REV}", api.delete_tag),
    ("create-branch", "POST", rf"{_MODEL}/branch/{_REV}", api.create_branch),
    ("delete-branch", "DELETE", rf"{_MODEL}/branch/{_REV}", api.delete_branch),
    ("refs", "GET", rf"{_MODEL}/refs", api.refs),
    ("tree", "GET", rf"{_MODEL}/tree/{_REV}(?:/(?P<path>.*))?", listing.tree),
    ("paths-info", "POST", rf"{_MODEL}/paths-info/{_REV}", listing.paths_info),
    ("commits", "GET", rf"{_MODEL}/commits/{_REV}", listing.commits),
    ("settings", "PUT", rf"{_MODEL}/settings", gates.settings),
    (
        "access-requests",
        "GET",
        rf"{_MODEL}/user-access-request/(?P<decision>pending|accepted|rejected)",
        gates.requests,
    ),
    ("handle-access", "POST", rf"{_MODEL}/user-access-request/handle", gates.handle),
    ("grant-access", "POST", rf"{_MODEL}/user-access-request/grant", gates.grant),
    ("discussions", "GET", rf"{_MODEL}/discussions", discussions.show_all),
    ("create-discussion", "POST", rf"{_MODEL}/discussions", discussions.create),
    ("discussion", "GET", rf"{_MODEL}/discussions/{_NUM}", discussions.show),
    ("comment", "POST", rf"{_MODEL}/discussions/{_NUM}/comment", discussions.comment),
    ("discussion-status", "POST", rf"{_MODEL}/discussions/{_NUM}/status", discussions.status),
    ("merge", "POST", rf"{_MODEL}/discussions/{_NUM}/merge", discussions.merge),
    ("xet-read-token", "GET", rf"{_MODEL}/xet-read-token/{_REV}", cas.read_token),
    ("xet-write-token", "GET", rf"{_MODEL}/xet-write-token/{_REV}", cas.write_token),
    ("lfs-duplicate", "POST", rf"{_MODEL}/lfs-files/duplicate", lfs.duplicate),
    ("lfs-batch", "POST", rf"{_LFS}/objects/batch", lfs.batch),
    ("lfs-verify", "POST", rf"{_LFS}/objects/verify", lfs.verify),
    ("resolve", "GET", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", resolve.resolve),
)
_BLOB_HOST: tuple[tuple[str, str, str, Handler], ...] = (
    ("lfs-put", "PUT", r"/blobs/[^/]+", lfs.put_object),
    ("lfs-part", "PUT", r"/parts/[^/]+", lfs.put_part),
    ("blob", "GET", r"/blobs/[^/]+", lfs.get_object),
    ("xet-chunk", "GET", rf"/v1/chunks/[^/]+/{_HASH}", cas.chunk),
    ("xet-grant", "POST", rf"/v1/xorb-grants/default/{_HASH}", cas.grant),
    ("xet-put", "POST", rf"/v1/xorbs/default/{_HASH}", cas.put_xorb),
    ("xet-head", "HEAD", rf"/v1/xorbs/default/{_HASH}", cas.head_xorb),
    ("xet-shard", "POST", r"/v2/shards", cas.stream_shard),
    ("xet-shard-v1", "POST", r"/v1/shards", cas.put_shard),
    ("xet-file", "GET", rf"/v2/reconstructions/{_HASH}", cas.reconstruction),
    ("xet-file-v1", "GET", rf"/v1/reconstructions/{_HASH}", cas.reconstruction_v1),
    ("xet-get", "GET", rf"/xorbs/{_HASH}", cas.get_xorb),
    ("xet-telemetry", "POST", r"/v1/telemetry", cas.telemetry),
)
ENDPOINTS = frozenset(name for name, *_ in (*_API, *_BLOB_HOST))


def find_route(request: Request, blob_host: str) -> Route | None:
    """Return name, handler and decoded names of the endpoint that a request is for; None where there is none."""
    method = "GET" if request.method == "HEAD" else request.method
    for name, wanted, pattern, handler in _BLOB_HOST if request.host == blob_host else _API:
        found = re.fullmatch(pattern, request.path) if wanted in (method, request.method) else None
        if found is not None:
            names = {key: unquote(text) for key, text in found.groupdict().items() if text is not None}
            return name, handler, names
    return None
