"""The publisher over Xet, as it runs on the public Hub: the same guarantees as over LFS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.utils import _xet

from runner.protocol.errors import PublishError, RunnerError
from tests.hub.faults import FOREVER, Kind
from tests.hub.identity import IdentityProvider
from tests.hub.xetclient import use_xet
from tests.supervisor.publish.test_faults import is_released
from tests.supervisor.publish.world import REPO, World


@pytest.fixture(autouse=True)
def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Use Xet; give a function that makes the client forget what it has sent."""
    homes = iter(range(100))

    def forget() -> None:
        use_xet(monkeypatch, tmp_path / f"home-{next(homes)}")

    forget()
    yield forget
    _xet.abort_xet_session()


def _sent_bytes(world: World) -> int:
    return sum(exchange.received_bytes for exchange in world.hub.exchanges() if exchange.endpoint == "xet-put")


def test_publishes_what_the_folder_holds(world: World) -> None:
    assert world.publish().created
    assert is_released(world)
    repo = world.hub.repo(REPO)
    assert repo is not None
    for path in (path for path in world.folder.rglob("*") if path.is_file()):
        assert repo.read(path.relative_to(world.folder).as_posix(), "v1.0.0") == path.read_bytes()
    assert world.calls("lfs-batch") == 0
    assert _sent_bytes(world) > 0


@pytest.mark.parametrize(
    "endpoint", ["xet-write-token", "xet-chunk", "xet-put", "xet-shard", "preupload", "commit", "tree", "create-tag"]
)
@pytest.mark.parametrize("kind", [Kind.STATUS, Kind.RESET_AFTER, Kind.APPLIED_RESET, Kind.RESET_ANSWER])
def test_a_failure_on_the_way_gets_one_commit_and_the_right_tag(world: World, endpoint: str, kind: Kind) -> None:
    world.hub.fail(endpoint, kind)
    assert world.publish().created
    assert len(world.hub.fired()) == 1
    assert world.commits() == 1
    assert is_released(world)


@pytest.mark.parametrize("endpoint", ["xet-write-token", "xet-put", "xet-shard"])
@pytest.mark.parametrize("status", [401, 403, 404, 413, 503])
def test_a_storage_that_refuses_leaves_no_tag_and_the_next_run_releases(
    world: World, endpoint: str, status: int
) -> None:
    world.hub.fail(endpoint, status=status, times=FOREVER)
    if endpoint == "xet-shard" and status == 404:
        world.hub.fail("xet-shard-v1", status=404, times=FOREVER)  # where the client goes then
    with pytest.raises(RunnerError):
        world.publish()
    assert world.commits() == 0
    assert world.tags() == {}
    world.hub.heal()
    assert world.publish().created
    assert is_released(world)


def test_bytes_that_another_machine_has_sent_are_not_sent_again(
    world: World, another_machine: Callable[[], None]
) -> None:
    world.hub.fail("commit", times=FOREVER)
    with pytest.raises(PublishError):
        world.publish()
    sent = _sent_bytes(world)
    another_machine()
    world.hub.heal()
    world.hub.forget_requests()
    assert world.publish().created
    assert is_released(world)
    assert _sent_bytes(world) == 0 < sent


def test_a_full_namespace_is_an_error_without_a_tag(world: World) -> None:
    world.hub.limit_storage("alice", 1_000_000)
    with pytest.raises(RunnerError, match=r"403|storage"):
        world.publish()
    assert world.tags() == {}
    assert world.commits() == 0


def test_a_trusted_job_publishes_with_the_token_that_it_was_given(world: World) -> None:
    from huggingface_hub._oidc import exchange_oidc_token

    world.connect().create_repo(REPO, private=True)
    with IdentityProvider.start("acme/training", ref="refs/tags/v1.0.0") as provider:
        world.hub.trust(REPO, provider.issuer, repository="acme/training", workflow="publish.yml")
        told = exchange_oidc_token(
            subject_token=provider.mint(world.hub.endpoint), resource=REPO, endpoint=world.hub.endpoint
        )
    assert replace(world, token=told["access_token"]).publish().created
    assert is_released(world)
