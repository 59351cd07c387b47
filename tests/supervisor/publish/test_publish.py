"""The publisher against a Hub on a real socket, when nothing goes wrong on the way."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from runner.protocol.errors import PublishConflict, PublishError, TagExists
from runner.protocol.verdict import Status
from tests.hub.server import LocalHub
from tests.supervisor.publish.world import CARD, REPO, World, make_folder, origin, verdict


def intrude(hub: LocalHub, token: str, path: str = "note.txt") -> None:
    """Commit to the target as another client would."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=hub.endpoint, token=token)
    operation = CommitOperationAdd(path, b"hello")
    api.create_commit(REPO, [operation], commit_message="by somebody else", revision="main")


def test_publishes_one_commit_and_one_tag_in_a_new_private_repository(world: World) -> None:
    release = world.publish(commit_message="First release\n\nWith details.")
    repo = world.hub.repo(REPO)
    assert repo is not None
    assert repo.private
    assert world.commits() == 1
    assert repo.tags == {"v1.0.0": release.commit} == {"v1.0.0": repo.branches["main"]}
    assert release.created
    assert release.url == f"{world.hub.endpoint}/{REPO}/tree/v1.0.0"
    assert repo.commit("main").title == "First release"
    tree = repo.tree("v1.0.0")
    for path in (path for path in world.folder.rglob("*") if path.is_file()):
        name = path.relative_to(world.folder).as_posix()
        assert repo.read(name, "v1.0.0") == path.read_bytes()
    for shard in world.folder.glob("*.safetensors"):
        assert tree[shard.name] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert repo.read("README.md") == CARD
    assert json.loads(repo.read("merge-manifest.json"))["input_digest"] == world.origin.input_digest()


def test_preflight_leaves_no_trace(world: World) -> None:
    target = world.connect().inspect_target(REPO, "v1.0.0")
    assert not target.exists
    assert world.hub.repo(REPO) is None
    assert all(method in ("GET", "HEAD") for method, _ in world.hub.requests())


def test_publishes_into_an_existing_public_repository_and_keeps_its_own_files(world: World, tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    (seed / "images").mkdir(parents=True)
    (seed / "images" / "plot.png").write_bytes(b"png")
    (seed / "notes.md").write_text("notes")
    world.hub.add_model(REPO, seed)
    before = world.commits()
    release = world.publish()
    assert world.commits() == before + 1
    assert {"images/plot.png", "notes.md", ".gitattributes", "config.json"} <= world.paths(release.commit)


def test_same_inputs_and_same_tag_do_nothing(world: World) -> None:
    first = world.publish()
    world.hub.forget_requests()
    again = world.publish(before=lambda: pytest.fail("work was done"))
    assert again == replace(first, created=False)
    assert world.commits() == 1
    assert all(method in ("GET", "HEAD") for method, _ in world.hub.requests())


def test_same_tag_with_other_inputs_is_refused_and_changes_nothing(world: World) -> None:
    world.publish()
    other = replace(world, origin=origin("b" * 64))
    world.hub.forget_requests()
    with pytest.raises(TagExists, match="other inputs") as caught:
        other.publish()
    assert "Nothing was written" in str(caught.value)
    assert world.commits() == 1
    assert all(method in ("GET", "HEAD") for method, _ in world.hub.requests())


def test_a_tag_that_something_else_made_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "config.json").write_text("{}")
    commit = world.hub.add_model(REPO, tmp_path / "seed")
    world.connect()._api.create_tag(REPO, tag="v1.0.0", revision=commit, token=world.token)
    with pytest.raises(TagExists, match="something else published it"):
        world.publish()


def test_a_tag_whose_files_are_not_what_its_manifest_says_is_refused(world: World) -> None:
    world.publish()
    api = world.connect()._api
    intrude_name = "model-00001-of-00002.safetensors"
    from huggingface_hub import CommitOperationAdd

    moved = api.create_commit(REPO, [CommitOperationAdd(intrude_name, b"x" * 2_000_000)], commit_message="evil")
    api.delete_tag(REPO, tag="v1.0.0")
    api.create_tag(REPO, tag="v1.0.0", revision=moved.oid)
    with pytest.raises(TagExists, match="not what its manifest says"):
        world.publish()


