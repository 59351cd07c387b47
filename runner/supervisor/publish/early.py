"""Finished shards, sent while the merge and its judgement go on. Nobody can see them before a commit names them.

One thread, one shard after the other: on a small machine the merge needs the processor. What waits is names, as many
as the plan has shards; what is not sent by the verdict is sent after it, so nothing here may fail a run. A shard is
sent from a second name of the same bytes (a hard link), which stays when the merged folder gets its own.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from runner.protocol.digests import FileDigest
from runner.protocol.errors import HubUnavailable, RunnerError
from runner.supervisor.hub import Hub
from runner.supervisor.publish.contents import Content
from runner.supervisor.publish.run import Say
from runner.supervisor.publish.upload import PREUPLOAD_FROM_BYTES, addition_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


class EarlyUpload:
    """Sends shards in the background. Use as a context manager: leaving it begins no other shard."""

    def __init__(
        self,
        hub: Hub,
        *,
        repo_id: str,
        branch: str,
        create_pr: bool,
        known: Collection[str],
        outbox: Path,
        say: Say,
    ) -> None:
        """Start waiting for shards.

        Args:
            hub: to send to, with a login that may write.
            repo_id: a repository that exists.
            branch: a branch that exists, for which the right to send is asked.
            create_pr: whether the shards are for a pull request.
            known: sha256 of large files that the repository has; they are not sent.
            outbox: folder for the second names, on the file system of the shards; made here.
            say: told what could not be sent.
        """
        self._hub, self._repo_id, self._branch, self._create_pr = hub, repo_id, branch, create_pr
        self._known = frozenset(known)
        self._outbox = outbox
        self._say = say
        self._waiting: queue.SimpleQueue[Content | None] = queue.SimpleQueue()
        self._sent: dict[str, CommitOperationAdd] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="early-upload", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def offer(self, shard: Path, file: FileDigest) -> None:
        """Take a finished shard with its digest; returns at once."""
        if self._ends.is_set() or file.size_bytes < PREUPLOAD_FROM_BYTES or file.sha256 in self._known:
            return
        link = self._outbox / file.path
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            os.link(shard, link)
        except OSError:  # a file system without hard links: sent after the verdict
            return
        self._waiting.put(Content(file=file, source=link))

    def stop(self) -> None:
        """Begin no other shard; one that is under way goes on, unseen, until the process ends."""
        self._ends.set()
        self._waiting.put(None)

    def sent(self) -> Mapping[str, CommitOperationAdd]:
        """Return what was sent, by path, after the shard that is under way; no other is begun."""
        self.stop()
        self._thread.join()
        if self._sent:
            size_bytes = sum(addition.upload_info.size for addition in self._sent.values())
            self._say(f"{len(self._sent)} shards, {size_bytes / 1e6:.0f} MB, were sent while the merge went on.")
        return dict(self._sent)

    def _run(self) -> None:
        while (content := self._waiting.get()) is not None and not self._ends.is_set():
            path = content.file.path
            try:
                addition = addition_of(content)
                self._hub.preupload(self._repo_id, [addition], branch=self._branch, create_pr=self._create_pr)
            except RunnerError as error:
                self._say(f"{path} was not sent while the merge went on: {error.problem.what} It is sent later.")
                if not isinstance(error, HubUnavailable):
                    self._ends.set()  # it would be refused again; after the verdict it is an error
            else:
                self._sent[path] = addition
