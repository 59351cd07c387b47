"""A repository at one commit, as a local folder that holds exactly what was selected, every file checked.

The files come through huggingface_hub's cache. Since that cache is shared (another tool may have put more files at the
same commit), a snapshot is a folder of relative links beside it: same commit, same selection, same folder.
Every file is held against the tree that the Hub lists: sha256 for large files, git's blob id for the others. A file
that does not match is fetched again once. What was checked is noted, so that a cached base is hashed once, not per run.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.files.layout import read_weight_map
from runner.files.pickled import PICKLED_INDEX
from runner.files.sidecars.files import MAX_COMPANION_BYTES, check_size
from runner.files.sidecars.folders import module_folders
from runner.files.sidecars.names import MODULES, is_weights
from runner.protocol.errors import BrokenCheckpoint, HubError, NotEnoughDisk
from runner.protocol.repo_ref import RepoRef
from runner.protocol.syntax import parse_json
from runner.supervisor.hub.counting import Meter, OnDownload
from runner.supervisor.hub.headers_only import write_stand_in
from runner.supervisor.hub.select import Kind, check_adapter, companions, seen_only, weights_or_index
from runner.supervisor.hub.transport import Caller

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DOWNLOAD_THREADS = 4
SPARE_DISK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A model or adapter on this machine.

    Attributes:
        ref: what was asked for.
        repo_id: `owner/name`, or None for a local folder.
        commit: 40 hex digits, or None for a local folder.
        root: the folder; for a repository its files are links.
    """

    ref: RepoRef
    repo_id: str | None
    commit: str | None
    root: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a repository at one commit, as the Hub lists it.

    Attributes:
        path: in the repository, with forward slashes.
        size_bytes: of the content.
        blob_sha1: git's id; for a large file that of its pointer, which says nothing about the content.
        sha256: of the content for a large file, else None.
    """

    path: str
    size_bytes: int
    blob_sha1: str
    sha256: str | None

    @property
    def digest(self) -> str:
        """What names the content: sha256 of a large file, git's blob id of another."""
        return self.sha256 or self.blob_sha1


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Bytes of files that were wanted so far: found in the cache, and downloaded."""

    hit_bytes: int = 0
    miss_bytes: int = 0


Tree = Mapping[str, RemoteFile]


class Download:
    """One repository at one commit, on its way into the cache."""

    def __init__(
        self,
        api: HfApi,
        caller: Caller,
        *,
        repo_id: str,
        commit: str,
        cache_dir: Path,
        traffic: Traffic | None = None,
        pickles: bool = False,
        on_download: OnDownload = lambda _done, _total, _doing: None,
    ) -> None:
        """Take the client, the repository at a commit, the cache, who counts bytes, and whether pickles will do."""
        self._api, self._caller, self._on_download = api, caller, on_download
        self._traffic, self._pickles = traffic or Traffic(), pickles
        self._repo_id, self._commit, self._cache = repo_id, commit, cache_dir
        self._named = f"{repo_id}@{commit[:12]}"

    def fetch(self, tree: Tree, kind: Kind) -> Path:
        """Return the folder with the files of `tree` that `kind` needs, downloaded and checked.

        Raises:
            AdapterError, CheckpointError: the repository cannot be what it is used as.
            NotEnoughDisk: the files do not fit into the cache's file system.
            HubError: it could not be downloaded, or is not what the Hub lists.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        wanted = {path: tree[path] for path in self._select(tree, kind)}
        missing_bytes = self.missing_bytes(wanted)
        self._check_space(missing_bytes)
        self._download(tuple(wanted), missing_bytes)
        self._traffic.miss_bytes += missing_bytes
        self._traffic.hit_bytes += sum(file.size_bytes for file in wanted.values()) - missing_bytes
        view = self._cache / "views" / self._repo_id.replace("/", "--") / f"{self._commit}-{kind}"
        with _alone(view.with_name(f"{view.name}.lock")):  # another job may share the cache
            self._check(wanted, view.with_name(f"{view.name}.json"))
            self._link(wanted, view, seen_only(tree, kind, wanted))
        return view

    def missing_bytes(self, wanted: Tree) -> int:
        """Return how much of `wanted` is not in the cache."""
        blobs = self._cache / f"models--{self._repo_id.replace('/', '--')}" / "blobs"
        return sum(file.size_bytes for file in wanted.values() if not (blobs / file.digest).exists())

    def outline(self, tree: Tree) -> Path:
        """Return the base's folder with headers instead of weights; see `runner.supervisor.hub.headers_only`.

        Raises:
            CheckpointError: the repository is no base.
            HubError: it could not be downloaded.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        paths = self._select(tree, "base")
        weights = [path for path in paths if path.endswith(".safetensors") and "/" not in path]
        texts = {path: tree[path] for path in paths if path not in weights}
        view = self._cache / "views" / self._repo_id.replace("/", "--") / f"{self._commit}-outline"
        self._download(tuple(texts))
        self._link(texts, view, seen_only(tree, "base", paths))
        for path in weights:
            write_stand_in(view / path, self._header(path), tree[path].size_bytes)
        return view

    def _header(self, path: str) -> Any:
        return self._caller.read(
            f"read the header of {path} of {self._named}",
            lambda: self._api.parse_safetensors_file_metadata(
                self._repo_id, path, revision=self._commit, token=self._api.token
            ),
        )

    def _select(self, tree: Tree, kind: Kind) -> tuple[str, ...]:
        if kind == "adapter":
            weights = check_adapter(tree, named=self._named, pickles=self._pickles)
            return tuple(sorted({weights, *self._companions(tree, kind)}))
        weights = weights_or_index(tree, named=self._named, pickles=self._pickles and kind == "base")
        names = {weights}
        if weights.endswith(".json"):
            suffix = ".bin" if weights == PICKLED_INDEX else ".safetensors"
            names |= set(read_weight_map(self._download((weights,)) / weights, suffix=suffix).values())
        missing = sorted(names - tree.keys())
        if missing:
            raise BrokenCheckpoint(
                f"{self._named} has no {missing[0]}.",
                why=f"{weights} names {len(names) - 1} shards, and {len(missing)} are missing.",
                fix="Use another revision of the base, or tell its owner.",
            )
        return tuple(sorted(names | set(self._companions(tree, kind))))

    def _companions(self, tree: Tree, kind: Kind) -> tuple[str, ...]:
        modules = module_folders(self._download((MODULES,))) if MODULES in tree else ()
        paths = companions(tree, kind, modules, pickles=self._pickles or kind == "merged")
        if kind == "merged":  # what is too large to be right is judged by its name
            return tuple(path for path in paths if is_weights(path) or tree[path].size_bytes <= MAX_COMPANION_BYTES)
        for path in paths:
            check_size(path, tree[path].size_bytes)
        return paths

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._cache).free
        if needed and needed + SPARE_DISK_BYTES > free:
            raise NotEnoughDisk(
                f"Downloading {self._named} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
                why="The cache's file system is too small for what is not in the cache yet.",
                fix="Free space, or point `cache-dir` at a larger disk.",
            )

    def _download(self, paths: tuple[str, ...], missing_bytes: int = 0, *, force: bool = False) -> Path:
        meter = Meter(self._on_download, missing_bytes, self._repo_id)
        return Path(
            self._caller.read(
                f"download {self._named}",
                lambda: self._api.snapshot_download(
                    self._repo_id,
                    revision=self._commit,
                    cache_dir=self._cache,
                    token=self._api.token,
                    allow_patterns=[glob.escape(path) for path in paths],
                    max_workers=DOWNLOAD_THREADS,
                    force_download=force,
                    tqdm_class=meter.bar,
                ),
                attempts=3,  # the client repeats each request itself
            )
        )

    def _check(self, wanted: Tree, notes: Path) -> None:
        known = _read_notes(notes)
        fresh: dict[str, Any] = {}
        done, total = 0, sum(file.size_bytes for file in wanted.values())
        for path, file in wanted.items():
            fresh[path] = self._check_file(file, known.get(path))
            done += file.size_bytes
            self._on_download(done, total, f"checking {self._repo_id}")
        notes.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(notes, json.dumps(fresh, sort_keys=True))

    def _check_file(self, file: RemoteFile, known: object) -> list[int | str]:
        source = self._stored(file.path)
        if source.is_file() and known == _stamp(source, file):
            return _stamp(source, file)
        if not _matches(source, file):
            self._download((file.path,), force=True)
            if not _matches(self._stored(file.path), file):
                raise HubError(
                    f"{file.path} of {self._named} is not what the Hub lists: its digest is not {file.digest}.",
                    why="It was downloaded twice, and both times other bytes arrived, or the disk changes them.",
                    fix="Delete the cache folder and run again; if it repeats, tell the repository's owner.",
                )
        return _stamp(self._stored(file.path), file)

    def _stored(self, path: str) -> Path:
        return self._cache / f"models--{self._repo_id.replace('/', '--')}" / "snapshots" / self._commit / path

    def _link(self, wanted: Tree, view: Path, seen: tuple[str, ...]) -> None:
        """Make the folder of links; what is only `seen` is there as an empty file."""
        if {path.relative_to(view).as_posix() for path in view.rglob("*") if path.is_file()} == {*wanted, *seen}:
            return
        view.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(view, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=view.parent) as scratch:
            made = Path(scratch) / view.name
            for path in wanted:
                link = made / path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(self._stored(path), (view / path).parent))
            for path in seen:
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).touch()
            made.rename(view)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is here, and keep them out."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _matches(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    return content_digest(path, file) == file.digest


def content_digest(path: Path, file: RemoteFile) -> str:
    """Return what `file.digest` would be for the content of `path`: sha256, or git's blob id (sha1 with its header)."""
    digest = hashlib.sha256()
    if file.sha256 is None:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path, file: RemoteFile) -> list[int | str]:
    status = path.stat()
    return [file.digest, status.st_size, status.st_mtime_ns, status.st_ino]


def _read_notes(notes: Path) -> dict[str, Any]:
    try:
        known = parse_json(notes.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)
