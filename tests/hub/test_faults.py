"""Failures on demand do what they say; the command serves until its stdin is closed; nothing outlives its starter."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from tests.hub.server import LocalHub

REPO = "alice/model"
PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _repo(alice: HfApi) -> None:
    alice.create_repo(REPO, private=True)


def _commit(api: HfApi, path: str = "a.txt", content: bytes = b"1") -> str:
    made = api.create_commit(REPO, [CommitOperationAdd(path, content)], commit_message="Change")
    assert isinstance(made.oid, str)
    return made.oid


def _commits(hub: LocalHub) -> int:
    view = hub.repo(REPO)
    assert view is not None
    return len(view.commits)


def test_refuses_before_anything_is_done(hub: LocalHub, alice: HfApi) -> None:
    hub.fail(method="POST", path=r"/commit/", status=429, headers={"Retry-After": "7"})
    with pytest.raises(HfHubHTTPError) as caught:
        _commit(alice)
    assert caught.value.response.status_code == 429
    assert caught.value.response.headers["retry-after"] == "7"
    assert _commits(hub) == 1
    _commit(alice)
    assert _commits(hub) == 2


def test_counts_matching_requests(hub: LocalHub, alice: HfApi) -> None:
    hub.fail(method="GET", path=r"/refs$", skip=1, times=2, status=500)
    outcomes = []
    for _ in range(4):
        try:
            alice.list_repo_refs(REPO)
            outcomes.append(200)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)
    assert outcomes == [200, 500, 500, 200]


@pytest.mark.parametrize("drop", [False, True], ids=["status 500", "broken connection"])
def test_loses_the_answer_of_a_commit_that_was_applied(hub: LocalHub, alice: HfApi, drop: bool) -> None:
    hub.fail(method="POST", path=r"/commit/", status=500, after_apply=True, drop=drop)
    with pytest.raises(httpx2.RemoteProtocolError if drop else HfHubHTTPError):
        _commit(alice)
    assert _commits(hub) == 2
    assert [exchange.status for exchange in hub.exchanges() if "/commit/" in exchange.path] == [0 if drop else 500]


def test_breaks_the_connection_before_anything_is_done(hub: LocalHub, alice: HfApi) -> None:
    hub.fail(method="POST", path=r"/tag/", drop=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        alice.create_tag(REPO, tag="v1")
    assert alice.list_repo_refs(REPO).tags == []


def test_answers_late(hub: LocalHub, alice: HfApi) -> None:
    hub.fail(path=r"/api/models/", delay_s=30, status=0)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(f"{hub.endpoint}/api/models/{REPO}", timeout=0.3)
    hub.fail(path=r"/refs", delay_s=0.01, status=0)
    assert alice.list_repo_refs(REPO).branches


def test_the_client_survives_a_lost_part(hub: LocalHub, alice: HfApi) -> None:
    hub.fail(method="PUT", path=r"/parts/", status=503)
    _commit(alice, "model.safetensors", bytes(1_200_000))
    assert _commits(hub) == 2


@pytest.mark.parametrize("path", ["model.safetensors", "a.txt"])
def test_stores_other_bytes_than_were_sent(hub: LocalHub, alice: HfApi, path: str) -> None:
    hub.damage(path)
    _commit(alice, path, b"content")
    view = hub.repo(REPO)
    assert view is not None
    assert view.read(path) != b"content"
    healthy = CommitOperationAdd(path, b"content")
    alice.create_commit(REPO, [healthy], commit_message="again")
    assert view.read(path) == b"content"


def test_says_what_it_does_not_serve(hub: LocalHub, alice: HfApi) -> None:
    auth = {"Authorization": f"Bearer {alice.token}"}
    assert httpx2.get(f"{hub.endpoint}/api/datasets/a/b", headers=auth).status_code == 404
    assert [exchange.path for exchange in hub.exchanges() if not exchange.routed] == ["/api/datasets/a/b"]
    assert httpx2.get(f"{hub.endpoint}/api/models/{REPO}/xet-write-token/main", headers=auth).status_code == 404
    with pytest.raises(HfHubHTTPError, match="no pull requests"):
        alice.create_commit(REPO, [CommitOperationAdd("a", b"1")], commit_message="pr", create_pr=True)


def _served(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    line: dict[str, str] = json.loads(process.stdout.readline())
    return line


def _is_up(endpoint: str) -> bool:
    place = urlsplit(endpoint)
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", place.port or 0)) == 0


def _wait_until_down(endpoint: str) -> None:
    for _ in range(200):
        if not _is_up(endpoint):
            return
        time.sleep(0.05)
    raise AssertionError(f"{endpoint} still answers")


def test_the_command_serves_until_stdin_is_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hub", "--root", str(tmp_path / "other"), "--user", "demo"]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        told = _served(process)
        assert HfApi(endpoint=told["endpoint"], token=told["token"]).whoami()["name"] == "demo"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0
    assert not _is_up(told["endpoint"])


def test_the_command_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "args = [sys.executable, '-m', 'tests.hub', '--root', sys.argv[1]]\n"
        "child = subprocess.Popen(args, stdin=subprocess.PIPE)\n"
        "child.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "other")], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as starter:
        told = _served(starter)
        assert _is_up(told["endpoint"])
        starter.kill()
    _wait_until_down(told["endpoint"])
