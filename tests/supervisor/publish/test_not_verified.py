"""A merge that could not be judged wholly is published only where the user allows it, and says so."""

from __future__ import annotations

import pytest

from runner.protocol.errors import PublishError
from runner.protocol.verdict import Status
from tests.supervisor.publish.world import World, verdict


def test_what_was_not_verified_is_published_where_that_is_allowed_and_says_so(world: World) -> None:
    with pytest.raises(PublishError, match="the verdict is FAIL"):
        world.publish(judged=verdict(Status.FAIL), allow_not_verified=True)
    release = world.publish(judged=verdict(Status.NOT_VERIFIED), allow_not_verified=True)
    assert (release.created, release.status) == (True, Status.NOT_VERIFIED)
    again = world.publish(judged=verdict(Status.NOT_VERIFIED), allow_not_verified=True)
    assert (again.created, again.status) == (False, Status.NOT_VERIFIED)
