"""Rights are judged before any work, and by questions only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from runner.protocol.errors import AccessDenied, HubUnavailable, RepoNotFound
from tests.hub.server import LocalHub
from tests.supervisor.publish.world import REPO, World

NO_TOKEN = ""


@pytest.mark.parametrize(
    "repo_id, make, says",
    [
        (REPO, lambda hub: hub.add_token("alice", role="read"), "may only read"),
        (REPO, lambda hub: "hf_bogusbogusbogusbogus", "not accepted"),
        (REPO, lambda hub: NO_TOKEN, "there is no token"),
        ("stranger/model", lambda hub: hub.add_token("alice"), "not a member of stranger"),
        ("acme/model", lambda hub: hub.add_token("mallory"), "has the role `read` in acme"),
        (
            REPO,
            lambda hub: hub.add_token("alice", role="fineGrained", scoped=[("model", "alice/other", ["repo.write"])]),
            "fine-grained",
        ),
        (
            REPO,
            lambda hub: hub.add_token("alice", role="fineGrained", scoped=[("user", "alice", ["repo.content.read"])]),
            "fine-grained",
        ),
    ],
    ids=["read-only", "wrong", "none", "foreign-namespace", "org-reader", "fine-grained-other", "fine-grained-reader"],
)
def test_an_absent_repository_that_the_token_cannot_create_is_refused_before_any_work(
    world: World, repo_id: str, make: Callable[[LocalHub], str], says: str
) -> None:
    with pytest.raises(AccessDenied) as caught:
        replace(world, token=make(world.hub) or None).publish(repo_id=repo_id, before=lambda: pytest.fail("worked"))
    assert says in str(caught.value)
    assert world.hub.repo(repo_id) is None
    assert all(method == "GET" for method, _ in world.hub.requests())


@pytest.mark.parametrize("role", ["read", "fineGrained"])
def test_an_existing_repository_that_the_token_may_not_write_is_refused(world: World, role: str) -> None:
    world.publish()
    scoped = [("model", REPO, ["repo.content.read"])] if role == "fineGrained" else []
    token = world.hub.add_token("alice", role=role, scoped=scoped)  # type: ignore[arg-type]
    world.hub.forget_requests()
    with pytest.raises(AccessDenied):
        replace(world, token=token).publish(tag="v2", before=lambda: pytest.fail("worked"))
    assert all(method == "GET" for method, _ in world.hub.requests())


def test_somebody_elses_private_repository_looks_absent_and_is_refused(world: World) -> None:
    world.publish()
    with pytest.raises(AccessDenied, match="token may not see it"):
        replace(world, token=world.hub.add_token("mallory")).publish(tag="v2")


@pytest.mark.parametrize(
    "scope",
    [("user", "alice", ["repo.write", "repo.content.read"]), ("model", REPO, ["repo.write", "repo.content.read"])],
)
def test_a_fine_grained_token_that_may_write_publishes(world: World, scope: tuple[str, str, list[str]]) -> None:
    if scope[0] == "model":
        world.connect().create_repo(REPO, private=True)
    token = world.hub.add_token("alice", role="fineGrained", scoped=[scope])
    assert replace(world, token=token).publish().created
    assert world.commits() == 1


def test_a_member_of_an_organisation_publishes_there(world: World) -> None:
    assert world.publish(repo_id="acme/model").created
    assert world.commits("acme/model") == 1


def test_a_token_that_lies_around_on_the_machine_is_never_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish()
    monkeypatch.setitem(os.environ, "HF_TOKEN", str(world.token))
    anonymous = replace(world, token=None).connect()
    with pytest.raises(RepoNotFound):
        anonymous.refs(REPO)
    assert "authorization" not in repr(anonymous).lower()


def test_whoami_is_asked_at_most_three_times(world: World) -> None:
    world.hub.fail("whoami", times=100)
    with pytest.raises(HubUnavailable):
        world.publish()
    assert world.sent("GET", "/api/whoami-v2") == 3


@pytest.mark.parametrize(
    "scoped, notes",
    [([("model", REPO, ["repo.write", "repo.content.read"])], 0), ([("user", "alice", ["repo.write"])], 1)],
)
def test_the_preflight_tells_a_token_that_may_do_more(
    world: World, scoped: list[tuple[str, str, list[str]]], notes: int
) -> None:
    world.connect().create_repo(REPO, private=False)
    token = world.hub.add_token("alice", role="fineGrained", scoped=scoped)
    target = replace(world, token=token).connect().inspect_target(REPO, "v1")
    assert len(target.notes) == notes
    assert len(world.connect().inspect_target(REPO, "v1").notes) == 1  # a classic token