def test_skip_keeps_the_tag_that_is_there(world: World) -> None:
    first = world.publish()
    other = replace(world, origin=origin("b" * 64))
    found = other.publish(on_existing_tag="skip", before=lambda: pytest.fail("work was done"))
    assert found == replace(first, created=False, status=None, merged_digest=None)
    assert world.commits() == 1


def test_replace_makes_a_new_commit_and_moves_the_tag_to_it(world: World, tmp_path: Path) -> None:
    first = world.publish()
    lines: list[str] = []
    other = replace(world, origin=origin("b" * 64), folder=make_folder(tmp_path / "other", seed=1))
    second = other.publish(on_existing_tag="replace", log=lines.append)
    assert world.tags() == {"v1.0.0": second.commit}
    assert second.commit != first.commit
    assert world.commits() == 2
    assert any(first.commit in line and second.commit in line for line in lines)


def test_a_second_release_removes_stale_files_in_the_same_commit(world: World, tmp_path: Path) -> None:
    first = world.publish()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(b"weights" * 300_000)
    (tmp_path / "one" / "config.json").write_text('{"model_type": "llama"}')
    second = replace(world, origin=origin("b" * 64), folder=tmp_path / "one").publish(tag="v2.0.0")
    assert world.commits() == 2
    kept = {".gitattributes", "README.md", "merge-manifest.json", "config.json", "model.safetensors"}
    assert world.paths(second.commit) == kept  # LICENSE came with the first release, so it goes too
    assert "model-00001-of-00002.safetensors" in world.paths(first.commit)
    assert world.tags() == {"v1.0.0": first.commit, "v2.0.0": second.commit}


def test_the_pictures_of_an_earlier_release_go_in_the_same_commit(world: World, tmp_path: Path) -> None:
    world.publish(pictures={"merge-report/old.png": b"1", "merge-report/both.png": b"2"})
    world.origin = origin("b" * 64)

    world.publish(tag="v2", pictures={"merge-report/both.png": b"3"})

    assert "merge-report/old.png" in world.paths("v1.0.0")
    assert {path for path in world.paths("v2") if path.startswith("merge-report/")} == {"merge-report/both.png"}
    assert world.commits() == 2


def test_unchanged_shards_are_not_sent_again(world: World, tmp_path: Path) -> None:
    world.publish()
    folder = make_folder(tmp_path / "again")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"new" * 500_000)
    world.hub.forget_requests()
    replace(world, origin=origin("b" * 64), folder=folder).publish(tag="v1.1.0")
    assert world.sent("PUT", "") == 1


def test_pickled_weights_of_an_earlier_upload_are_removed(world: World, tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "pytorch_model.bin").write_bytes(b"pickle")
    world.hub.add_model(REPO, tmp_path / "seed")
    world.publish()
    assert "pytorch_model.bin" not in world.paths()


@pytest.mark.parametrize("tag", ["pkg/v1.2", "v1.2.0+build.7", "v1-ß"])
def test_a_tag_with_special_characters_is_published(world: World, tag: str) -> None:
    release = world.publish(tag=tag)
    assert world.tags() == {tag: release.commit}
    assert not world.publish(tag=tag).created


