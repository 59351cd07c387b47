from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.supervisor.github import event as room
from runner.supervisor.github.event import Event, read_event


def started_by(tmp_path: Path, name: str, payload: Any = None, **environ: str) -> Event:
    path = tmp_path / "event.json"
    path.write_bytes(payload if isinstance(payload, bytes) else json.dumps(payload).encode())
    variables = {"GITHUB_ACTIONS": "true", "GITHUB_EVENT_NAME": name, "GITHUB_EVENT_PATH": str(path)}
    return read_event({**variables, **environ})


def test_outside_github_there_is_no_event() -> None:
    assert read_event({"GITHUB_EVENT_NAME": "pull_request"}) == Event(name="", tag=None, problems=())


def test_a_release_gives_its_tag(tmp_path: Path) -> None:
    payload = {"action": "published", "release": {"tag_name": "v1.2.0", "draft": False, "body": "::error::x"}}

    event = started_by(tmp_path, "release", payload, GITHUB_REF_TYPE="tag", GITHUB_REF_NAME="other")

    assert event == Event(name="release", tag="v1.2.0", problems=())


def test_a_pushed_tag_is_the_tag_and_a_branch_is_not(tmp_path: Path) -> None:
    assert started_by(tmp_path, "push", GITHUB_REF_TYPE="tag", GITHUB_REF_NAME="pkg/v1").tag == "pkg/v1"
    assert started_by(tmp_path, "push", GITHUB_REF_TYPE="branch", GITHUB_REF_NAME="main").tag is None


@pytest.mark.parametrize("name", ["push", "workflow_dispatch", "schedule", "repository_dispatch", "workflow_call"])
def test_may_publish(tmp_path: Path, name: str) -> None:
    assert started_by(tmp_path, name).problems == ()


@pytest.mark.parametrize(
    "name",
    ["pull_request", "pull_request_target", "issue_comment", "issues", "fork", "watch", "merge_group", "", "x\ny"],
)
def test_may_not_publish(tmp_path: Path, name: str) -> None:
    (problem,) = started_by(tmp_path, name, GITHUB_REF_TYPE="tag", GITHUB_REF_NAME="v1").problems

    assert repr(name) in problem.what
    assert "may not publish" in problem.what


def test_a_following_workflow_is_judged_by_what_started_the_first(tmp_path: Path) -> None:
    assert started_by(tmp_path, "workflow_run", {"workflow_run": {"event": "push"}}).problems == ()
    assert started_by(tmp_path, "workflow_run", {"workflow_run": {"event": "pull_request"}}).problems
    assert started_by(tmp_path, "workflow_run", {"workflow_run": {}}).problems
    assert started_by(tmp_path, "workflow_run", {"workflow_run": {"event": "workflow_run"}}).problems


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b'{"release": []}',
        b'{"release": {"tag_name": 1}}',
        b'{"release": {"tag_name": ""}}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
    ],
)
def test_a_hostile_payload_is_one_clear_problem(tmp_path: Path, payload: bytes) -> None:
    (problem,) = started_by(tmp_path, "release", payload).problems

    assert "payload" in problem.what
    assert problem.why
    assert problem.fix


def test_a_missing_or_endless_payload_is_one_clear_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_PAYLOAD_BYTES", 1000)

    assert "cannot be read" in read_event({"GITHUB_ACTIONS": "true", "GITHUB_EVENT_NAME": "release"}).problems[0].what
    assert "larger" in started_by(tmp_path, "release", {"x": "y" * 1000}).problems[0].what


@pytest.mark.parametrize(
    "payload",
    [
        {"action": "deleted", "release": {"tag_name": "v1"}},
        {"action": "unpublished", "release": {"tag_name": "v1"}},
        {"action": "created", "release": {"tag_name": "v1", "draft": True}},
    ],
)
def test_refuses_a_release_that_is_not_there(tmp_path: Path, payload: Any) -> None:
    event = started_by(tmp_path, "release", payload)

    assert event.tag is None
    assert "types: [published]" in event.problems[0].fix
