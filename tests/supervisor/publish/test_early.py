"""Shards that are sent while the merge goes on: invisible, not sent twice, and never a reason to fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.utils import _xet

from runner.protocol.digests import digest_folder
from runner.protocol.errors import PublishError
from runner.supervisor.documents import provenance
from runner.supervisor.documents.provenance import manifest
from runner.supervisor.publish import EarlyUpload, HubDestination, Release, ToPublish, Wanted
from tests.hub.faults import FOREVER, Kind
from tests.hub.xetclient import use_xet
from tests.supervisor.publish.test_targets import second
from tests.supervisor.publish.world import CARD, FACTS, REPO, World, verdict

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SENT = ("lfs-put", "lfs-part", "xet-put")


@pytest.fixture(params=["LFS", "Xet"])
def world(
    world: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[World]:
    """Publish a first release, over each protocol, so that the repository is there."""
    if request.param == "Xet":
        use_xet(monkeypatch, tmp_path / "xet-home")
    world.publish()
    world.hub.forget_requests()
    yield second(world, tmp_path)
    if request.param == "Xet":
        _xet.abort_xet_session()


def to_publish(world: World, early: EarlyUpload | None) -> ToPublish:
    files = digest_folder(world.folder)
    documents = {provenance.CARD: CARD, provenance.MANIFEST: manifest(world.origin, FACTS, verdict(), files)}
    return ToPublish(
        folder=world.folder, files=files, documents=documents, verdict=verdict(),
        input_digest=world.origin.input_digest(), sent=early.sent() if early else {},
    )  # fmt: skip


def destination_of(world: World, **wishes: object) -> HubDestination:
    destination = HubDestination(hub=world.connect(), repo_id=REPO, wanted=Wanted(tag="v2", **wishes))  # type: ignore[arg-type]
    destination.inspect(lambda _line: None)
    return destination


@contextmanager
def merging(world: World, destination: HubDestination, lines: list[str], tmp_path: Path) -> Iterator[EarlyUpload]:
    """Offer both shards as a merge would, which renames its folder then."""
    early = destination.send_early(tmp_path / "outbox", lines.append)
    assert early is not None
    partial = world.folder.rename(world.folder.with_name("partial"))
    with early:
        for file in digest_folder(partial):
            if file.path in SHARDS:
                early.offer(partial / file.path, file)
        partial.rename(world.folder)
        yield early


def release(world: World, destination: HubDestination, early: EarlyUpload | None) -> Release:
    return destination.publish(to_publish(world, early), say=lambda _line: None, on_progress=lambda _done, _total: None)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sent_bytes(world: World) -> int:
    return sum(exchange.received_bytes for exchange in world.hub.exchanges() if exchange.endpoint in SENT)


def visible(world: World) -> tuple[dict[str, str], dict[str, str], int]:
    repo = world.hub.repo(REPO)
    assert repo is not None
    return repo.branches, repo.tags, len(repo.commits)


def test_a_shard_is_sent_before_the_verdict_unseen_and_not_again(world: World, tmp_path: Path) -> None:
    destination, lines = destination_of(world), list[str]()
    before = visible(world)
    with merging(world, destination, lines, tmp_path) as early:
        wait_for(lambda: SHARDS[0] in early._sent)
        assert visible(world) == before
    early.sent()
    sent = sent_bytes(world)
    assert sent > 0
    made = release(world, destination, early)
    assert sent_bytes(world) == sent
    assert {line for line in lines if "were sent while the merge went on" not in line} == set()
    repo = world.hub.repo(REPO)
    assert repo is not None
    assert repo.tags["v2"] == made.commit
    assert repo.read(SHARDS[0], "v2") == (world.folder / SHARDS[0]).read_bytes()


def test_what_the_repository_has_already_is_not_sent(world: World, tmp_path: Path) -> None:
    destination = destination_of(world)
    with merging(world, destination, [], tmp_path) as early:
        pass
    assert SHARDS[1] not in early.sent()
    assert not (tmp_path / "outbox" / SHARDS[1]).exists()


def test_a_failed_verdict_leaves_nothing_that_anybody_can_see(world: World, tmp_path: Path) -> None:
    destination, before = destination_of(world), visible(world)
    with merging(world, destination, [], tmp_path) as early:
        wait_for(lambda: SHARDS[0] in early._sent)
    assert visible(world) == before


@pytest.mark.parametrize("status", [403, 413])
def test_a_shard_that_could_not_be_sent_is_sent_after_the_verdict(world: World, tmp_path: Path, status: int) -> None:
    destination, lines = destination_of(world), list[str]()
    world.hub.fail("preupload", status=status, times=FOREVER)
    with merging(world, destination, lines, tmp_path) as early:
        wait_for(lambda: bool(lines))
    world.hub.heal()
    assert early.sent() == {}
    assert "It is sent later." in lines[0]
    assert visible(world)[2] == 2
    release(world, destination, early)
    assert "v2" in visible(world)[1]


def test_a_hub_that_hangs_does_not_hold_up_the_merge_or_the_end(world: World, tmp_path: Path) -> None:
    world.hub.fail("preupload", Kind.SILENT)
    destination = destination_of(replace(world, timeout_s=4.0))
    begun = time.monotonic()
    with merging(world, destination, [], tmp_path) as early:
        pass
    assert time.monotonic() - begun < 2
    assert early._thread.is_alive()
    early._thread.join(30)  # it uses the client that the next test uses, too
    assert not early._thread.is_alive()


def test_bytes_that_changed_after_they_were_sent_are_not_published(world: World, tmp_path: Path) -> None:
    destination = destination_of(world)
    with merging(world, destination, [], tmp_path) as early:
        wait_for(lambda: SHARDS[0] in early._sent)
    (world.folder / SHARDS[0]).unlink()
    (world.folder / SHARDS[0]).write_bytes(b"other" * 300_000)
    made = release(world, destination, early)  # of what is in the folder now, which the digests name
    repo = world.hub.repo(REPO)
    assert repo is not None
    assert repo.read(SHARDS[0], made.commit) == b"other" * 300_000


@pytest.mark.parametrize("wishes", [{"is_staged": True}, {"create_pr": True}, {"branch": "next"}])
def test_early_shards_serve_every_way_of_publishing(world: World, tmp_path: Path, wishes: dict[str, object]) -> None:
    destination = destination_of(world, **wishes)
    with merging(world, destination, [], tmp_path) as early:
        wait_for(lambda: SHARDS[0] in early._sent)
    sent = sent_bytes(world)
    made = release(world, destination, early)
    assert sent_bytes(world) == sent
    repo = world.hub.repo(REPO)
    assert repo is not None
    assert repo.read(SHARDS[0], made.commit) == (world.folder / SHARDS[0]).read_bytes()


def test_nothing_is_sent_early_to_a_repository_that_is_yet_to_be_made_or_when_told_not_to(
    world: World, tmp_path: Path
) -> None:
    fresh = HubDestination(hub=world.connect(), repo_id="alice/fresh", wanted=Wanted(tag="v1"))
    fresh.inspect(lambda _line: None)
    assert fresh.send_early(tmp_path / "outbox", print) is None
    told = replace(destination_of(world), sends_early=False)
    assert told.send_early(tmp_path / "outbox", print) is None
    assert world.hub.repo("alice/fresh") is None


def test_a_failed_publish_after_early_shards_is_finished_by_a_rerun_that_sends_nothing(
    world: World, tmp_path: Path
) -> None:
    destination = destination_of(world)
    with merging(world, destination, [], tmp_path) as early:
        wait_for(lambda: SHARDS[0] in early._sent)
    world.hub.fail("commit", times=FOREVER)
    with pytest.raises(PublishError):
        release(world, destination, early)
    world.hub.heal()
    sent = sent_bytes(world)
    assert world.publish(tag="v2").created
    assert sent_bytes(world) == sent
