"""Changes: what goes to LFS, and one commit out of a stream of JSON lines."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tests.hub import cards, pulls, refusals
from tests.hub.faults import Kind
from tests.hub.gitobjects import Entry, checked_path, lfs_entry
from tests.hub.protocol import Request, Response, answer
from tests.hub.repos import Repository, Tree, stale_parent
from tests.hub.state import State

ATTRIBUTES = ".gitattributes"
IGNORE = ".gitignore"
_LFS_RULE = "filter=lfs diff=lfs merge=lfs -text"
# What the Hub puts into the .gitattributes of a new model; the bytes are the same.
_LFS_PATTERNS = (
    "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel",
    "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl",
    "*.pt", "*.pth", "*.rar", "*.safetensors", "saved_model/**/*", "*.tar.*", "*.tar", "*.tflite", "*.tgz",
    "*.wasm", "*.xz", "*.zip", "*.zst", "*tfevents*",
)  # fmt: skip


def first_tree(state: State) -> Tree:
    """Return the files of a new repository: `.gitattributes`, as on the Hub."""
    content = "".join(f"{pattern} {_LFS_RULE}\n" for pattern in _LFS_PATTERNS).encode()
    return {ATTRIBUTES: Entry(oid=state.blobs.put_small(content), size_bytes=len(content))}


async def validate_yaml(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Judge a card: 400 if its metadata is wrong."""
    errors, warnings = cards.judge((await request.json())["content"])
    body: dict[str, Any] = {
        "errors": [{"message": text} for text in errors],
        "warnings": [{"message": text} for text in warnings],
    }
    return answer(body, status=400 if errors else 200)


