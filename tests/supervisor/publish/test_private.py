"""`private: true` holds from the first byte, whoever else works on the repository."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi

from runner.protocol.errors import PublishConflict
from tests.supervisor.publish.world import REPO, World, origin


def api(world: World) -> HfApi:
    return HfApi(endpoint=world.hub.endpoint, token=world.token)


def test_a_repository_that_somebody_created_public_meanwhile_receives_nothing(world: World) -> None:
    with pytest.raises(PublishConflict, match="is public, and must be private") as caught:
        world.publish(before=lambda: api(world).create_repo(REPO, private=False))
    assert "Nothing of this release was sent" in str(caught.value)
    assert world.calls("preupload") == world.calls("commit") == world.sent("PUT", "") == 0
    assert world.tags() == {}


def test_both_ways_out_lead_to_a_release(world: World) -> None:
    with pytest.raises(PublishConflict):
        world.publish(before=lambda: api(world).create_repo(REPO, private=False))
    assert world.publish(private=False, tag="v1").created
    api(world).update_repo_settings(REPO, private=True)
    assert world.publish(tag="v2").created
    assert world.hub.repo(REPO).private  # type: ignore[union-attr]


def test_a_repository_that_becomes_public_before_the_tag_is_not_tagged(world: World) -> None:
    world.publish(tag="v0")
    shown = iter([True])

    def publish_it(_done: int, _total: int) -> None:
        if next(shown, False):
            api(world).update_repo_settings(REPO, private=False)

    (world.folder / "config.json").write_text('{"model_type": "other"}')
    world.origin = origin("c" * 64)
    with pytest.raises(PublishConflict, match="is public") as caught:
        world.publish(tag="v1", on_progress=publish_it)
    assert "the tag v1 does not exist" in str(caught.value)
    assert set(world.tags()) == {"v0"}


def test_a_public_repository_stays_what_it_was(world: World) -> None:
    api(world).create_repo(REPO, private=False)
    assert world.publish().created
