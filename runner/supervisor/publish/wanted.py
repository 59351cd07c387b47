"""What the user wants of a release: its names, where its commit goes, and what is done with what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runner.supervisor.hub import BRANCH, Wishes

OnExistingTag = Literal["fail", "skip", "replace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How a release is to appear.

    Attributes:
        tag: its name.
        also_tags: tags that are moved to it, such as `latest`.
        branch: that its commit goes to; started at the head of `main` where it does not exist.
        is_staged: whether the commit goes to a branch of its own first, and `branch` follows after the tag.
        create_pr: whether it becomes a pull request instead, without a tag.
        private: for a repository that is created; an existing one keeps its visibility.
        on_existing_tag: what to do when the tag holds something else.
        commit_message: first line is the title; None for a default.
        allows_adapter: whether the repository may hold an adapter on `main`, while the release goes to another branch.
        is_protected: whether the tag is one that is never moved, whatever `on_existing_tag` says.
        allow_not_verified: publish, too, where a part of the judgement did not run and nothing failed.
    """

    tag: str
    also_tags: tuple[str, ...] = ()
    branch: str = BRANCH
    is_staged: bool = False
    create_pr: bool = False
    private: bool = True
    on_existing_tag: OnExistingTag = "fail"
    commit_message: str | None = None
    allows_adapter: bool = False
    is_protected: bool = False
    allow_not_verified: bool = False

    @property
    def wishes(self) -> Wishes:
        """What the preflight must know of it."""
        return Wishes(
            branch=self.branch,
            also_tags=self.also_tags,
            create_pr=self.create_pr,
            allows_adapter=self.allows_adapter,
        )

    @property
    def title(self) -> str:
        """The title of the commit."""
        return (self.commit_message or "").partition("\n")[0].strip() or f"Release {self.tag}"

    @property
    def text(self) -> str:
        """What the user wrote below the title."""
        return (self.commit_message or "").partition("\n")[2].strip()

    @property
    def staging_branch(self) -> str:
        """The branch that the commit goes to first, where it is staged."""
        return f"staging/{self.tag}"
