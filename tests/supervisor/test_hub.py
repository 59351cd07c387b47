"""The parts of the Hub room that need no Hub: what is selected, judged and translated, and how quickly it imports."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.protocol.errors import (
    AccessDenied,
    HubError,
    HubUnavailable,
    InputError,
    NotEnoughDisk,
    PublishConflict,
    RepoNotFound,
    RunnerError,
)
from runner.supervisor.hub import Given, Patience, read_patience, select
from runner.supervisor.hub.rights import refuse_creation
from runner.supervisor.hub.translate import clean, client_errors, pause_hint_s, translate
from runner.supervisor.hub.transport import Caller


def http_error(status: int, headers: dict[str, str] | None = None, url: str = "https://hub.example/api/x") -> Exception:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status

    response = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", url))
    with pytest.raises(HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    error: Exception = caught.value
    return error


def told(error: BaseException) -> RunnerError:
    return translate(error, doing="do it", secrets=("hf_secretsecret",))


@pytest.mark.parametrize(
    "status, headers, family",
    [
        (400, {}, HubError),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, AccessDenied),
        (402, {}, HubError),
        (403, {}, AccessDenied),
        (403, {"X-Error-Code": "GatedRepo"}, AccessDenied),
        (404, {"X-Error-Code": "RepoNotFound"}, RepoNotFound),
        (404, {"X-Error-Code": "RevisionNotFound"}, RepoNotFound),
        (404, {"X-Error-Code": "EntryNotFound"}, RepoNotFound),
        (408, {}, HubUnavailable),
        (409, {}, PublishConflict),
        (412, {}, PublishConflict),
        (413, {}, HubError),
        (429, {}, HubUnavailable),
        (500, {}, HubUnavailable),
        (502, {}, HubUnavailable),
        (503, {}, HubUnavailable),
        (504, {}, HubUnavailable),
    ],
)
def test_every_status_has_its_family(status: int, headers: dict[str, str], family: type[RunnerError]) -> None:
    assert type(told(http_error(status, headers))) is family


@pytest.mark.parametrize(
    "error, family",
    [
        (httpx2.ReadTimeout("slow"), HubUnavailable),
        (httpx2.ConnectError("refused"), HubUnavailable),
        (httpx2.RemoteProtocolError("closed"), HubUnavailable),
        (ConnectionError("xet: 503"), HubUnavailable),
        (PermissionError("xet: 403 forbidden"), AccessDenied),
        (OSError("Consistency check failed"), HubUnavailable),
        (OSError(errno.ENOSPC, "No space left on device"), NotEnoughDisk),
        (PermissionError(errno.EACCES, "Permission denied"), HubError),
        (json.JSONDecodeError("Expecting value", "<html>", 0), HubUnavailable),
        (ValueError("LFS batch API returned errors: quota"), HubError),
        (KeyError("sha"), HubError),
    ],
)
def test_every_exception_of_the_client_has_its_family(error: Exception, family: type[RunnerError]) -> None:
    assert isinstance(error, client_errors())
    assert type(told(error)) is family


def test_a_failed_upload_is_told_by_its_cause_and_tried_again_even_when_its_signed_url_expired() -> None:
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = http_error(403, url="https://cdn.example/blob?X-Amz-Signature=abc")
    found = told(error)
    assert type(found) is HubUnavailable
    assert "Signature" not in str(found)


@pytest.mark.parametrize("status, family", [(401, AccessDenied), (413, HubError), (404, HubUnavailable)])
def test_a_failed_upload_is_tried_again_only_where_another_address_may_help(
    status: int, family: type[RunnerError]
) -> None:
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = http_error(status, {"X-Error-Message": "No."}, url="https://cdn.example/blob")
    assert type(told(error)) is family


@pytest.mark.parametrize("status", [402, 403])
def test_a_full_storage_is_told_as_such(status: int) -> None:
    words = "Private repository storage limit reached, please upgrade your plan to increase it"
    found = told(http_error(status, {"X-Error-Message": f"{words}."}))
    assert type(found) is HubError
    assert f"({words})." in str(found)
    assert "is full" in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "token hf_abcdefghijklmnop was refused",
        "Authorization: Bearer abc.def",
        "GET https://user:pw@host/x",
        "https://cdn/x?X-Amz-Signature=0123#frag",
        "my hf_secretsecret",
        "line one\nline two\x1b[31m\x00",
        "x" * 10_000,
    ],
)
def test_cleaned_text_holds_no_secret_and_is_one_short_line(text: str) -> None:
    line = clean(text, ("hf_secretsecret",))
    for part in ("abcdefghijklmnop", "abc.def", "pw@", "Signature", "secretsecret", "\n", "\x1b", "\x00"):
        assert part not in line
    assert len(line) <= 300


@settings(deadline=None)
@given(st.text(max_size=400), st.text(alphabet="abcdefghij", min_size=8, max_size=20))
def test_a_secret_is_never_in_cleaned_text(text: str, secret: str) -> None:
    assert secret not in clean(f"{text} {secret} https://h/p?token={secret} {text}", (secret,))


@pytest.mark.parametrize(
    "headers, wanted_s",
    [
        ({"Retry-After": "7"}, 7.0),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=7;t=12, "resolvers";r=0;t=140'}, 140.0),
        ({"RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 300.0),
        ({"RateLimit": '"api";r=0;t=20', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 20.0),
        ({}, None),
    ],
)
def test_the_wait_that_the_hub_asks_for_is_read(headers: dict[str, str], wanted_s: float | None) -> None:
    assert pause_hint_s(http_error(429, headers)) == wanted_s


def test_a_date_to_wait_for_is_seconds_from_now() -> None:
    then = datetime.now(UTC) + timedelta(seconds=90)
    wait_s = pause_hint_s(http_error(429, {"Retry-After": format_datetime(then, usegmt=True)}))
    assert wait_s is not None
    assert 85 < wait_s <= 90


def test_a_policy_alone_is_no_reason_to_wait() -> None:
    assert pause_hint_s(http_error(503, {"RateLimit-Policy": '"api";q=500;w=300'})) is None


def busy(headers: dict[str, str], times: int) -> Callable[[], str]:
    """Return a call that is answered by 429 so many times."""
    left = [http_error(429, headers) for _ in range(times)]

    def call() -> str:
        if left:
            raise left.pop()
        return "there"

    return call


def test_a_wait_that_the_hub_names_is_kept_beyond_the_deadline_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("runner.supervisor.hub.transport.time.sleep", slept.append)
    told: list[str] = []
    caller = Caller(login=Given(None), patience=Patience(deadline_s=1.0), say=told.append)
    assert caller.read("read the refs", busy({"RateLimit": '"api";r=0;t=250'}, 1)) == "there"
    assert sum(slept) == 250
    assert [line.rpartition(": ")[2] for line in told] == [f"{left} s left." for left in (250, 190, 130, 70, 10)]


def test_a_named_wait_above_the_limit_is_an_error_with_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("runner.supervisor.hub.transport.time.sleep", slept.append)
    caller = Caller(login=Given(None), patience=Patience())
    with pytest.raises(HubUnavailable, match="asks to wait 301 s, and this run waits 300 s at most"):
        caller.read("read the refs", busy({"Retry-After": "301"}, 1))
    with pytest.raises(HubUnavailable, match="200 s after 200 s that it named before, and this run waits 300 s"):
        caller.read("read the refs", busy({"Retry-After": "200"}, 2))
    assert sum(slept) == 200


def test_failing_calls_are_repeated_until_the_deadline_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("runner.supervisor.hub.transport.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "runner.supervisor.hub.transport.time.sleep", lambda pause_s: now.__setitem__(0, now[0] + pause_s)
    )

    def call() -> None:
        raise http_error(503)

    with pytest.raises(HubUnavailable):
        Caller(login=Given(None), patience=Patience()).read("read the refs", call)
    assert 160 <= now[0] <= 180


def test_a_call_is_not_repeated_when_the_answer_is_a_refusal() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise http_error(403)

    with pytest.raises(AccessDenied):
        Caller(login=Given(None), patience=Patience(first_wait_s=0.0)).read("do it", call)
    assert len(calls) == 1


def test_an_error_of_our_own_passes_untouched() -> None:
    def call() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Caller(login=Given(None), patience=Patience()).read("do it", call)


def test_a_write_that_was_accepted_is_not_repeated_while_the_hub_does_not_show_it_yet() -> None:
    writes: list[int] = []
    reads = iter([None, None, "there"])

    def write() -> str:
        writes.append(1)
        return "ok"

    caller = Caller(login=Given(None), patience=Patience(first_wait_s=0.0))
    assert caller.settle("do it", write, lambda answer: next(reads)) == "there"
    assert len(writes) == 1


def test_a_write_that_is_never_shown_ends_in_an_error() -> None:
    caller = Caller(login=Given(None), patience=Patience(attempts=3, first_wait_s=0.0))
    with pytest.raises(HubUnavailable, match="does not show it"):
        caller.settle("do it", lambda: "ok", lambda answer: None)


WRITER = {"name": "alice", "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@pytest.mark.parametrize(
    "who",
    [
        WRITER,
        {"name": "alice", "auth": {"type": "oauth"}},  # nothing is said about the role
        {"name": "bob", "orgs": [{"name": "alice", "roleInOrg": "contributor"}]},
        {"name": "bob", "orgs": [{"name": "alice"}]},
    ],
)
def test_creation_is_not_refused_without_a_reason(who: dict[str, object]) -> None:
    refuse_creation(who, "alice/model")


@pytest.mark.parametrize(
    "who",
    [
        {},
        {"name": "bob"},
        {"name": None, "orgs": "none"},
        {"name": "alice", "auth": {"accessToken": {"role": "read"}}},
        {"name": "bob", "orgs": [{"name": "alice", "roleInOrg": "read"}, 7, None]},
        {"name": "alice", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": "x"}}}},
    ],
)
def test_creation_is_refused_for_whoever_has_no_right(who: dict[str, object]) -> None:
    with pytest.raises(AccessDenied):
        refuse_creation(who, "alice/model")


@settings(deadline=None)
@given(st.lists(st.text(max_size=40)), st.sampled_from(["adapter", "base", "merged"]))
def test_no_selected_path_leaves_the_folder_or_is_pickled(paths: list[str], kind: select.Kind) -> None:
    for path in select.companions(paths, kind):
        assert ".." not in path.split("/")
        assert not path.startswith("/")
        assert not path.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    for path in select.seen_only(paths, kind, ()):
        assert ".." not in path.split("/")
        assert not path.startswith("/")


def test_the_room_imports_without_its_heavy_client() -> None:
    code = (
        "import sys, runner.supervisor.hub, runner.supervisor.publish, runner.supervisor.documents.card;"
        "print(sorted({'huggingface_hub', 'torch', 'httpx2', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_environment_sets_how_long_the_hub_is_waited_for() -> None:
    assert read_patience({}) == (60.0, Patience())
    environ = {
        "LORA_MERGE_HUB_TIMEOUT_S": "5",
        "LORA_MERGE_HUB_DEADLINE_S": "600",
        "LORA_MERGE_HUB_FIRST_WAIT_S": "0.1",
    }
    assert read_patience(environ) == (5.0, Patience(deadline_s=600.0, first_wait_s=0.1))


def test_every_wait_that_is_no_time_is_told() -> None:
    with pytest.raises(InputError) as caught:
        read_patience(
            {"LORA_MERGE_HUB_TIMEOUT_S": "1m", "LORA_MERGE_HUB_DEADLINE_S": "0", "LORA_MERGE_HUB_FIRST_WAIT_S": "inf"}
        )
    assert [problem.what for problem in caught.value.problems] == [
        "The variable `LORA_MERGE_HUB_TIMEOUT_S` is '1m'.",
        "The variable `LORA_MERGE_HUB_DEADLINE_S` is '0'.",
        "The variable `LORA_MERGE_HUB_FIRST_WAIT_S` is 'inf'.",
    ]


@pytest.mark.parametrize(
    "status, family",
    [(401, AccessDenied), (403, AccessDenied), (404, HubError), (413, HubError), (429, HubUnavailable)],
)
def test_a_refused_token_of_the_xet_storage_is_told_as_what_it_is(status: int, family: type[HubError]) -> None:
    # How hf_xet 1.8 puts it.
    place = "domain: https://hub.example/api/models/o/n/xet-write-token/main"
    text = f"Network error: Request error: HTTP status client error ({status} Whatever), {place}"

    storage = ConnectionError(text.replace("api/models/o/n/xet-write-token/main", "v2/shards"))
    assert type(told(ConnectionError(text))) is family
    assert type(told(storage)) is (HubUnavailable if status == 429 else HubError)
