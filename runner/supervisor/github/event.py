"""The event that started the workflow: its tag, and whether it may publish.

Covered: releases, pushed tags, and the refusal of every event that people without write access can cause.
The payload is read as hostile text: most of its fields are written by whoever opened the issue or the pull request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.protocol.errors import InputError, Problem
from runner.protocol.syntax import parse_json

MAX_PAYLOAD_BYTES = 32 << 20  # GitHub sends at most 25 MiB

# Started by people who may write to the repository, or by its own schedule. Everything else is refused: a new
# kind of event must be thought about before it may publish.
_TRUSTED = ("push", "release", "workflow_dispatch", "schedule", "repository_dispatch", "workflow_call")
_DEAD_RELEASES = ("deleted", "unpublished")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What started this run.

    Attributes:
        name: as GitHub spells it; "" outside GitHub.
        tag: of the release, else the pushed tag; None where there is none. Not checked.
        problems: why it may not publish; () if it may.
    """

    name: str
    tag: str | None
    problems: tuple[Problem, ...]


def read_event(environ: Mapping[str, str]) -> Event:
    """Return the event of this run; outside GitHub one without a tag. Never raises."""
    if environ.get("GITHUB_ACTIONS") != "true":
        return Event(name="", tag=None, problems=())
    name = environ.get("GITHUB_EVENT_NAME", "")
    pushed = environ.get("GITHUB_REF_NAME") if environ.get("GITHUB_REF_TYPE") == "tag" else None
    try:
        match name:
            case "release":
                return Event(name=name, tag=_release_tag(_read_payload(environ)), problems=())
            case "workflow_run":
                _check_cause(_read_payload(environ))
            case _ if name not in _TRUSTED:
                raise _refused(f"This workflow was started by {name!r}", "whoever may cause that event")
    except InputError as error:
        return Event(name=name, tag=pushed or None, problems=error.problems)
    return Event(name=name, tag=pushed or None, problems=())


def _release_tag(payload: Mapping[str, object]) -> str:
    if payload.get("action") in _DEAD_RELEASES:
        raise InputError(
            [
                Problem(
                    what=f"The release event is {payload['action']!r}.",
                    why="That release is gone, so there is nothing to publish for it.",
                    fix="Start the workflow with `on: { release: { types: [published] } }`.",
                )
            ]
        )
    match payload.get("release"):
        case {"draft": True}:
            raise InputError(
                [
                    Problem(
                        what="The release is a draft.",
                        why="Its tag may not exist yet, and may still be renamed.",
                        fix="Start the workflow with `on: { release: { types: [published] } }`.",
                    )
                ]
            )
        case {"tag_name": str(tag)} if tag:
            return tag
    raise _broken_payload("it has no `release.tag_name`")


def _check_cause(payload: Mapping[str, object]) -> None:
    match payload.get("workflow_run"):
        case {"event": str(cause)} if cause in _TRUSTED:
            return
        case {"event": str(cause)}:
            raise _refused(f"The workflow before this one was started by {cause!r}", "whoever may cause that event")
    raise _broken_payload("it has no `workflow_run.event`")


def _read_payload(environ: Mapping[str, str]) -> Mapping[str, object]:
    path = environ.get("GITHUB_EVENT_PATH", "")
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_PAYLOAD_BYTES + 1)
    except OSError as error:
        raise _broken_payload(f"{path!r} cannot be read ({error.strerror})") from error
    if len(content) > MAX_PAYLOAD_BYTES:
        raise _broken_payload(f"it is larger than {MAX_PAYLOAD_BYTES} bytes")
    try:
        payload = parse_json(content)
    except ValueError as error:
        raise _broken_payload(f"it is not JSON ({type(error).__name__})") from error
    if not isinstance(payload, dict):
        raise _broken_payload("it is not a JSON object")
    return payload


def _refused(what: str, who: str) -> InputError:
    return InputError(
        [
            Problem(
                what=f"{what}, which may not publish.",
                why=f"Then {who} could publish under your token, without write access to this repository.",
                fix="Publish on `release`, a pushed tag or `workflow_dispatch`; elsewhere set `mode: plan`.",
            )
        ]
    )


def _broken_payload(reason: str) -> InputError:
    return InputError(
        [
            Problem(
                what=f"The payload of the event cannot be used: {reason}.",
                why="The event says which tag is released and who caused it.",
                fix="Run the workflow again; if it stays so, set the input `tag` and start it by `workflow_dispatch`.",
            )
        ]
    )
