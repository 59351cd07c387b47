"""The whole action in its image, started as GitHub's runner starts it, and by plain `docker run`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

import pytest

from tests.contract.runner_emulator import Event, Runner
from tests.e2e import scenarios
from tests.e2e.scenarios import REPO, Stage
from tests.hub.server import LocalHub

pytestmark = pytest.mark.docker


@pytest.fixture
def stage(image: str, runner: Runner, hub: LocalHub) -> Stage:
    token = hub.add_token("alice", role="write")
    return Stage(runner=runner, hub=hub, token=token, executor="docker", image=image)


def docker_run(stage: Stage, *arguments: str, env: Mapping[str, str], before: tuple[str, ...] = ()) -> tuple[int, str]:
    names = [part for name in env for part in ("-e", name)]
    mount = ["-v", f"{stage.runner.workspace}:/github/workspace"]
    command = ["docker", "run", "--rm", "--network", "host", *mount, *names, *before, str(stage.image), *arguments]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_publishes_a_verified_release_once(stage: Stage) -> None:
    os.chown(stage.runner.workspace, 1000, 1000)  # the runner's user, as on every self-hosted machine

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


def test_a_path_of_the_host_arrives_as_one_of_the_container(stage: Stage) -> None:
    folder = str(stage.runner.workspace / "adapter")  # what `${{ github.workspace }}/adapter` is on the host

    result = stage.run(Event.dispatch(), mode="plan", adapter_path=folder)

    assert result.exit_code == 0, result.log


def test_plain_docker_run_needs_nothing_of_github(stage: Stage) -> None:
    flags = ["--adapter-path", "adapter", "--base-model=base", "--target-repo", REPO, "--tag", "v2", "--device", "cpu"]

    code, log = docker_run(stage, *flags, env=stage.hub.env(stage.token))

    repo = stage.hub.repo(REPO)
    assert code == 0, log
    assert repo is not None
    assert "v2" in repo.tags
    assert "verified: true" in log
    assert not [line for line in log.splitlines() if line.lstrip().startswith("::")]
    assert stage.token not in log
    assert (stage.runner.workspace / "lora-merge-report" / "report.json").is_file()


def test_plain_docker_run_takes_the_inputs_of_the_workflow_too(stage: Stage) -> None:
    inputs = {"INPUT_ADAPTER-PATH": "adapter", "INPUT_BASE-MODEL": "base", "INPUT_MODE": "plan", "INPUT_DEVICE": "cpu"}

    code, log = docker_run(stage, env={**stage.hub.env(), **inputs})

    assert code == 0, log
    assert "Plan" in log


def test_help_needs_no_inputs(stage: Stage) -> None:
    code, log = docker_run(stage, "--help", env={})

    assert code == 0
    assert "--adapter-path" in log


def test_the_image_keeps_what_other_runners_need(stage: Stage) -> None:
    # Kubernetes runners replace the command by `tail` and start the step through `sh` and `env`.
    code, log = docker_run(
        stage, "-c", "env true && tail -n 0 /dev/null && id -u", env={}, before=("--entrypoint", "sh")
    )

    assert (code, log.strip()) == (0, "0")
