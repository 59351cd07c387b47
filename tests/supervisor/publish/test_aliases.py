"""Tags that move with every release."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.protocol.errors import HubError, PublishError
from tests.hub.faults import FOREVER, Kind
from tests.supervisor.publish.test_targets import api_of, second
from tests.supervisor.publish.world import REPO, World


def test_aliases_are_made_and_moved_after_the_tag(world: World, tmp_path: Path) -> None:
    first = world.publish(also_tags=("latest", "v1"))
    assert world.tags() == dict.fromkeys(("v1.0.0", "latest", "v1"), first.commit)
    lines: list[str] = []
    newer = second(world, tmp_path).publish(tag="v2.0.0", also_tags=("latest",), log=lines.append)
    assert world.tags() == {"v1.0.0": first.commit, "v1": first.commit, "v2.0.0": newer.commit, "latest": newer.commit}
    assert any("latest" in line and first.commit in line and newer.commit in line for line in lines)


def test_an_interrupted_alias_is_finished_by_the_next_run_without_a_second_commit(world: World, tmp_path: Path) -> None:
    world.publish(also_tags=("latest",))
    other = second(world, tmp_path)
    world.hub.fail("create-tag", nth=2, times=FOREVER)
    with pytest.raises(PublishError, match="The release is complete"):
        other.publish(tag="v2", also_tags=("latest",))
    world.hub.heal()
    release = other.publish(tag="v2", also_tags=("latest",))
    assert not release.created
    assert world.tags()["latest"] == release.commit
    assert world.commits() == 2


def test_a_rerun_of_an_old_release_does_not_take_an_alias_back(world: World, tmp_path: Path) -> None:
    world.publish(also_tags=("latest",))
    newer = second(world, tmp_path).publish(tag="v2", also_tags=("latest",))
    lines: list[str] = []
    world.publish(also_tags=("latest",), log=lines.append)
    assert world.tags()["latest"] == newer.commit
    assert "not older" in lines[-1]


@pytest.mark.parametrize("endpoint", ["create-tag", "delete-tag"])
def test_an_alias_whose_answer_is_lost_is_not_moved_twice(world: World, tmp_path: Path, endpoint: str) -> None:
    world.publish(also_tags=("latest",))
    world.hub.forget_requests()
    world.hub.fail(endpoint, Kind.APPLIED_RESET, nth=2 if endpoint == "create-tag" else 1)
    release = second(world, tmp_path).publish(tag="v2", also_tags=("latest",))
    assert world.tags()["latest"] == release.commit
    assert world.calls("create-tag") == 2
    assert world.calls("delete-tag") == 1


def test_an_alias_named_like_a_branch_is_refused_before_any_work(world: World) -> None:
    world.publish()
    api_of(world).create_branch(REPO, branch="stable")
    with pytest.raises(HubError, match="has a branch 'stable'"):
        world.publish(tag="v2", also_tags=("stable",), before=lambda: pytest.fail("worked"))
