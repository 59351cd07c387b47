"""Files out: small ones directly, large ones by a redirect to the blob host."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from tests.hub import refusals
from tests.hub.protocol import Request, Response, file_answer
from tests.hub.state import State


async def resolve(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Answer HEAD or GET of `/<repo>/resolve/<revision>/<path>`."""
    repo = state.downloadable(request, names["repo"])
    commit = repo.resolve(names["rev"])
    path = names["path"]
    entry = repo.tree(commit).get(path)
    if entry is None:
        raise refusals.entry_not_found(path, commit)
    name = path.rpartition("/")[2]
    headers = {
        "X-Repo-Commit": commit,
        "X-Linked-Size": str(entry.size_bytes),
        "ETag": f'"{entry.digest}"',
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}",
    }
    if entry.sha256 is None:
        del headers["X-Linked-Size"]
        headers["Content-Type"] = "text/plain; charset=utf-8"
        return file_answer(request, state.blobs.small_path(entry.oid), headers)
    headers["X-Linked-ETag"] = f'"{entry.sha256}"'
    xet_hash = repo.xet_hash(entry.sha256) if state.xet else None
    if xet_hash is not None:
        route = f"{state.endpoint}/api/models/{repo.repo_id}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
    headers["Location"] = state.signed_url(
        state.blob_endpoint, f"/blobs/{entry.sha256}", oid=entry.sha256, repo=repo.repo_id, filename=quote(name)
    )
    body = f"Found. Redirecting to {headers['Location']}".encode()
    return Response(status=302, body=body, headers={**headers, "Content-Type": "text/plain; charset=utf-8"})
