"""A `.gitignore` in the target leaves no judged file out of the commit."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from runner.protocol.errors import PublishError
from tests.hub.faults import FOREVER, Kind
from tests.supervisor.publish.world import REPO, World

IGNORED = b"# build products\n*.safetensors\n*.json\n*.jinja\nLICENSE\n"


def with_gitignore(world: World) -> None:
    api = HfApi(endpoint=world.hub.endpoint, token=world.token)
    api.create_repo(REPO)
    api.create_commit(REPO, [CommitOperationAdd(".gitignore", IGNORED)], commit_message="Ignore what is built")


def test_the_client_alone_would_leave_files_out(world: World) -> None:
    with_gitignore(world)
    api = HfApi(endpoint=world.hub.endpoint, token=world.token)
    api.create_commit(REPO, [CommitOperationAdd("config.json", b"{}")], commit_message="By the client's own rules")
    assert "config.json" not in world.paths()


@pytest.mark.parametrize("is_staged", [False, True])
def test_every_judged_file_is_in_the_commit_whatever_a_gitignore_says(world: World, is_staged: bool) -> None:
    with_gitignore(world)
    assert world.publish(is_staged=is_staged).created
    judged = {path.relative_to(world.folder).as_posix() for path in world.folder.rglob("*") if path.is_file()}
    assert judged <= world.paths("v1.0.0")
    assert ".gitignore" in world.paths("v1.0.0")


@pytest.mark.parametrize("path", [".gitignore", "config.json"])
def test_a_commit_that_lost_a_file_of_anybodys_is_never_tagged(world: World, path: str) -> None:
    with_gitignore(world)
    world.hub.fail("commit", Kind.DROPPED, file=path)
    with pytest.raises(PublishError, match="does not hold what was sent"):
        world.publish()
    assert world.tags() == {}


@pytest.mark.parametrize("path", ["LICENSE", "model-00002-of-00002.safetensors"])
def test_a_hub_that_insists_is_refused_before_the_commit(world: World, path: str) -> None:
    with_gitignore(world)
    world.hub.fail("preupload", Kind.IGNORED, file=path, times=FOREVER)
    with pytest.raises(PublishError, match=path.replace(".", r"\.")) as caught:
        world.publish()
    assert "ignored" in str(caught.value)
    assert world.tags() == {}
    assert world.calls("commit") == 1  # the one that made the .gitignore
    world.hub.heal()
    assert world.publish().created
