"""Failures on demand do what they say; the command serves until its stdin is closed; nothing outlives its starter."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers

from tests.hub.faults import FOREVER, Kind, Rule
from tests.hub.server import LocalHub
from tests.hub.state import Limits

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


def test_every_status_is_answered_before_anything_is_done(hub: LocalHub, alice: HfApi) -> None:
    statuses = [401, 403, 404, 409, 412, 413, 429, 500, 502, 503]
    hub.inject(
        *[Rule(endpoint="commit", kind=Kind.STATUS, status=status, nth=n) for n, status in enumerate(statuses, 1)]
    )
    got = []
    for _ in statuses:
        with pytest.raises(HfHubHTTPError) as caught:
            _commit(alice)
        got.append(caught.value.response.status_code)
    assert got == statuses
    assert _commits(hub) == 1
    _commit(alice)
    assert _commits(hub) == 2
    assert [(hit.endpoint, hit.rule.status, hit.call) for hit in hub.fired()] == [
        ("commit", status, number) for number, status in enumerate(statuses, 1)
    ]


def test_a_429_says_how_long_to_wait(hub: LocalHub, alice: HfApi) -> None:
    hub.fail("commit", status=429)
    hub.fail("commit", status=429, nth=2, headers={"Retry-After": "7"})
    seen = []
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            _commit(alice)
        seen.append(caught.value.response.headers)
    limit = parse_ratelimit_headers(seen[0])
    assert limit is not None
    assert (limit.remaining, limit.reset_in_seconds) == (0, 1)
    assert (seen[1]["retry-after"], "ratelimit" in seen[1]) == ("7", False)


def test_calls_over_the_rate_limit_are_refused_until_the_next_window(tmp_path: Path) -> None:
    with LocalHub.start(tmp_path / "limited", limits=Limits(api_calls=3, window_s=1.0)) as hub:
        hub.add_user("alice")
        api = HfApi(endpoint=hub.endpoint, token=hub.add_token("alice"))
        api.create_repo(REPO)
        api.repo_info(REPO)
        api.repo_info(REPO)
        with pytest.raises(HfHubHTTPError, match="rate limit") as caught:
            api.repo_info(REPO)
        limit = parse_ratelimit_headers(caught.value.response.headers)
        assert limit is not None
        assert (limit.remaining, limit.limit, limit.window_seconds) == (0, 3, 1)
        time.sleep(1)
        assert api.repo_info(REPO).id == REPO


def test_counts_the_calls_of_an_endpoint(hub: LocalHub, alice: HfApi) -> None:
    hub.fail("refs", nth=2, times=2, status=500)
    outcomes = []
    for _ in range(4):
        alice.repo_info(REPO)  # another endpoint is not counted
        try:
            alice.list_repo_refs(REPO)
            outcomes.append(200)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)
    assert outcomes == [200, 500, 500, 200]


def test_refuses_a_rule_for_an_endpoint_that_does_not_exist(hub: LocalHub) -> None:
    with pytest.raises(ValueError, match="no endpoint is called 'comit'"):
        hub.fail("comit")


def test_heals(hub: LocalHub, alice: HfApi) -> None:
    hub.fail("commit", times=FOREVER)
    with pytest.raises(HfHubHTTPError):
        _commit(alice)
    hub.heal()
    _commit(alice)


@pytest.mark.parametrize("kind", [Kind.APPLIED_STATUS, Kind.APPLIED_RESET, Kind.RESET_ANSWER])
def test_loses_the_answer_of_a_commit_that_was_applied(hub: LocalHub, alice: HfApi, kind: Kind) -> None:
    hub.fail("commit", kind, status=500)
    with pytest.raises(HfHubHTTPError if kind is Kind.APPLIED_STATUS else httpx2.NetworkError):
        _commit(alice)
    assert _commits(hub) == 2
    status = 500 if kind is Kind.APPLIED_STATUS else 0
    assert [exchange.status for exchange in hub.exchanges() if exchange.endpoint == "commit"] == [status]


@pytest.mark.parametrize("kind", [Kind.RESET_BEFORE, Kind.RESET_IN, Kind.RESET_AFTER])
def test_resets_the_connection_before_anything_is_done(hub: LocalHub, alice: HfApi, kind: Kind) -> None:
    hub.fail("commit", kind, after_bytes=300_000)
    # A client that learns of the reset while it writes reads on, and then finds the end.
    with pytest.raises(httpx2.TransportError, match=r"reset by peer|Broken pipe|disconnected without"):
        _commit(alice, content=b"text\n" * 400_000)
    assert _commits(hub) == 1
    (exchange,) = [exchange for exchange in hub.exchanges() if exchange.endpoint == "commit"]
    if kind is Kind.RESET_BEFORE:
        assert exchange.received_bytes == 0
    elif kind is Kind.RESET_IN:
        assert 300_000 <= exchange.received_bytes < 2_000_000
    else:
        assert exchange.received_bytes > 2_000_000


def test_resets_are_real_and_orderly_ends_are_not_resets(hub: LocalHub) -> None:
    place = urlsplit(hub.endpoint)
    hub.fail("whoami", Kind.RESET_AFTER)
    hub.fail("whoami", Kind.RESET_AFTER, nth=2, orderly=True)
    with socket.create_connection(("127.0.0.1", place.port or 0), timeout=5) as plain:
        plain.sendall(b"GET /api/whoami-v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            plain.recv(100)
    with socket.create_connection(("127.0.0.1", place.port or 0), timeout=5) as plain:
        plain.sendall(b"GET /api/whoami-v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert plain.recv(100) == b""


def test_cuts_the_answer_of_a_download(hub: LocalHub, alice: HfApi) -> None:
    content = random.Random(0).randbytes(3_000_000)
    _commit(alice, "model.safetensors", content)
    hub.fail("blob", Kind.RESET_ANSWER)
    with pytest.raises(httpx2.NetworkError, match="reset by peer"):
        hf_hub_download(REPO, "model.safetensors", endpoint=hub.endpoint, token=alice.token)
    path = hf_hub_download(REPO, "model.safetensors", endpoint=hub.endpoint, token=alice.token)
    assert Path(path).read_bytes() == content


def test_answers_late_or_never(hub: LocalHub, alice: HfApi) -> None:
    headers = {"Authorization": f"Bearer {alice.token}"}
    hub.fail("info", Kind.SILENT)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(f"{hub.endpoint}/api/models/{REPO}", timeout=0.2, headers=headers)
    hub.fail("info", Kind.SLOW, delay_s=0.2)
    begin_s = time.monotonic()
    assert httpx2.get(f"{hub.endpoint}/api/models/{REPO}", timeout=5, headers=headers).status_code == 200
    assert time.monotonic() - begin_s >= 0.2


def test_reads_are_stale_on_demand(hub: LocalHub, alice: HfApi) -> None:
    first = _commit(alice)
    second = _commit(alice, content=b"2")
    hub.fail("refs", Kind.STALE)
    hub.fail("tree", Kind.STALE)
    assert [alice.list_repo_refs(REPO).branches[0].target_commit for _ in range(2)] == [first, second]
    with pytest.raises(RevisionNotFoundError):
        list(alice.list_repo_tree(REPO, revision=second))
    assert list(alice.list_repo_tree(REPO, revision=second))


def test_a_token_expires_in_the_middle(hub: LocalHub, alice: HfApi) -> None:
    hub.fail("create-tag", Kind.EXPIRED)
    oid = _commit(alice)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
            alice.create_tag(REPO, tag="v1", revision=oid)
        assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        alice.whoami()


def test_a_signed_url_expires(hub: LocalHub, alice: HfApi) -> None:
    hub.fail("lfs-part", Kind.EXPIRED)
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        _commit(alice, "model.safetensors", bytes(1_200_000))
    assert "Request has expired" in str(caught.value.__cause__)


@pytest.mark.parametrize("endpoint, error", [("lfs-batch", ValueError), ("commit", HfHubHTTPError)])
def test_a_full_storage_is_told(hub: LocalHub, alice: HfApi, endpoint: str, error: type[Exception]) -> None:
    hub.fail(endpoint, Kind.QUOTA)
    with pytest.raises(error, match="storage limit reached"):
        _commit(alice, "model.safetensors", b"x")
    assert _commits(hub) == 1


def test_the_client_survives_a_lost_part(hub: LocalHub, alice: HfApi) -> None:
    hub.fail("lfs-part")
    _commit(alice, "model.safetensors", bytes(1_200_000))
    assert _commits(hub) == 2


@pytest.mark.parametrize("path", ["model.safetensors", "a.txt"])
def test_a_commit_holds_other_bytes_than_were_sent(hub: LocalHub, alice: HfApi, path: str) -> None:
    hub.fail("commit", Kind.DAMAGED, file=path)
    _commit(alice, path, b"content")
    view = hub.repo(REPO)
    assert view is not None
    assert view.read(path) != b"content"
    healthy = CommitOperationAdd(path, b"content")
    alice.create_commit(REPO, [healthy], commit_message="again")
    assert view.read(path) == b"content"


def test_uploaded_bytes_rot_under_their_digest(hub: LocalHub, alice: HfApi) -> None:
    hub.fail("lfs-put", Kind.DAMAGED)
    _commit(alice, "model.safetensors", b"content")
    view = hub.repo(REPO)
    assert view is not None
    assert view.tree()["model.safetensors"] == hashlib.sha256(b"content").hexdigest()
    assert view.read("model.safetensors") == b"contenu"


def test_says_what_it_does_not_serve(hub: LocalHub, alice: HfApi) -> None:
    auth = {"Authorization": f"Bearer {alice.token}"}
    assert httpx2.get(f"{hub.endpoint}/api/datasets/a/b", headers=auth).status_code == 404
    assert [exchange.path for exchange in hub.exchanges() if not exchange.routed] == ["/api/datasets/a/b"]


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
