"""Inputs that there were once. Each is refused, with how the same is said now: ignored, it would change the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from runner.protocol.errors import Problem


def former(shown: str, name: str) -> Problem:
    """Return what is to be said of an input of `FORMER` that was given.

    Args:
        shown: how it was given, as a flag or a variable.
        name: of the input.
    """
    return FORMER[name](shown, name)


def _allow(shown: str, name: str) -> Problem:
    allowance = name.removeprefix("allow-")
    return Problem(
        what=f"{shown} is no input any more.",
        why="What a run may do against its rules is one list, the input `allow`.",
        fix=f"If it was true, add `{allowance}` to `allow`, as in `--allow {allowance}`; else leave it out.",
    )


def _eval_tasks(shown: str, _name: str) -> Problem:
    return Problem(
        what=f"{shown} is no input any more.",
        why="lm-eval runs better in a step of its own, which has the network for its data.",
        fix="Leave it out, and run lm-eval in a step after this one, as docs/verification.md shows.",
    )


def _upload_early(shown: str, _name: str) -> Problem:
    return Problem(
        what=f"{shown} is no input any more.",
        why="Finished shards are always sent during the merge if they can be; nobody sees them before the verdict.",
        fix="Leave it out.",
    )


FORMER: Mapping[str, Callable[[str, str], Problem]] = MappingProxyType(
    {
        **{f"allow-{name}": _allow for name in ("pickle", "not-verified", "same-repo")},
        "eval-tasks": _eval_tasks,
        "upload-early": _upload_early,
    }
)
# Of these the report still has the key, with the one value that is left.
REPORTED = ("eval-tasks", "upload-early")
