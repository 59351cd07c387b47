"""The whole action as the runner would start it, but as a process of this machine."""

from __future__ import annotations

import pytest

from tests.acceptance.warmth import Warmth
from tests.contract.runner_emulator import Runner
from tests.e2e import scenarios
from tests.e2e.scenarios import Stage
from tests.hub.server import LocalHub


@pytest.fixture
def stage(runner: Runner, hub: LocalHub, warmth: Warmth) -> Stage:
    token = hub.add_token("alice", role="write")
    return Stage(runner=runner, hub=hub, token=token, executor="process", environ=warmth.environ)


def test_publishes_a_verified_release_once(stage: Stage) -> None:
    scenarios.publishes_a_verified_release_once(stage)


def test_tells_every_bad_input_and_asks_nobody(stage: Stage) -> None:
    scenarios.tells_every_bad_input_and_asks_nobody(stage)


def test_refuses_to_publish_for_a_pull_request(stage: Stage) -> None:
    scenarios.refuses_to_publish_for_a_pull_request(stage)


def test_plans_without_a_token(stage: Stage) -> None:
    scenarios.plans_without_a_token(stage)


def test_fails_a_merge_that_was_never_applied(stage: Stage) -> None:
    scenarios.fails_a_merge_that_was_never_applied(stage)


def test_stops_when_it_is_cancelled(stage: Stage) -> None:
    scenarios.stops_when_it_is_cancelled(stage)
