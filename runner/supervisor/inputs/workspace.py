"""The folder that relative paths are read from, and the wall around it inside a workflow.

On your own machine any path may be named. In a workflow, a path that is relative (or written as one below the
workspace) must end there after links and `..` are followed: a checked-out repository may hold a link to
`/github/home`, or to whatever else the job can read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.protocol.errors import InputError, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where relative paths start.

    Attributes:
        root: absolute, links followed.
        home: what `~` stands for, or None.
        is_walled: whether relative paths must stay below `root`.
    """

    root: Path
    home: str | None
    is_walled: bool

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Workspace:
        """Return GitHub's workspace inside a workflow, else the current folder without a wall."""
        in_github = environ.get("GITHUB_ACTIONS") == "true"
        root = Path(environ["GITHUB_WORKSPACE"]) if in_github and environ.get("GITHUB_WORKSPACE") else Path.cwd()
        return cls(root=root.resolve(), home=environ.get("HOME") or None, is_walled=in_github)

    def locate(self, name: str, text: str) -> Path:
        """Return the absolute path that `text` names, links followed; it need not exist.

        Args:
            name: the input, for the error.
            text: as the user wrote it.

        Raises:
            InputError: it leads out of the workspace of a workflow, or is no path at all.
        """
        path = Path(text)
        if text == "~" or text.startswith("~/"):
            if self.home is None:
                raise _no_path(name, text, "`HOME` is not set, so `~` stands for nothing")
            path = Path(self.home) / text[2:]
        elif text.startswith("~"):
            raise _no_path(name, text, "the home of another user is not looked up")
        is_below = not path.is_absolute() or path.is_relative_to(self.root)
        try:
            resolved = (self.root / path).resolve()
            resolved.exists()  # a name that is too long, or a folder that may not be entered, shows here
        except (OSError, RuntimeError) as error:
            raise _no_path(name, text, f"it cannot be followed ({error})") from error
        if self.is_walled and is_below and not resolved.is_relative_to(self.root):
            raise InputError(
                [
                    Problem(
                        what=f"`{name}` is {text!r}, which leads out of the workspace to {str(resolved)!r}.",
                        why="Through `..` or a link, files of the runner could be read or overwritten.",
                        fix="Name a path inside the workspace, without links out of it.",
                    )
                ]
            )
        return resolved

    def check_links(self, name: str, folder: Path) -> None:
        """Check that no link in `folder` leads where files of the runner lie; outside a workflow everything may.

        A link may end in the workspace, in the folder itself, or, as the cache of the Hub's client makes them, among
        the blobs beside the folder.

        Args:
            name: the input, for the error.
            folder: absolute, links followed.

        Raises:
            InputError: a link leads elsewhere.
        """
        if not self.is_walled:
            return
        allowed = [self.root, folder]
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
        for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
            end = Path(os.path.realpath(link))  # `resolve` raises on a link to itself
            if not any(end.is_relative_to(root) for root in allowed):
                raise InputError(
                    [
                        Problem(
                            what=f"`{name}` holds the link {str(link.relative_to(folder))!r}, which leads to {end}.",
                            why="What it leads to would be read, and could be published, as a part of the model.",
                            fix="Replace the link by the file that is meant.",
                        )
                    ]
                )

    def show(self, path: Path) -> str:
        """Return `path` as a later step can use it: relative to the workspace where it lies inside."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def _no_path(name: str, text: str, reason: str) -> InputError:
    return InputError(
        [
            Problem(
                what=f"`{name}` is {text!r}, which is not a usable path.",
                why=f"{reason[0].upper()}{reason[1:]}.",
                fix="Give a path relative to the workspace.",
            )
        ]
    )
