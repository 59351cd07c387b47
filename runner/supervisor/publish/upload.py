"""The large files of a release, sent to the Hub before the commit that names them; until then nobody can see them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from runner.supervisor.publish.contents import Content, changed
from runner.supervisor.publish.run import Run

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

UPLOAD_THREADS = 3
PROGRESS_EVERY_S = 2.0
PREUPLOAD_FROM_BYTES = 1 << 20  # smaller files travel with the commit, or just before it


def addition_of(content: Content) -> CommitOperationAdd:
    """Return the operation that adds a file to a commit; good for one commit.

    Raises:
        PublishError: the local file has not the size that it had when its sha256 was taken.
    """
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(content.file.path, content.source)
    if addition.upload_info.size != content.file.size_bytes:
        raise changed(content.file.path)
    addition.upload_info.sha256 = bytes.fromhex(content.file.sha256)  # taken while writing: not hashed again
    return addition


def send(run: Run, additions: Sequence[CommitOperationAdd], *, branch: str) -> None:
    """Announce the small files of `additions`, and send the large ones that are not on the Hub yet, a few at a time.

    Progress counts what was there already, and of a file under way what was read of it.

    Raises:
        HubError: one of them could not be sent; the others are not begun.
    """
    sent = set(map(id, run.sent.values()))
    large = [item for item in additions if item.upload_info.size >= PREUPLOAD_FROM_BYTES and id(item) not in sent]
    total = run.contents.size_bytes
    done = told = total - sum(addition.upload_info.size for addition in large)
    run.on_progress(done, total)
    if small := [item for item in additions if item.upload_info.size < PREUPLOAD_FROM_BYTES]:
        run.hub.preupload(run.repo_id, small, branch=branch, create_pr=run.wanted.create_pr)
    pool = ThreadPoolExecutor(max_workers=UPLOAD_THREADS, thread_name_prefix="upload")
    try:
        sending = {
            pool.submit(run.hub.preupload, run.repo_id, [item], branch=branch, create_pr=run.wanted.create_pr): item
            for item in large
        }
        while sending:
            ended, _ = wait(sending, timeout=PROGRESS_EVERY_S, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
                done += sending.pop(future).upload_info.size
            told = max(told, done + bytes_read(_paths(sending.values())))
            run.on_progress(told, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _paths(additions: Iterable[CommitOperationAdd]) -> set[str]:
    sources = (addition.path_or_fileobj for addition in additions)
    return {os.path.realpath(source) for source in sources if isinstance(source, str | Path)}


def bytes_read(paths: Collection[str]) -> int:
    """Return how far this process has read in those of `paths` that it has open, in bytes; 0 without /proc.

    Neither client of the Hub tells how much of a file it has sent, and both read it from front to back.
    """
    found: dict[str, int] = {}
    descriptors = Path("/proc/self/fd")
    for descriptor in descriptors.iterdir() if descriptors.is_dir() else ():
        with suppress(OSError, ValueError, IndexError):  # closed meanwhile
            path = str(descriptor.readlink())
            if path in paths:
                position = int((descriptors.parent / "fdinfo" / descriptor.name).read_text().split()[1])
                found[path] = max(found.get(path, 0), position)
    return sum(found.values())
