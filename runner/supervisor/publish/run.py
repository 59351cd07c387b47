"""One publication under way: what every step of it needs, and what is on the Hub because of it so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runner.supervisor.hub import Hub, Tree
from runner.supervisor.publish.contents import Contents
from runner.supervisor.publish.wanted import Wanted

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What the release is put on top of.

    Attributes:
        head: the commit, 40 hex digits.
        tree: its files.
        manifest: its merge-manifest.json, or None.
    """

    head: str
    tree: Tree
    manifest: Mapping[str, Any] | None

    @classmethod
    def of(cls, hub: Hub, repo_id: str, commit: str) -> Ground:
        """Return what `commit` holds."""
        tree = hub.tree(repo_id, commit)
        return cls(head=commit, tree=tree, manifest=hub.read_manifest(repo_id, commit, tree))


@dataclass(slots=True, kw_only=True)
class Run:
    """One publication.

    Attributes:
        hub: connected with a login that may write.
        repo_id: `owner/name`.
        wanted: how the release is to appear.
        contents: its files.
        sent: large files whose content is on the Hub already, by path.
        say: told what happens, a line at a time.
        on_progress: told (bytes on the Hub, bytes in all).
        standing: what is on the Hub because of this run, as a sentence; "" for nothing.
    """

    hub: Hub
    repo_id: str
    wanted: Wanted
    contents: Contents
    sent: Mapping[str, CommitOperationAdd]
    say: Say
    on_progress: Callable[[int, int], None]
    standing: str = field(default="", init=False)

    @property
    def digests(self) -> str:
        """What names inputs and outputs, for the messages of commit and tag."""
        return f"input digest: {self.contents.input_digest}\nmerged digest: {self.contents.merged_digest}"

    @property
    def description(self) -> str:
        """What is written below the title of the commit."""
        return f"{self.wanted.text}\n\n{self.digests}".strip()
