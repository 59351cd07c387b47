"""Everything that can go wrong, as the user is to read it: what happened, why, and what to do.

The tree, with the exit code of each family::

    RunnerError                       1
    ├── InputError                    2   a bad, missing or contradictory input; carries all of them
    ├── HubError                      3
    │   ├── RepoNotFound
    │   ├── AccessDenied
    │   ├── TagExists
    │   └── HubUnavailable
    ├── AdapterError                  4
    │   ├── BrokenAdapter                 truncated, not finite, no config
    │   ├── UnsupportedAdapter            a kind that has no exact merge
    │   └── AdapterMismatch               a tensor that fits nothing in the base
    ├── CheckpointError               5
    │   ├── BrokenCheckpoint              header, index or file that contradict each other
    │   └── UnsupportedCheckpoint         a kind of base that is not merged exactly
    ├── ResourceError                 6
    │   ├── NotEnoughDisk
    │   └── NotEnoughMemory
    ├── LaunchError                   7   no GPU where one was asked for; the worker died
    ├── (a verdict that did not pass) 8   not an exception: see runner.protocol.verdict
    ├── PublishError                  9
    │   └── PublishConflict               somebody else moved the branch or the tag
    └── PhaseTimeout                  10  a phase took longer than `phase-timeout-minutes`

Cancelled is 130, and an error that nobody foresaw is 70.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

EXIT_VERDICT_FAILED = 8
EXIT_INTERNAL = 70
EXIT_CANCELLED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: `what` happened (with the value), `why`, and the `fix`."""

    what: str
    why: str
    fix: str


class RunnerError(Exception):
    """An error that the user can act on.

    Attributes:
        problem: what, why and fix, each one or two sentences without a secret in them.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.problem = Problem(what=what, why=why, fix=fix)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All problems that this error reports; one, except for `InputError`."""
        return (self.problem,)

    def __str__(self) -> str:
        return "\n".join(f"{p.what}\n  why: {p.why}\n  fix: {p.fix}" for p in self.problems)


class InputError(RunnerError):
    """The inputs cannot be used. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        super().__init__(first.what, why=first.why, fix=first.fix)
        self._problems = tuple(problems)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem found in the inputs, in the order of `action.yml`."""
        return self._problems


class HubError(RunnerError):
    """The Hub refused or did not answer."""

    exit_code = 3


class RepoNotFound(HubError):
    """A repository, revision or file does not exist, or this token may not see it."""


class AccessDenied(HubError):
    """The token is wrong, or lacks a right that the run needs."""


class TagExists(HubError):
    """The tag is taken by other content."""


class HubUnavailable(HubError):
    """The Hub did not answer in time, or kept answering with an error."""


class AdapterError(RunnerError):
    """The adapter cannot be merged."""

    exit_code = 4


class BrokenAdapter(AdapterError):
    """A file of the adapter is missing, truncated, inconsistent or not finite."""


class UnsupportedAdapter(AdapterError):
    """The adapter is of a kind that has no exact merge."""


class AdapterMismatch(AdapterError):
    """The adapter was made for another base model, or holds tensors that nothing consumes."""


class CheckpointError(RunnerError):
    """The base (or the merged folder to be judged) cannot be read as a checkpoint."""

    exit_code = 5


class BrokenCheckpoint(CheckpointError):
    """A header, index or file that contradicts another."""


class UnsupportedCheckpoint(CheckpointError):
    """A kind of checkpoint that cannot be merged exactly."""


class ResourceError(RunnerError):
    """The machine has too little of something."""

    exit_code = 6


class NotEnoughDisk(ResourceError):
    """A file system is too full for what the plan will write."""


class NotEnoughMemory(ResourceError):
    """The worker needs, or needed, more memory than there is."""


class LaunchError(RunnerError):
    """The worker could not be started where it was asked for, or died."""

    exit_code = 7


class PublishError(RunnerError):
    """The release could not be completed; the text says what is on the Hub and what is not."""

    exit_code = 9


class PublishConflict(PublishError):
    """The branch or the tag is not where it was read: somebody else moved it, or the Hub's first answer was old."""


class PhaseTimeout(RunnerError):
    """A phase took longer than `phase-timeout-minutes`."""

    exit_code = 10


def disk_full(error: OSError) -> NotEnoughDisk | None:
    """Return the error to tell where `error` says that a disk, or a quota, is full; else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    place = f" ({error.filename})" if isinstance(error.filename, str) else ""
    return NotEnoughDisk(
        f"A disk is full{place}: {error.strerror}.",
        why="Something was written that no longer fits: the merged model, a download, or the report.",
        fix="Free space, or point `work-dir`, `cache-dir` and `report-dir` at a larger disk.",
    )


def families() -> Iterator[type[RunnerError]]:
    """Yield every error class that is raised with what, why and fix, most general first."""
    pending: list[type[RunnerError]] = [RunnerError]
    while pending:
        family = pending.pop(0)
        if family is not InputError:
            yield family
        pending.extend(family.__subclasses__())


def rebuild(family: str, problem: Problem) -> RunnerError:
    """Return the error that a worker reported by the name of its class.

    An unknown name gives a plain `RunnerError`: the text is kept, only the exit code is general.
    """
    if family == InputError.__name__:
        return InputError([problem])
    known = {cls.__name__: cls for cls in families()}
    return known.get(family, RunnerError)(problem.what, why=problem.why, fix=problem.fix)
