"""Where a release goes: branches, staging, pull requests, moving aliases; each also after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from runner.protocol.errors import AccessDenied, PublishConflict, PublishError, RepoNotFound
from runner.supervisor.hub import Hub
from runner.supervisor.publish import staging
from tests.hub.faults import FOREVER, Kind
from tests.supervisor.publish.test_publish import intrude
from tests.supervisor.publish.world import REPO, World, make_folder, origin


def api_of(world: World) -> HfApi:
    return HfApi(endpoint=world.hub.endpoint, token=world.token)


def second(world: World, tmp_path: Path) -> World:
    """Return a publisher of another release, of which one shard is that of the first."""
    folder = make_folder(tmp_path / "second", seed=0)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"new" * 500_000)
    return replace(world, origin=origin("b" * 64), folder=folder)


def heads(world: World) -> dict[str, str]:
    repo = world.hub.repo(REPO)
    assert repo is not None
    return repo.branches


# Another branch


def test_a_release_goes_to_the_branch_that_is_asked_for_and_main_stays(world: World, tmp_path: Path) -> None:
    world.publish()
    main = heads(world)["main"]
    release = second(world, tmp_path).publish(tag="v2", branch="next")
    assert heads(world) == {"main": main, "next": release.commit}
    assert world.tags()["v2"] == release.commit
    assert world.commits() == 2


def test_a_branch_that_exists_gets_the_commit_on_its_own_head(world: World, tmp_path: Path) -> None:
    world.publish()
    api_of(world).create_branch(REPO, branch="next")
    api_of(world).create_commit(REPO, [CommitOperationAdd("mine.txt", b"x")], commit_message="x", revision="next")
    release = second(world, tmp_path).publish(tag="v2", branch="next")
    assert "mine.txt" in world.paths(release.commit)
    assert "mine.txt" not in world.paths("main")


@pytest.mark.parametrize("kind", [Kind.STATUS, Kind.APPLIED_RESET])
def test_a_branch_is_started_once_whatever_becomes_of_the_answer(world: World, tmp_path: Path, kind: Kind) -> None:
    world.publish()
    world.hub.fail("create-branch", kind)
    assert second(world, tmp_path).publish(tag="v2", branch="next").commit == heads(world)["next"]


# By way of a staging branch


def test_a_staged_release_changes_main_only_after_the_tag(world: World, tmp_path: Path) -> None:
    first = world.publish()
    world.hub.forget_requests()
    release = second(world, tmp_path).publish(tag="v2", is_staged=True)
    assert set(heads(world)) == {"main"}
    assert world.tags() == {"v1.0.0": first.commit, "v2": release.commit}
    assert heads(world)["main"] != release.commit  # a commit of pointers to the same files
    assert world.hub.repo(REPO).tree("main") == world.hub.repo(REPO).tree("v2")  # type: ignore[union-attr]
    order = [exchange.endpoint for exchange in world.hub.exchanges()]
    tagged = order.index("create-tag")
    assert order[:tagged].count("commit") == order[tagged:].count("commit") == 1
    assert world.sent("PUT", "") == 1  # the one new shard, once


def test_a_staged_release_into_a_new_repository(world: World) -> None:
    release = world.publish(is_staged=True)
    assert set(heads(world)) == {"main"}
    assert world.hub.repo(REPO).tree("main") == world.hub.repo(REPO).tree(release.commit)  # type: ignore[union-attr]


def test_what_the_hub_stored_wrongly_reaches_neither_main_nor_a_tag(world: World, tmp_path: Path) -> None:
    first = world.publish()
    world.hub.fail("commit", Kind.DAMAGED, file="config.json")
    other = second(world, tmp_path)
    (other.folder / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(PublishError, match=r"config\.json is other content"):
        other.publish(tag="v2", is_staged=True)
    assert heads(world)["main"] == first.commit
    assert world.tags() == {"v1.0.0": first.commit}


@pytest.mark.parametrize("endpoint", ["create-branch", "commit", "create-tag", "delete-branch"])
@pytest.mark.parametrize("kind", [Kind.STATUS, Kind.APPLIED_RESET, Kind.RESET_AFTER])
def test_a_staged_release_survives_a_failure(world: World, tmp_path: Path, endpoint: str, kind: Kind) -> None:
    world.publish()
    world.hub.fail(endpoint, kind)
    release = second(world, tmp_path).publish(tag="v2", is_staged=True)
    assert len(world.hub.fired()) == 1
    assert set(heads(world)) == {"main"}
    assert world.tags()["v2"] == release.commit
    assert world.commits() == 3


@pytest.mark.parametrize(
    "endpoint, nth", [("create-branch", 1), ("commit", 1), ("create-tag", 1), ("commit", 2), ("delete-branch", 1)]
)
def test_a_staged_release_that_was_interrupted_is_finished_by_the_next_run(
    world: World, tmp_path: Path, endpoint: str, nth: int
) -> None:
    world.publish()
    other = second(world, tmp_path)
    world.hub.fail(endpoint, nth=nth, times=FOREVER)
    with pytest.raises(PublishError):
        other.publish(tag="v2", is_staged=True)
    world.hub.heal()
    release = other.publish(tag="v2", is_staged=True)
    assert set(heads(world)) == {"main"}
    assert world.tags()["v2"] == release.commit
    assert world.hub.repo(REPO).tree("main") == world.hub.repo(REPO).tree("v2")  # type: ignore[union-attr]
    assert world.commits() == 3


def test_main_that_moved_after_the_tag_is_left_and_the_release_stands(world: World, tmp_path: Path) -> None:
    world.publish()
    world.hub.fail("commit", nth=2, times=FOREVER)
    other = second(world, tmp_path)
    with pytest.raises(PublishError, match="The release is complete"):
        other.publish(tag="v2", is_staged=True)
    world.hub.heal()
    intrude(world.hub, str(world.token))
    with pytest.raises(PublishConflict, match="since the release was staged") as caught:
        other.publish(tag="v2", is_staged=True)
    assert "The release is complete" in str(caught.value)
    assert "note.txt" in world.paths("main")
    assert "v2" in world.tags()


def test_a_staging_branch_with_other_content_is_not_touched(world: World, tmp_path: Path) -> None:
    world.publish()
    api_of(world).create_branch(REPO, branch="staging/v2")
    api_of(world).create_commit(
        REPO, [CommitOperationAdd("theirs.txt", b"x")], commit_message="x", revision="staging/v2"
    )
    before = heads(world)
    with pytest.raises(PublishConflict, match="holds other content"):
        second(world, tmp_path).publish(tag="v2", is_staged=True)
    assert heads(world) == before
    assert set(world.tags()) == {"v1.0.0"}


def test_who_commits_to_main_while_a_staged_release_goes_there_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish()

    def copies(*args: Any) -> Any:
        intrude(world.hub, str(world.token))  # after the head was read, before the commit on it
        return original(*args)

    original = staging._copies
    monkeypatch.setattr(staging, "_copies", copies)
    with pytest.raises(PublishConflict, match="Somebody else committed during this run, or"):
        second(world, tmp_path).publish(tag="v2", is_staged=True)
    assert "note.txt" in world.paths("main")
    assert "v2" in world.tags()


def test_who_starts_the_staging_branch_at_the_same_time_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish()
    api = api_of(world)

    def create_branch(self: Hub, repo_id: str, branch: str, head: str, **options: Any) -> Any:
        api.create_branch(repo_id, branch=branch)
        api.create_commit(repo_id, [CommitOperationAdd("x.txt", b"x")], commit_message="x", revision=branch)
        return original(self, repo_id, branch, head, **options)

    original = Hub.create_branch
    monkeypatch.setattr(Hub, "create_branch", create_branch)
    with pytest.raises(PublishConflict, match="was not there, and is now, at commit"):
        second(world, tmp_path).publish(tag="v2", is_staged=True)
    assert set(world.tags()) == {"v1.0.0"}


# Pull requests


def pulls(world: World) -> dict[str, str]:
    repo = world.hub.repo(REPO)
    assert repo is not None
    return repo.pulls


def test_a_pull_request_is_opened_once_and_nothing_is_tagged(world: World, tmp_path: Path) -> None:
    world.publish()
    main = heads(world)["main"]
    other = second(world, tmp_path)
    proposed = other.publish(tag="v2", create_pr=True)
    again = other.publish(tag="v2", create_pr=True)
    assert (proposed.tag, proposed.created, again.created) == ("", True, False)
    assert proposed.pull_request == again.pull_request
    assert list(pulls(world).values()) == [proposed.commit] == [again.commit]
    assert heads(world) == {"main": main}
    assert set(world.tags()) == {"v1.0.0"}


def test_a_merged_pull_request_is_tagged_by_the_next_run(world: World, tmp_path: Path) -> None:
    world.publish()
    other = second(world, tmp_path)
    other.publish(tag="v2", create_pr=True)
    (ref,) = pulls(world)
    api_of(world).merge_pull_request(REPO, int(ref.rpartition("/")[2]))
    release = other.publish(tag="v2", create_pr=True)
    assert release.tag == "v2"
    assert world.tags()["v2"] == release.commit == heads(world)["main"]
    assert len(pulls(world)) == 1


def test_a_pull_request_whose_answer_is_lost_is_found_and_not_opened_again(world: World, tmp_path: Path) -> None:
    world.publish()
    world.hub.fail("commit", Kind.APPLIED_RESET)
    proposed = second(world, tmp_path).publish(tag="v2", create_pr=True)
    assert list(pulls(world).values()) == [proposed.commit]


def test_who_may_not_write_may_propose(world: World, tmp_path: Path) -> None:
    public = tmp_path / "seed"
    public.mkdir()
    (public / "config.json").write_text("{}")
    world.hub.add_model(REPO, public)
    stranger = replace(second(world, tmp_path), token=world.hub.add_token("mallory"))
    with pytest.raises(AccessDenied):
        stranger.publish(tag="v2")
    assert stranger.publish(tag="v2", create_pr=True).pull_request is not None
    assert len(pulls(world)) == 1


def test_a_pull_request_needs_the_branch_that_it_goes_to(world: World) -> None:
    world.connect().create_repo(REPO, private=True)
    with pytest.raises(PublishError, match="has no branch other"):
        world.publish(create_pr=True, branch="other")


def test_a_pull_request_needs_a_repository(world: World) -> None:
    with pytest.raises(RepoNotFound, match="no pull request"):
        world.publish(create_pr=True)
    assert world.hub.repo(REPO) is None


# What is there already


def test_replacing_a_tag_tells_both_digests(world: World, tmp_path: Path) -> None:
    first = world.publish()
    lines: list[str] = []
    again = second(world, tmp_path).publish(on_existing_tag="replace", log=lines.append)
    told = "\n".join(lines)
    assert str(first.merged_digest) in told
    assert str(again.merged_digest) in told


def test_large_files_that_another_revision_holds_are_copied_there_not_sent(world: World, tmp_path: Path) -> None:
    world.publish()
    api_of(world).delete_file("model-00002-of-00002.safetensors", REPO)
    world.hub.forget_requests()
    release = second(world, tmp_path).publish(on_existing_tag="replace")
    assert world.sent("PUT", "") == 1  # the new shard
    assert "model-00002-of-00002.safetensors" in world.paths(release.commit)
    assert world.calls("lfs-batch") == 1
