"""A merge that was killed is taken up again, shard by shard, when everything that decides its bytes is the same.

`merge` writes `<folder>.partial` and keeps a journal of the shards that are finished; here the next run finds them.
A shard is kept when the journal names it and its bytes still have the digest; everything else is made again. With
another base, adapter, option, library or version nothing is kept.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from runner import __version__
from runner.files.adapter.folder import CONFIG_FILE, WEIGHTS_FILE
from runner.files.sidecars.names import CONFIG
from runner.protocol.digests import FileDigest, digest_file, digest_of
from runner.protocol.errors import NotEnoughDisk, RunnerError
from runner.worker.merge.prepare import Prepared
from runner.worker.tensors.journal import Journal, read_journal

LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What there is of a merge before it starts.

    Attributes:
        partial: the folder to write to; it holds the kept shards and nothing else.
        journal_path: of the journal to keep while writing.
        journal: this merge's fingerprint and the kept shards.
        note: what the user should know of an earlier run; "" when there was none.
    """

    partial: Path
    journal_path: Path
    journal: Journal
    note: str

    @property
    def kept(self) -> Mapping[str, FileDigest]:
        """The kept shards by name."""
        return {file.path: file for file in self.journal.files}


def take_up(prepared: Prepared, into: Path) -> Standing:
    """Return what an earlier run left for the merge that is to become `into`, checked, and make the partial folder.

    Raises:
        RunnerError: `into` exists, and is not the result of an earlier merge.
    """
    partial, journal_path = into.with_name(into.name + ".partial"), into.with_name(into.name + ".journal.json")
    if into.exists() and not journal_path.exists():
        raise RunnerError(
            f"The folder {into.name!r} exists already.",
            why="A merge appears as a whole, under a name that is free; nothing is overwritten.",
            fix="Remove it, or name another folder.",
        )
    found = fingerprint(prepared)
    earlier = read_journal(journal_path)
    is_same = earlier is not None and earlier.fingerprint == found
    if into.exists():  # finished, and then the run was killed: checked like any other shards
        shutil.rmtree(partial, ignore_errors=True)
        into.rename(partial)
    note = "" if is_same else _why_anew(earlier, found, had_journal=journal_path.exists())
    files = _good_shards(prepared, partial, earlier.files if earlier is not None and is_same else ())
    if is_same:
        note = f"{len(files)} of {len(prepared.plan.shards)} shards are taken over from a run that was interrupted."
    partial.mkdir(parents=True, exist_ok=True)
    journal = Journal(fingerprint=found, files=files)
    journal.write(journal_path)
    _clear(partial, keep={file.path for file in files})
    return Standing(partial=partial, journal_path=journal_path, journal=journal, note=note)


def check_space(disk_bytes: int, standing: Standing) -> None:
    """Raise `NotEnoughDisk` where there is no room for the plan's `disk_bytes`, less what is kept."""
    free_bytes = shutil.disk_usage(standing.partial).free
    needed_bytes = disk_bytes - sum(file.size_bytes for file in standing.kept.values())
    if free_bytes < needed_bytes:
        raise NotEnoughDisk(
            f"The merged model needs {needed_bytes / 1e9:.3f} GB, and {free_bytes / 1e9:.3f} GB are free.",
            why="It is written to `work-dir` as a whole before it is judged.",
            fix="Point `work-dir` at a file system with more free space.",
        )


def fingerprint(prepared: Prepared) -> dict[str, str]:
    """Return what decides the bytes of the shards: name of the part → digest or version. Reads no base weight."""
    checkpoint, adapters = prepared.attached.checkpoint, prepared.attached.adapters
    base = hashlib.sha256((checkpoint.root / CONFIG).read_bytes())
    for file in checkpoint.files:
        status = (checkpoint.root / file.name).stat()
        base.update(repr((file.name, status.st_size, status.st_mtime_ns, file.header)).encode())
    return {
        "this action's version": __version__,
        "the libraries": " ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "the processor": torch.backends.cpu.get_cpu_capability(),
        "the base": base.hexdigest(),
        "the adapter": " ".join(_adapter_digest(adapter.root) for adapter in adapters),
        "the combination": repr(prepared.combination),
        "the rounding": repr(prepared.rounding),
        "the plan": hashlib.sha256(repr(prepared.plan.shards).encode()).hexdigest(),
    }


def _adapter_digest(root: Path) -> str:
    return digest_of(digest_file(root, name) for name in (CONFIG_FILE, WEIGHTS_FILE))


def _why_anew(earlier: Journal | None, found: Mapping[str, str], *, had_journal: bool) -> str:
    if earlier is None:
        return "An earlier run's journal cannot be read: the merge starts anew." if had_journal else ""
    other = [part for part, value in found.items() if earlier.fingerprint.get(part) != value]
    return f"An earlier run was interrupted, but {' and '.join(other)} changed since: the merge starts anew."


def _good_shards(prepared: Prepared, partial: Path, files: tuple[FileDigest, ...]) -> tuple[FileDigest, ...]:
    sizes = {shard.file: shard.size_bytes for shard in prepared.plan.shards}
    return tuple(file for file in files if file.path in sizes and _is_good(partial, file))


def _is_good(partial: Path, file: FileDigest) -> bool:
    path = partial / file.path
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    return digest_file(partial, file.path) == file


def _clear(partial: Path, *, keep: set[str]) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