async def preupload(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Say for each file whether it goes to LFS, and what the branch holds under its path."""
    repo, _ = state.committable(request, names["repo"], names["rev"])
    tree = repo.tree(names["rev"])
    body = await request.json()
    wanted = body["files"]
    if len(wanted) > 256:
        raise refusals.bad_request("At most 256 files per call")
    rules = _lfs_rules(state, tree)
    ignored = _ignore_rules(body.get("gitIgnore", _text(state, tree, IGNORE)))
    if request.rule is not None and request.is_hit(Kind.IGNORED):
        ignored.append(request.rule.file)
    files = []
    for file in wanted:
        path = checked_path(file["path"])
        large = (
            _matches(path, rules)
            or file["size"] >= state.limits.lfs_threshold_bytes
            or not _is_text(base64.b64decode(file["sample"]))
        )
        known = tree.get(path)
        files.append(
            {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": _matches(path, ignored),
                "oid": known.digest if known else None,
            }
        )
    return answer({"files": files, "commitOid": repo.resolve(names["rev"])})


async def commit(state: State, request: Request, names: Mapping[str, str]) -> Response:
    """Apply a commit to a branch or pull request, whole or not at all; with `create_pr`, to a new pull request."""
    repo, token = state.committable(request, names["repo"], names["rev"])
    create_pr = request.flag("create_pr")
    header, changes = _parsed(await request.body())
    branch = names["rev"].removeprefix("refs/heads/")
    with repo.lock:
        head = _parent(repo, branch, header.get("parentCommit"), create_pr=create_pr)
        tree = repo.tree(head)
        rules = _lfs_rules(state, tree)
        for kind, value in changes:
            _apply(state, repo, tree, kind, value, head)
        if request.rule is not None and request.is_hit(Kind.DAMAGED) and request.rule.file in tree:
            tree[request.rule.file] = _damaged(state, repo, tree[request.rule.file])
        if request.rule is not None and request.is_hit(Kind.DROPPED):
            tree.pop(request.rule.file, None)
        _refuse_file_as_folder(tree)
        _extend_attributes(state, tree, rules, changes)
        title, description = header["summary"], header.get("description", "")
        if create_pr:
            branch = pulls.open_pull(repo, title=title, description=description, author=token.user, start=head)
        made = repo.add_commit(
            branch=branch, parent=head, tree=tree, title=title, message=description, author=token.user
        )
        pulls.note_commit(repo, branch, made)
    url = f"{state.endpoint}/{repo.repo_id}"
    body = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    if create_pr:
        body["pullRequestUrl"] = f"{url}/discussions/{branch.removeprefix('refs/pr/')}"
    return answer(body)


def _parent(repo: Repository, branch: str, wanted: str | None, *, create_pr: bool) -> str:
    """Return the commit to build on; refuses one that is not the head, except for a new pull request."""
    if create_pr:
        return repo.resolve(wanted or branch)
    repo.refuse_protected(branch if branch.startswith("refs/") else f"refs/heads/{branch}")
    head = repo.heads(branch).get(branch)
    if head is None:
        raise refusals.revision_not_found(branch)
    if wanted is not None and not (len(wanted) >= 7 and head.startswith(wanted)):
        raise stale_parent()
    return head


def _parsed(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        rows = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise refusals.bad_request("The commit is not a sequence of JSON lines with key and value") from None
    if not rows or rows[0][0] != "header" or not rows[0][1].get("summary"):
        raise refusals.bad_request("The commit has no header with a summary")
    return rows[0][1], rows[1:]


def _apply(state: State, repo: Repository, tree: Tree, kind: str, value: dict[str, Any], head: str) -> None:
    path = checked_path(value.get("path", "").rstrip("/"))
    if kind == "file":
        tree[path] = _small_file(state, path, value)
    elif kind == "lfsFile":
        tree[path] = _large_file(state, repo, path, value)
    elif kind == "deletedFile":
        if tree.pop(path, None) is None:
            raise refusals.entry_not_found(path, head)
    elif kind == "deletedFolder":
        inside = [name for name in tree if name.startswith(f"{path}/")]
        if not inside:
            raise refusals.entry_not_found(path, head)
        for name in inside:
            del tree[name]
    else:
        raise refusals.bad_request(f"Unknown operation {kind!r}")


def _small_file(state: State, path: str, value: Mapping[str, Any]) -> Entry:
    content = value["content"].encode()
    if value.get("encoding") == "base64":
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error:
            raise refusals.bad_request(f"The content of {path} is not base64") from None
    if len(content) >= state.limits.lfs_threshold_bytes:
        raise refusals.bad_request(f"Your push was rejected because {path} is larger than 10 MiB; use LFS")
    if path == "README.md" and (errors := cards.judge(content.decode(errors="replace"))[0]):
        raise refusals.bad_request("Invalid metadata in README.md: " + "; ".join(errors))
    return Entry(oid=state.blobs.put_small(content), size_bytes=len(content))


def _large_file(state: State, repo: Repository, path: str, value: Mapping[str, Any]) -> Entry:
    sha256 = value["oid"]
    if value.get("algo", "sha256") != "sha256" or not repo.has_large(sha256):
        raise refusals.bad_request(
            "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
            f"For instance, this can happen if you used git push --no-verify. Offending file: {path}"
        )
    size_bytes = state.blobs.large_path(sha256).stat().st_size
    if value.get("size", size_bytes) != size_bytes:
        raise refusals.bad_request(f"The LFS pointer {path} has size {value['size']}, its object {size_bytes}")
    return lfs_entry(sha256, size_bytes)


def _damaged(state: State, repo: Repository, entry: Entry) -> Entry:
    """Return the entry of other content than that of `entry`, of the same size where it is large."""
    if entry.sha256 is None:
        content = state.blobs.small_path(entry.oid).read_bytes() + b"\n"
        return Entry(oid=state.blobs.put_small(content), size_bytes=len(content))
    sha256 = state.blobs.flipped(entry.sha256)
    repo.mark_large(sha256)
    return lfs_entry(sha256, entry.size_bytes)


def stored(state: State, repo: Repository, path: str, source: Path) -> Entry:
    """Return the entry of a local file that is stored as if it had been uploaded as `path`."""
    content = source.read_bytes()
    large = len(content) >= state.limits.lfs_threshold_bytes or _matches(path, _LFS_PATTERNS)
    if not large and _is_text(content):
        return Entry(oid=state.blobs.put_small(content), size_bytes=len(content))
    sha256 = state.blobs.put_large(content)
    repo.mark_large(sha256)
    return lfs_entry(sha256, len(content))


def _lfs_rules(state: State, tree: Tree) -> list[str]:
    lines = [line.split() for line in _text(state, tree, ATTRIBUTES).splitlines()]
    return [words[0] for words in lines if "filter=lfs" in words[1:]]


def _ignore_rules(text: str) -> list[str]:
    """Return the patterns of a `.gitignore`; exceptions (`!`) are not read."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "!"))]


def _text(state: State, tree: Tree, path: str) -> str:
    entry = tree.get(path)
    return state.blobs.small_path(entry.oid).read_text() if entry else ""


def _matches(path: str, rules: Iterable[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatch(path if "/" in rule else name, rule.lstrip("/")) for rule in rules)


def _is_text(sample: bytes) -> bool:
    if b"\0" in sample:
        return False
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        # The sample may end inside a character.
        return error.start >= len(sample) - 3 and error.reason == "unexpected end of data"
    return True


def _refuse_file_as_folder(tree: Tree) -> None:
    for path in tree:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in tree:
                raise refusals.bad_request(f"{parent} is a file and a folder at once")
            parent = parent.rpartition("/")[0]


def _extend_attributes(state: State, tree: Tree, rules: list[str], changes: list[tuple[str, dict[str, Any]]]) -> None:
    """Add a rule for each LFS file that none covers, as the Hub does (a large tokenizer.json, for example)."""
    if any(value["path"] == ATTRIBUTES for _, value in changes):
        return
    paths = [value["path"] for kind, value in changes if kind == "lfsFile" and not _matches(value["path"], rules)]
    if not paths:
        return
    entry = tree.get(ATTRIBUTES)
    content = state.blobs.small_path(entry.oid).read_bytes() if entry else b""
    content += "".join(f"{path} {_LFS_RULE}\n" for path in paths).encode()
    tree[ATTRIBUTES] = Entry(oid=state.blobs.put_small(content), size_bytes=len(content))
