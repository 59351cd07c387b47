"""The folder of one run: a temporary one, or, below `work-dir`, one that the next run finds again after a kill.

With `work-dir`, the folder is always the same, `lora-merge-run`, and locked: a second run at the same time gets a
temporary one beside it. A run that ends removes its folder; a run that is interrupted (an error, a cancelled job, a
kill) leaves what it has merged, and the next one with the same inputs goes on from there
(`runner.worker.merge.resume`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.protocol.errors import RunnerError
from runner.supervisor.owner import give, owner_of

FOLDER = "lora-merge-run"
MERGED = "merged"
PREFIX = "lora-merge-"  # of temporary folders
JOURNAL = f"{MERGED}.journal.json"
LOCK_WAIT_S = 5.0  # a worker whose supervisor was killed needs a moment to end


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkFolder:
    """Where a run writes.

    Attributes:
        path: exists.
        lock: descriptor that holds the folder, for the worker to hold, too; None for a temporary folder.
    """

    path: Path
    lock: int | None

    @property
    def merged(self) -> Path:
        """Where the merged folder appears."""
        return self.path / MERGED


@contextmanager
def work_folder(work_dir: Path | None, temporary: Path, say: Callable[[str], None]) -> Iterator[WorkFolder]:
    """Yield the run's folder, and remove it afterwards, unless the run ends by an exception and can be resumed.

    Args:
        work_dir: the input, or None.
        temporary: parent of the folder when `work_dir` is None.
        say: is told when something is kept.

    Raises:
        RunnerError: no folder can be made there.
    """
    parent = work_dir or temporary
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(parent / FOLDER) if work_dir is not None else None
        path = parent / FOLDER if lock is not None else Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise RunnerError(
            f"No folder can be made in {str(parent)!r}: {error.strerror}.",
            why="The merged model is written there before it is judged.",
            fix="Set `work-dir` to a folder that this user may write to.",
        ) from error
    is_kept = False
    try:
        yield WorkFolder(path=path, lock=lock)
    except BaseException:
        is_kept = lock is not None and (path / JOURNAL).exists()
        if is_kept:
            # What root leaves there would stop the runner's next checkout; and the next run looks whose it is.
            give((path, *path.rglob("*")), owner_of(parent))
            say("What is merged is kept in `work-dir`: the next run with the same inputs goes on from there.")
        raise
    finally:
        if not is_kept:
            shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds `folder`, made where it is missing; None where it is in use, or not ours."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None  # a link, or a file: nothing that a run has made
        status = os.fstat(descriptor)
        is_ours = status.st_uid in (os.geteuid(), folder.parent.stat().st_uid)
        if not is_ours or stat.S_IMODE(status.st_mode) & 0o022:
            os.close(descriptor)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and folder.stat().st_ino == status.st_ino:  # not removed by its owner just now
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
        os.close(descriptor)
        time.sleep(0.05)
