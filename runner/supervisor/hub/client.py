"""The Hub, as the rest of the runner sees it: questions that can be repeated, and single writes.

Algorithms are elsewhere: `runner.supervisor.publish` decides what to write and when.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from runner.protocol.errors import HubError
from runner.protocol.repo_ref import RepoRef
from runner.protocol.syntax import is_commit, parse_json
from runner.supervisor.hub.counting import OnDownload
from runner.supervisor.hub.login import Given, Login
from runner.supervisor.hub.preflight import Refs, Target, Wishes, inspect
from runner.supervisor.hub.select import Kind
from runner.supervisor.hub.snapshot import Download, RemoteFile, Snapshot, Traffic, Tree
from runner.supervisor.hub.transport import DEFAULT_TIMEOUT_S, Caller, Patience, install_client
from runner.supervisor.hub.writing import Writing

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MANIFEST = "merge-manifest.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # some repositories hold a copy under other names
MAX_MANIFEST_BYTES = 16 << 20


def connect(
    endpoint: str | None,
    *,
    token: str | None = None,
    login: Login | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    patience: Patience | None = None,
    on_download: OnDownload = lambda _done, _total, _doing: None,
    say: Callable[[str], None] = lambda _line: None,
) -> Hub:
    """Return the Hub at `endpoint`, used with exactly this token or login; nothing is requested yet.

    Args:
        endpoint: address without a path, or None for huggingface_hub's own (`HF_ENDPOINT`, else the public Hub).
        token: an access token, or None for no token at all: one that lies around on the machine is never used.
        login: what gives tokens, instead of `token`.
        timeout_s: longest silence of the server in one request.
        patience: how long failing calls are repeated.
        on_download: told how far each snapshot is: bytes that are there, bytes in all, what is being done. From any
            thread.
        say: told of long waits. From any thread.
    """
    from huggingface_hub import HfApi

    install_client(timeout_s)
    login = login or Given(token)
    api = HfApi(endpoint=endpoint, token=token or False)
    return Hub(api, Caller(login=login, patience=patience or Patience(), say=say), login, on_download)


class Hub(Writing):
    """One Hub with one login."""

    def __init__(self, api: HfApi, caller: Caller, login: Login, on_download: OnDownload) -> None:
        """Take the client, what repeats its calls, what gives their tokens, and who is told; see `connect`."""
        self._api = api
        self._caller = caller
        self.traffic = Traffic()
        self._login = login
        self._on_download = on_download

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"

    def take_new_token(self) -> None:
        """Make the next request with a new token, where the login makes its own."""
        self._login.forget()

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
        info = self._caller.read(
            doing, lambda: self._api.model_info(repo_id, revision=revision, token=self._login.token())
        )
        if not is_commit(str(info.sha)):
            raise _strange(doing, f"{info.sha!r} is not a commit")
        return str(info.sha)

    def snapshot(self, ref: RepoRef, *, kind: Kind, cache_dir: Path, pickles: bool = False) -> Snapshot:
        """Return the model or adapter as a local folder, at a commit that was resolved once.

        Args:
            ref: a local folder (returned as it is), or `owner/name[@revision]`.
            kind: decides which files are needed; see `runner.supervisor.hub.select`.
            cache_dir: where downloads are kept between runs.
            pickles: whether pickled weights are taken where there are no others.

        Raises:
            RunnerError: see `resolve` and `Download.fetch`.
        """
        if ref.path is not None:
            return Snapshot(ref=ref, repo_id=None, commit=None, root=ref.path)
        repo_id, commit = str(ref.repo_id), self.resolve(ref)
        download = Download(
            self._api,
            self._caller,
            repo_id=repo_id,
            commit=commit,
            cache_dir=cache_dir,
            traffic=self.traffic,
            pickles=pickles,
            on_download=self._on_download,
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

    def outline(self, ref: RepoRef, *, cache_dir: Path, pickles: bool = False) -> Snapshot:
        """Return a base as a folder with its headers instead of its weights: enough to plan, and only for that.

        Args:
            ref: a local folder (returned as it is, weights included), or `owner/name[@revision]`.
            cache_dir: where the folder is made.
            pickles: as for `snapshot`; pickled weights come as a whole, because they have no header.

        Raises:
            RunnerError: see `resolve` and `Download.outline`.
        """
        if ref.path is not None:
            return Snapshot(ref=ref, repo_id=None, commit=None, root=ref.path)
        repo_id, commit = str(ref.repo_id), self.resolve(ref)
        download = Download(
            self._api, self._caller, repo_id=repo_id, commit=commit, cache_dir=cache_dir, pickles=pickles
        )
        return Snapshot(ref=ref, repo_id=repo_id, commit=commit, root=download.outline(self.tree(repo_id, commit)))

    def tree(self, repo_id: str, revision: str) -> Tree:
        """Return every file of a repository at `revision`, by path."""
        from huggingface_hub.hf_api import RepoFile

        def listing() -> dict[str, RemoteFile]:
            entries = self._api.list_repo_tree(repo_id, recursive=True, revision=revision, token=self._login.token())
            return {entry.path: _remote_file(entry) for entry in entries if isinstance(entry, RepoFile)}

        return self._caller.read(f"list the files of {repo_id}@{revision[:12]}", listing)

    def refs(self, repo_id: str, *, with_pulls: bool = False) -> Refs:
        """Return the branches and tags of a repository, and on request its pull requests."""
        refs = self._caller.read(
            f"read the refs of {repo_id}",
            lambda: self._api.list_repo_refs(repo_id, include_pull_requests=with_pulls, token=self._login.token()),
        )
        return Refs(
            branches={ref.name: ref.target_commit for ref in refs.branches},
            tags={ref.name: ref.target_commit for ref in refs.tags},
            pulls={ref.ref: ref.target_commit for ref in refs.pull_requests or ()},
        )

    def is_private(self, repo_id: str) -> bool:
        """Return whether only members see the repository, as the Hub says now."""
        info = self._caller.read(
            f"read the visibility of {repo_id}", lambda: self._api.model_info(repo_id, token=self._login.token())
        )
        return bool(info.private)

    def read_manifest(self, repo_id: str, revision: str, tree: Tree | None = None) -> dict[str, Any] | None:
        """Return merge-manifest.json at `revision`, or None where there is none that is a JSON object.

        Args:
            repo_id: `owner/name`.
            revision: a commit or tag.
            tree: the files at that revision, where they are known already.
        """
        content = self.read_file(repo_id, MANIFEST, revision, tree)
        if content is None:
            return None
        try:
            manifest = parse_json(content)
        except ValueError:
            return None
        return manifest if isinstance(manifest, dict) else None

    def read_file(self, repo_id: str, path: str, revision: str, tree: Tree | None = None) -> bytes | None:
        """Return a small file at `revision`, or None where there is none of at most `MAX_MANIFEST_BYTES`.

        Args:
            repo_id: `owner/name`.
            path: of the file.
            revision: a commit or tag.
            tree: the files at that revision, where they are known already.
        """
        entry = (self.tree(repo_id, revision) if tree is None else tree).get(path)
        if entry is None or entry.size_bytes > MAX_MANIFEST_BYTES:
            return None
        with tempfile.TemporaryDirectory() as folder:

            def fetch() -> bytes:
                token = self._login.token()
                there = self._api.hf_hub_download(repo_id, path, revision=revision, token=token, local_dir=folder)
                return Path(there).read_bytes()

            return self._caller.read(f"read {path} of {repo_id}", fetch)

    def history(self, repo_id: str, revision: str) -> tuple[tuple[str, datetime], ...]:
        """Return the commits of a revision with their times (the Hub's clock), newest first."""
        found = self._caller.read(
            f"read the history of {repo_id}@{revision}",
            lambda: self._api.list_repo_commits(repo_id, revision=revision, token=self._login.token()),
        )
        return tuple((commit.commit_id, commit.created_at) for commit in found)

    def open_pulls(self, repo_id: str) -> dict[str, str]:
        """Return the open pull requests, the newest first: `refs/pr/N` → its page."""

        def listing() -> dict[str, str]:
            found = self._api.get_repo_discussions(
                repo_id, discussion_type="pull_request", discussion_status="open", token=self._login.token()
            )
            return {f"refs/pr/{pull.num}": pull.url for pull in found}

        return self._caller.read(f"list the pull requests of {repo_id}", listing)

    def inspect_target(self, repo_id: str, tag: str, wishes: Wishes | None = None) -> Target:
        """Return the state of the repository to publish to; nothing is written. See `hub.preflight`."""
        return inspect(self._api, self._caller, self, self._login, repo_id=repo_id, tag=tag, wishes=wishes or Wishes())


def _remote_file(entry: Any) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs is not None else None
    return RemoteFile(path=entry.path, size_bytes=entry.size, blob_sha1=entry.blob_id, sha256=sha256)


def _strange(doing: str, reason: str) -> HubError:
    return HubError(
        f"Could not {doing}: {reason}.",
        why="The endpoint answers, but not like a Hub.",
        fix="Check `hub-endpoint`.",
    )