def test_progress_counts_bytes_up_to_all_of_them(world: World) -> None:
    calls: list[tuple[int, int]] = []
    world.publish(on_progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 3_900_000
    assert len(calls) == 3  # before, and after each shard


@pytest.mark.parametrize("status", [Status.FAIL, Status.NOT_VERIFIED])
def test_refuses_without_a_passed_verdict(world: World, status: Status) -> None:
    with pytest.raises(PublishError, match=f"the verdict is {status}"):
        world.publish(judged=verdict(status))
    assert world.hub.repo(REPO) is None


def test_refuses_a_file_that_shrank_after_it_was_judged(world: World) -> None:
    from runner.supervisor.publish import Wanted, publish

    hub = world.connect()
    from runner.protocol.digests import digest_folder

    files = digest_folder(world.folder)
    (world.folder / "config.json").write_text("{}")
    with pytest.raises(PublishError, match=r"config.json is not the file that was judged"):
        publish(
            hub,
            target=hub.inspect_target(REPO, "v1"),
            folder=world.folder,
            files=files,
            documents={"README.md": CARD, "merge-manifest.json": b"{}"},
            wanted=Wanted(tag="v1"),
            verdict=verdict(),
            input_digest="0" * 64,
        )
    assert world.hub.repo(REPO) is None


def test_a_file_changed_in_place_after_it_was_judged_is_never_tagged(world: World) -> None:
    from runner.protocol.digests import digest_folder
    from runner.supervisor.publish import Wanted, publish

    hub = world.connect()
    files = digest_folder(world.folder)
    (world.folder / "config.json").write_text('{"model_type": "LLAMA"}')  # of the same size
    with pytest.raises(PublishError):
        publish(
            hub,
            target=hub.inspect_target(REPO, "v1"),
            folder=world.folder,
            files=files,
            documents={"README.md": CARD, "merge-manifest.json": b"{}"},
            wanted=Wanted(tag="v1"),
            verdict=verdict(),
            input_digest="0" * 64,
        )
    assert world.tags() == {}


def test_a_commit_by_somebody_else_during_the_upload_is_a_conflict_and_is_kept(world: World) -> None:
    world.publish()
    token = str(world.token)

    def on_progress(done: int, total: int) -> None:
        if done == total:
            intrude(world.hub, token)

    other = replace(world, origin=origin("b" * 64))
    with pytest.raises(PublishConflict, match="is not where it was read") as caught:
        other.publish(tag="v2.0.0", on_progress=on_progress)
    assert "not on the Hub" in str(caught.value)
    assert set(world.tags()) == {"v1.0.0"}
    assert world.commits() == 2  # the first release and theirs
    assert "note.txt" in world.paths()
    world.hub.forget_requests()
    assert other.publish(tag="v2.0.0").created
    assert "note.txt" in world.paths("v2.0.0")


def test_the_tag_is_on_the_releases_commit_even_when_main_moves_on_before_it_is_set(world: World) -> None:
    world.publish()
    token = str(world.token)

    def log(line: str) -> None:
        if "Moving the tag" in line:  # between commit and tag
            intrude(world.hub, token)

    release = replace(world, origin=origin("b" * 64)).publish(on_existing_tag="replace", log=log)
    repo = world.hub.repo(REPO)
    assert repo is not None
    assert repo.tags == {"v1.0.0": release.commit}
    assert repo.branches["main"] != release.commit
    assert "note.txt" not in repo.tree("v1.0.0")


def test_a_tag_that_somebody_else_makes_during_the_run_is_never_moved(world: World) -> None:
    first = world.publish()
    api = world.connect()._api

    def on_progress(done: int, total: int) -> None:
        if done == total:
            api.create_tag(REPO, tag="v2.0.0", revision=first.commit)

    with pytest.raises(PublishConflict, match=r"The tag v2\.0\.0 .* is not where it was read") as caught:
        replace(world, origin=origin("b" * 64)).publish(tag="v2.0.0", on_progress=on_progress)
    assert "holds the whole release" in str(caught.value)
    assert world.tags() == {"v1.0.0": first.commit, "v2.0.0": first.commit}


def test_the_repository_that_an_unmerged_adapter_lives_in_is_refused(world: World, tmp_path: Path) -> None:
    from runner.protocol.errors import HubError

    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "adapter_config.json").write_text("{}")
    world.hub.add_model(REPO, tmp_path / "seed")
    with pytest.raises(HubError, match="holds an adapter"):
        world.publish()


def test_a_tag_named_like_a_branch_is_refused(world: World) -> None:
    from runner.protocol.errors import HubError

    world.publish()
    world.connect()._api.create_branch(REPO, branch="next")
    with pytest.raises(HubError, match="has a branch 'next'"):
        world.publish(tag="next")
