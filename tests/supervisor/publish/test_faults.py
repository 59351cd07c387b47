"""The publisher while the Hub fails: it ends in one commit and one right tag, or in a clear error without a tag."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from runner.protocol.errors import AccessDenied, HubUnavailable, PublishConflict, PublishError
from runner.supervisor.hub import Patience
from tests.hub.faults import Kind
from tests.supervisor.publish.test_publish import intrude
from tests.supervisor.publish.world import REPO, World, origin


def is_released(world: World, tag: str = "v1.0.0") -> bool:
    repo = world.hub.repo(REPO)
    assert repo is not None
    return repo.tags == {tag: repo.branches["main"]}


@pytest.mark.parametrize(
    "endpoint",
    [
        "whoami",
        "info",
        "refs",
        "tree",
        "create-repo",
        "validate-yaml",
        "preupload",
        "lfs-batch",
        "lfs-put",
        "lfs-part",
        "lfs-complete",
        "lfs-verify",
        "commit",
        "create-tag",
    ],
)
@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_hub_is_waited_for_and_gets_one_commit(world: World, endpoint: str, status: int) -> None:
    world.hub.fail(endpoint, status=status, headers={"Retry-After": "0"})
    assert world.publish().created
    assert world.commits() == 1
    assert is_released(world)
    assert len(world.hub.fired()) == 1


@pytest.mark.parametrize("endpoint", ["create-repo", "commit", "create-tag"])
@pytest.mark.parametrize("kind", [Kind.APPLIED_RESET, Kind.APPLIED_STATUS, Kind.RESET_ANSWER])
def test_a_write_whose_answer_is_lost_is_not_repeated(world: World, endpoint: str, kind: Kind) -> None:
    world.hub.fail(endpoint, kind, status=500)
    assert world.publish().created
    assert world.commits() == 1
    assert is_released(world)
    assert world.calls(endpoint) == 1


@pytest.mark.parametrize("endpoint", ["commit", "create-tag"])
@pytest.mark.parametrize("kind", [Kind.RESET_BEFORE, Kind.RESET_IN, Kind.RESET_AFTER])
@pytest.mark.parametrize("orderly", [False, True], ids=["RST", "FIN"])
def test_a_connection_that_breaks_before_the_write_is_tried_again(
    world: World, endpoint: str, kind: Kind, orderly: bool
) -> None:
    world.hub.fail(endpoint, kind, orderly=orderly)
    assert world.publish().created
    assert world.commits() == 1
    assert is_released(world)
    assert world.calls(endpoint) == 2


def test_a_hub_that_never_commits_leaves_no_tag_and_says_so(world: World) -> None:
    world.hub.fail("commit", times=100)
    with pytest.raises(PublishError, match="503") as caught:
        world.publish()
    assert "not on the Hub" in str(caught.value)
    assert world.commits() == 0
    assert world.tags() == {}
    world.hub.heal()
    world.hub.forget_requests()
    assert world.publish().created
    assert world.commits() == 1
    assert world.sent("PUT", "") == 0  # what was uploaded is not sent twice


def test_a_crash_between_commit_and_tag_is_finished_by_the_next_run_without_a_second_commit(world: World) -> None:
    world.hub.fail("create-tag", times=100)
    with pytest.raises(PublishError) as caught:
        world.publish()
    assert "holds the whole release; the tag v1.0.0 does not exist" in str(caught.value)
    assert world.tags() == {}
    world.hub.heal()
    lines: list[str] = []
    release = world.publish(log=lines.append)
    assert release.created
    assert world.commits() == 1
    assert is_released(world)
    assert "only its tag is missing" in lines[0]


def test_the_next_run_adopts_the_commit_when_only_measured_numbers_in_the_card_differ(world: World) -> None:
    world.hub.fail("create-tag", times=100)
    with pytest.raises(PublishError):
        world.publish(pictures={"merge-report/retention.png": b"drawn here"})
    world.hub.heal()
    world.publish(
        card=b"---\nlicense: apache-2.0\n---\n# Measured on another processor\n",
        pictures={"merge-report/retention.png": b"drawn on another processor"},
    )
    assert world.commits() == 1
    assert is_released(world)


def test_a_crash_while_the_tag_is_replaced_is_finished_by_the_next_run(world: World) -> None:
    world.publish()
    other = replace(world, origin=origin("b" * 64))
    world.hub.fail("create-tag", times=100)
    with pytest.raises(PublishError) as caught:
        other.publish(on_existing_tag="replace")
    assert "was removed from commit" in str(caught.value)
    assert world.tags() == {}
    world.hub.heal()
    other.publish(on_existing_tag="replace")
    assert world.commits() == 2
    assert is_released(world)


def test_stored_bytes_that_differ_from_the_sent_ones_are_never_tagged(world: World) -> None:
    world.hub.fail("commit", Kind.DAMAGED, file="model-00001-of-00002.safetensors")
    with pytest.raises(PublishError, match=r"does not hold what was sent: model-00001-of-00002\.safetensors"):
        world.publish()
    assert world.tags() == {}


def test_a_small_file_that_is_stored_differently_is_never_tagged(world: World) -> None:
    world.hub.fail("commit", Kind.DAMAGED, file="config.json")
    with pytest.raises(PublishError, match=r"config\.json is other content"):
        world.publish()
    assert world.tags() == {}


def test_a_lost_answer_and_somebody_elses_commit_are_a_conflict(world: World) -> None:
    world.publish()
    token = str(world.token)
    other = replace(world, origin=origin("b" * 64))

    def on_progress(done: int, total: int) -> None:
        if done == total:
            intrude(world.hub, token)
            world.hub.fail("commit", Kind.RESET_AFTER)

    with pytest.raises(PublishConflict):
        other.publish(tag="v2.0.0", on_progress=on_progress)
    assert set(world.tags()) == {"v1.0.0"}


def test_a_silent_hub_ends_in_an_error(world: World) -> None:
    world.hub.fail("whoami", Kind.SILENT, times=100)
    quick = replace(world, timeout_s=0.2, patience=Patience(attempts=2, first_wait_s=0.01))
    with pytest.raises(HubUnavailable, match="did not answer in time"):
        quick.publish()


@pytest.mark.parametrize(
    "endpoint", ["info", "refs", "tree", "create-repo", "preupload", "lfs-batch", "lfs-put", "commit", "create-tag"]
)
def test_a_call_that_is_never_answered_is_given_up_and_tried_again(world: World, endpoint: str) -> None:
    world.hub.fail(endpoint, Kind.SILENT)
    begin_s = time.monotonic()
    assert replace(world, timeout_s=0.9).publish().created
    assert time.monotonic() - begin_s < 15
    assert world.commits() == 1
    assert is_released(world)


def test_a_commit_that_is_answered_too_late_is_found_and_tagged(world: World) -> None:
    world.hub.fail("commit", Kind.SLOW, delay_s=2)
    slow = replace(world, timeout_s=1.0, patience=Patience(attempts=8, first_wait_s=0.5, longest_wait_s=1.0))
    assert slow.publish().created
    assert is_released(world)
    assert world.commits() == 1


def test_a_named_wait_that_is_longer_than_the_limit_is_not_begun(world: World) -> None:
    world.hub.fail("whoami", times=100, status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubUnavailable, match="asks to wait 3600 s, and this run waits 300 s") as caught:
        world.publish()
    assert "429" in str(caught.value)
    assert world.sent("GET", "/api/whoami-v2") == 1


def test_a_refused_connection_ends_in_an_error(world: World) -> None:
    world.hub.stop()
    with pytest.raises(HubUnavailable, match="connection"):
        world.publish()


def test_a_token_that_is_revoked_during_the_run_ends_in_an_error_without_a_tag(world: World) -> None:
    token = str(world.token)

    def on_progress(done: int, total: int) -> None:
        if done == total:
            world.hub.revoke(token)

    with pytest.raises(PublishError, match="token is not accepted") as caught:
        world.publish(on_progress=on_progress)
    assert not isinstance(caught.value, AccessDenied)
    assert world.tags() == {}


def test_the_publish_error_for_a_refused_card_is_the_hubs_own_text(world: World) -> None:
    with pytest.raises(PublishError, match="Invalid metadata"):
        world.publish(card=b"---\nlicense: [1, 2]\nbase_model: '-- no --'\n---\n")
    assert world.commits() == 0


def test_an_error_text_of_the_server_that_repeats_a_secret_is_cleaned(world: World) -> None:
    secret = f"token {world.token} at https://user:pw@cdn.example/x?X-Amz-Signature=abc"
    world.hub.fail("whoami", times=100, status=403, headers={"X-Error-Message": secret})
    with pytest.raises(AccessDenied) as caught:
        world.publish()
    text = str(caught.value)
    assert str(world.token) not in text
    assert "pw" not in text.split()
    assert "https://cdn.example/x" in text


@pytest.mark.parametrize("endpoint", ["info", "refs", "tree"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_read_that_is_older_than_the_last_write_never_leads_to_a_second_commit(
    world: World, endpoint: str, nth: int
) -> None:
    world.publish()
    newer = replace(world, origin=origin("b" * 64))
    world.hub.fail(endpoint, Kind.STALE, nth=nth)
    try:
        newer.publish(tag="v2.0.0")
    except (PublishConflict, PublishError):
        # The head that was read is not the head any more, or the new commit is not shown yet.
        assert set(world.tags()) == {"v1.0.0"}
        newer.publish(tag="v2.0.0")
    assert world.commits() == 2
    assert set(world.tags()) == {"v1.0.0", "v2.0.0"}
    assert world.tags()["v2.0.0"] != world.tags()["v1.0.0"]


@pytest.mark.parametrize("endpoint", ["preupload", "lfs-batch", "commit", "create-tag"])
def test_a_token_that_expires_on_the_way_leaves_no_tag_and_a_new_one_finishes(world: World, endpoint: str) -> None:
    world.hub.fail(endpoint, Kind.EXPIRED)
    with pytest.raises(PublishError, match="not accepted"):
        world.publish()
    assert world.tags() == {}
    assert replace(world, token=world.hub.add_token("alice")).publish().created
    assert world.commits() == 1
    assert is_released(world)


def test_an_upload_url_that_expired_is_asked_for_again(world: World) -> None:
    world.hub.fail("lfs-put", Kind.EXPIRED)
    assert world.publish().created
    assert is_released(world)
    assert world.calls("lfs-put") == 2


@pytest.mark.parametrize("endpoint", ["lfs-batch", "commit"])
def test_a_full_storage_is_told_in_the_hubs_words(world: World, endpoint: str) -> None:
    world.hub.fail(endpoint, Kind.QUOTA, times=100)
    with pytest.raises(PublishError, match="storage limit reached"):
        world.publish()
    assert world.tags() == {}
    assert world.commits() == 0


def test_a_protected_tag_stays_where_it_is(world: World) -> None:
    world.publish()
    before = world.tags()
    world.hub.protect(REPO, "refs/tags/v*")
    with pytest.raises(PublishError, match="protected"):
        replace(world, origin=origin("b" * 64)).publish(on_existing_tag="replace")
    assert world.tags() == before
