"""Pickled weights as safetensors, where the user allows it: a folder in that folder's place, for all that follows.

Merge, judge and digests see safetensors only; nothing but `runner.worker.unpickle` ever opens a pickle. What the user
did not allow stays as it is, for the readers of adapters and checkpoints to refuse.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.files.joined import is_sharded, join_shards, shards_of
from runner.files.pickled import pickled_adapter, pickled_files, pickled_weights
from runner.protocol.errors import BrokenAdapter, BrokenCheckpoint, NotEnoughDisk, RunnerError, UnsupportedAdapter
from runner.protocol.errors import UnsupportedCheckpoint as Unsupported
from runner.supervisor.launch import unpickle


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickles:
    """What is done with folders whose weights are pickles.

    Attributes:
        allowed: whether the input `allow` names `pickle`.
        into: folder that the converted ones are put into.
        environ: the supervisor's environment, of which the converting process gets what is harmless.
    """

    allowed: bool
    into: Path
    environ: Mapping[str, str]

    def adapter(self, root: Path) -> Path:
        """Return `root`, or the folder that stands for it: weights in several files are joined, too.

        Raises:
            AdapterError: a file is damaged, or a pickle holds more than tensors.
            RunnerError: the converting process did not end well.
        """
        try:
            if is_sharded(root):
                files = [root / name for name in shards_of(root)]
                return self._made(root, files, lambda target: join_shards(root, target))
            return self._converted(root, pickled_adapter)
        except Unsupported as error:
            raise UnsupportedAdapter(error.problem.what, why=error.problem.why, fix=error.problem.fix) from error
        except BrokenCheckpoint as error:
            raise BrokenAdapter(error.problem.what, why=error.problem.why, fix=error.problem.fix) from error

    def base(self, root: Path) -> Path:
        """Return `root`, or the folder that stands for it.

        Raises:
            CheckpointError: a pickle is damaged, or holds more than tensors.
            RunnerError: the converting process did not end well.
        """
        return self._converted(root, pickled_weights)

    def _converted(self, root: Path, find: Callable[[Collection[str]], str | None]) -> Path:
        weights = find({path.name for path in root.iterdir()}) if self.allowed and root.is_dir() else None
        if weights is None:
            return root
        files = [root / name for name in pickled_files(root, weights)]
        return self._made(
            root, files, lambda target: unpickle(root, target, weights, environ=self.environ, home=self.into)
        )

    def _made(self, root: Path, files: list[Path], make: Callable[[Path], None]) -> Path:
        """Return the folder that `make` wrote for this content of `files`, now or before."""
        target = self.into / _key(root, files)
        if target.is_dir():
            return target
        self.into.mkdir(parents=True, exist_ok=True)
        _check_space(files, self.into)
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            make(partial)
        except RunnerError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(target)
        return target


def conversion_note(root: Path, converted: Path, noun: str) -> tuple[str, ...]:
    """Return what to say where `converted` stands for `root`."""
    if is_sharded(root):
        return ("The adapter's weights are in several files, and were joined in one first, every bit kept.",)
    said = f"The {noun}'s weights are pickles, and were converted to safetensors first: tensors only, every bit kept."
    return () if root == converted else (said,)


def _key(root: Path, files: list[Path]) -> str:
    """Return a name that another content, or another folder, does not have."""
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()]
    return hashlib.sha256(repr((str(root.resolve()), stamps)).encode()).hexdigest()[:16]


def _check_space(files: list[Path], folder: Path) -> None:
    needed = sum(path.stat().st_size for path in files if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NotEnoughDisk(
            f"Writing the weights again needs {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free.",
            why="Pickled weights are converted, and an adapter in several files is joined, before anything else.",
            fix="Point `work-dir` at a file system with more free space, or use a revision with safetensors.",
        )
