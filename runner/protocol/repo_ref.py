"""A model as the user named it: a local folder, or a repository on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoRef:
    """A model as the user named it: a local folder, or a repository on the Hub.

    Attributes:
        repo_id: `owner/name`, or None for a folder.
        revision: branch, tag or commit; None for the default branch.
        path: an absolute folder that exists, links followed; None for a repository.
    """

    repo_id: str | None = None
    revision: str | None = None
    path: Path | None = None

    @property
    def display(self) -> str:
        """As the user would write it."""
        if self.repo_id is None:
            return str(self.path)
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"
