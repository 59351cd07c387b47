"""The Hub, as the rest of the runner sees it: questions that can be repeated, and single writes.

Algorithms are elsewhere: `runner.publish` decides what to write and when.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from runner.errors import HubError, RepoNotFound
from runner.hub.preflight import BRANCH, Refs, Target, inspect
from runner.hub.select import Kind
from runner.hub.snapshot import Download, RemoteFile, Snapshot, Traffic, Tree
from runner.hub.transport import DEFAULT_TIMEOUT_S, Caller, Patience, install_client
from runner.reference import RepoRef
from runner.syntax import is_commit, parse_json

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")
A = TypeVar("A")

MANIFEST = "merge-manifest.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # some repositories hold a copy under other names
MAX_MANIFEST_BYTES = 16 << 20


def connect(
    endpoint: str | None,
    *,
    token: str | None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    patience: Patience | None = None,
) -> Hub:
    """Return the Hub at `endpoint`, used with exactly this token; nothing is requested yet.

    Args:
        endpoint: address without a path, or None for huggingface_hub's own (`HF_ENDPOINT`, else the public Hub).
        token: an access token, or None for no token at all: one that lies around on the machine is never used.
        timeout_s: longest silence of the server in one request.
        patience: how long failing calls are repeated.
    """
    from huggingface_hub import HfApi

    install_client(timeout_s)
    secrets = (token,) if token else ()
    return Hub(HfApi(endpoint=endpoint, token=token or False), Caller(secrets=secrets, patience=patience or Patience()))


class Hub:
    """One Hub with one token."""

    def __init__(self, api: HfApi, caller: Caller) -> None:
        """Take the client (it holds the token) and what repeats its calls; see `connect`."""
        self._api = api
        self._caller = caller
        self.traffic = Traffic()

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"

    @property
    def endpoint(self) -> str:
        """Address of the Hub, without a slash at the end."""
        return str(self._api.endpoint)

    def url(self, repo_id: str, revision: str | None = None) -> str:
        """Return the page of a repository, or of one of its revisions."""
        return f"{self.endpoint}/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")

    def resolve(self, ref: RepoRef) -> str:
        """Return the commit (40 hex digits) that `ref` names now; without a revision the head of its main branch.

        Raises:
            RepoNotFound: no such repository or revision, or the token may not see it.
            HubError: see `Caller.read`.
        """
        repo_id, revision = str(ref.repo_id), ref.revision
        if revision is not None and is_commit(revision):
            return revision
        doing = f"find {ref.display}"
        info = self._caller.read(doing, lambda: self._api.model_info(repo_id, revision=revision, token=self._api.token))
        if not is_commit(str(info.sha)):
            raise _strange(doing, f"{info.sha!r} is not a commit")
        return str(info.sha)

    def snapshot(self, ref: RepoRef, *, kind: Kind, cache_dir: Path) -> Snapshot:
        """Return the model or adapter as a local folder, at a commit that was resolved once.

        Args:
            ref: a local folder (returned as it is), or `owner/name[@revision]`.
            kind: decides which files are needed; see `runner.hub.select`.
            cache_dir: where downloads are kept between runs.

        Raises:
            RunnerError: see `resolve` and `Download.fetch`.
        """
        if ref.path is not None:
            return Snapshot(ref=ref, repo_id=None, commit=None, root=ref.path)
        repo_id, commit = str(ref.repo_id), self.resolve(ref)
        download = Download(
            self._api, self._caller, repo_id=repo_id, commit=commit, cache_dir=cache_dir, traffic=self.traffic
        )
        root = download.fetch(self.tree(repo_id, commit), kind)
        return Snapshot(ref=ref, repo_id=repo_id, commit=commit, root=root)

    def needs(self, ref: RepoRef, *, cache_dir: Path) -> tuple[int, int]:
        """Return the bytes of a base's weights on the Hub, at a commit, and how many of them are not in the cache.

        Raises:
            HubError: the repository cannot be listed.
        """
        repo_id, commit = str(ref.repo_id), self.resolve(ref)
        tree = self.tree(repo_id, commit)
        weights = {path: file for path, file in tree.items() if _WEIGHTS.fullmatch(path)}
        download = Download(self._api, self._caller, repo_id=repo_id, commit=commit, cache_dir=cache_dir)
        return sum(file.size_bytes for file in weights.values()), download.missing_bytes(weights)

    def outline(self, ref: RepoRef, *, cache_dir: Path) -> Snapshot:
        """Return a base as a folder with its headers instead of its weights: enough to plan, and only for that.

        Args:
            ref: a local folder (returned as it is, weights included), or `owner/name[@revision]`.
            cache_dir: where the folder is made.

        Raises:
            RunnerError: see `resolve` and `Download.outline`.
        """
        if ref.path is not None:
            return Snapshot(ref=ref, repo_id=None, commit=None, root=ref.path)
        repo_id, commit = str(ref.repo_id), self.resolve(ref)
        download = Download(self._api, self._caller, repo_id=repo_id, commit=commit, cache_dir=cache_dir)
        return Snapshot(ref=ref, repo_id=repo_id, commit=commit, root=download.outline(self.tree(repo_id, commit)))

    def tree(self, repo_id: str, revision: str) -> Tree:
        """Return every file of a repository at `revision`, by path."""
        from huggingface_hub.hf_api import RepoFile

        def listing() -> dict[str, RemoteFile]:
            entries = self._api.list_repo_tree(repo_id, recursive=True, revision=revision, token=self._api.token)
            return {entry.path: _remote_file(entry) for entry in entries if isinstance(entry, RepoFile)}

        return self._caller.read(f"list the files of {repo_id}@{revision[:12]}", listing)

    def refs(self, repo_id: str) -> Refs:
        """Return the branches and tags of a repository."""
        doing = f"read the refs of {repo_id}"
        refs = self._caller.read(doing, lambda: self._api.list_repo_refs(repo_id, token=self._api.token))
        return Refs(
            branches={ref.name: ref.target_commit for ref in refs.branches},
            tags={ref.name: ref.target_commit for ref in refs.tags},
        )

    def read_manifest(self, repo_id: str, revision: str, tree: Tree | None = None) -> dict[str, Any] | None:
        """Return merge-manifest.json at `revision`, or None where there is none that is a JSON object.

        Args:
            repo_id: `owner/name`.
            revision: a commit or tag.
            tree: the files at that revision, where they are known already.
        """
        entry = (self.tree(repo_id, revision) if tree is None else tree).get(MANIFEST)
        if entry is None or entry.size_bytes > MAX_MANIFEST_BYTES:
            return None
        with tempfile.TemporaryDirectory() as folder:

            def fetch() -> bytes:
                token = self._api.token
                path = self._api.hf_hub_download(repo_id, MANIFEST, revision=revision, token=token, local_dir=folder)
                return Path(path).read_bytes()

            content = self._caller.read(f"read {MANIFEST} of {repo_id}", fetch)
        try:
            manifest = parse_json(content)
        except ValueError:
            return None
        return manifest if isinstance(manifest, dict) else None

    def inspect_target(self, repo_id: str, tag: str) -> Target:
        """Return the state of the repository to publish to; nothing is written. See `runner.hub.preflight`."""
        return inspect(self._api, self._caller, self, repo_id=repo_id, tag=tag)

    def create_repo(self, repo_id: str, *, private: bool) -> None:
        """Create the repository, or find that it is there already; then it can be read."""

        def write() -> bool:
            self._api.create_repo(repo_id, private=private, exist_ok=True, token=self._api.token)
            return True

        def landed(answer: bool | None) -> bool | None:
            del answer
            try:
                self.refs(repo_id)
            except RepoNotFound:
                return None
            return True

        self._caller.settle(f"create {repo_id}", write, landed)

    def preupload(self, repo_id: str, addition: CommitOperationAdd) -> None:
        """Send the content of one large file; it stays invisible until a commit names it. Nothing for small files."""
        self._caller.read(
            f"upload {addition.path_in_repo} to {repo_id}",
            lambda: self._api.preupload_lfs_files(
                repo_id, [addition], token=self._api.token, revision=BRANCH, num_threads=1, free_memory=False
            ),
            attempts=3,  # the client repeats each request itself
        )

    def commit(
        self,
        repo_id: str,
        operations: Sequence[Any],
        *,
        parent: str,
        message: str,
        description: str,
        landed: Callable[[str | None], str | None],
    ) -> str:
        """Make one commit on the branch `main`, and return the commit that `landed` confirms; see `Caller.settle`."""

        def write() -> str:
            info = self._api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                commit_description=description,
                token=self._api.token,
                revision=BRANCH,
                parent_commit=parent,
                num_threads=1,
            )
            return str(info.oid)

        return self._caller.settle(f"commit to {repo_id}", write, landed)

    def create_tag(
        self, repo_id: str, tag: str, commit: str, *, message: str, landed: Callable[[bool | None], str | None]
    ) -> str:
        """Create the tag on `commit`, and return what `landed` confirms; see `Caller.settle`."""

        def write() -> bool:
            self._api.create_tag(repo_id, tag=tag, revision=commit, tag_message=message, token=self._api.token)
            return True

        return self._caller.settle(f"tag {repo_id} with {tag}", write, landed)

    def delete_tag(self, repo_id: str, tag: str, *, landed: Callable[[bool | None], bool | None]) -> None:
        """Delete the tag, until `landed` confirms it; see `Caller.settle`."""

        def write() -> bool:
            self._api.delete_tag(repo_id, tag=tag, token=self._api.token)
            return True

        self._caller.settle(f"delete the tag {tag} of {repo_id}", write, landed)


def _remote_file(entry: Any) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs is not None else None
    return RemoteFile(path=entry.path, size_bytes=entry.size, blob_sha1=entry.blob_id, sha256=sha256)


def _strange(doing: str, reason: str) -> HubError:
    return HubError(
        f"Could not {doing}: {reason}.",
        why="The endpoint answers, but not like a Hub.",
        fix="Check `HF_ENDPOINT`.",
    )
