"""Every workflow in examples/ does what its first line says, under a simulator of GitHub's runner."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import BASE_IMAGE
from tests.e2e.simulator import EXAMPLES, Played, build_runner_image, event, play
from tests.hub.identity import IdentityProvider
from tests.hub.server import LocalHub

pytestmark = pytest.mark.docker

Play = Callable[..., Played]
NAMES = {
    "you/your-model": "alice/model",
    "you/your-adapter": "alice/adapter",
    "you/merged": "alice/model",
    "them/gated-base": "acme/gated",
    "them/base": "acme/base",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[LocalHub]:
    """Return a Hub with an open and a gated base of acme's, and an adapter of alice's."""
    with LocalHub.start(tmp_path_factory.mktemp("hub")) as running:
        for name in ("alice", "acme"):
            running.add_user(name)
        for repo_id in ("acme/base", "acme/gated"):
            running.add_model(repo_id, models / "base")
        running.gate("acme/gated", mode="auto")
        adapter = _adapter(models, tmp_path_factory.mktemp("adapter") / "adapter")
        running.add_model("alice/adapter", adapter)
        yield running


@pytest.fixture(scope="module")
def runner_image(tmp_path_factory: pytest.TempPathFactory, image: str) -> str:
    base = os.environ.get(BASE_IMAGE, "python:3.11-slim-bookworm")
    return build_runner_image(tmp_path_factory.mktemp("image") / "runner", base=base, name=f"{image}-runner")


@pytest.fixture(scope="module")
def simulate(
    tmp_path_factory: pytest.TempPathFactory, models: Path, hub: LocalHub, image: str, runner_image: str
) -> Play:
    root = tmp_path_factory.mktemp("repository")
    checkout = root / "adapters"
    for place in ("adapter", "adapters/formal", "adapters/friendly"):
        _adapter(models, checkout / place)
    secrets = {"HF_TOKEN": hub.add_token("alice", role="write")}

    def run(
        example: str, happening: Mapping[str, Any], identity: Mapping[str, str] | None = None, **more: str
    ) -> Played:
        names = {
            **NAMES,
            **({"you/your-model": "alice/keyless"} if identity else {}),
            "registry.example/org/lora-merge-action:v1.0.0": image,
        }
        return play(
            example, happening, checkout=checkout, image=image, runner_image=runner_image, hub=hub,
            secrets={} if identity else {**secrets, **more}, names=names, identity=identity,
        )  # fmt: skip

    return run


def _adapter(models: Path, folder: Path) -> Path:
    shutil.copytree(models / "adapter", folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "acme/base"}))
    return folder


def _pushed(tag: str) -> dict[str, Any]:
    return event("push", ref=f"refs/tags/{tag}", created=True)


def _tags(hub: LocalHub, repo_id: str) -> set[str]:
    repo = hub.repo(repo_id)
    return set() if repo is None else set(repo.tags)


@pytest.fixture(scope="module")
def released(simulate: Play) -> Played:
    """Return how the example of a release ended; `alice/model` has the tag v1.0.0 then."""
    return simulate("release.yml", event("release", action="published", release={"tag_name": "v1.0.0", "draft": False}))


def test_a_release_is_published_under_its_tag(released: Played, hub: LocalHub) -> None:
    repo = hub.repo("alice/model")

    assert released.code == 0, released.log
    assert repo is not None
    assert f"at {repo.tags['v1.0.0']}" in released.log


def test_a_published_merge_is_judged(released: Played, simulate: Play, hub: LocalHub) -> None:
    reader = hub.add_token("alice", role="read")

    played = simulate("verify.yml", event("workflow_dispatch", ref="refs/heads/main"), HF_READ=reader)

    assert played.code == 0, played.log
    assert "PASS, 0 stored elements are not what they must be" in played.log


def test_a_matrix_releases_every_adapter(simulate: Play, hub: LocalHub) -> None:
    played = simulate("matrix.yml", _pushed("v2.0.0"))

    assert played.code == 0, played.log
    assert _tags(hub, "alice/model-formal") == _tags(hub, "alice/model-friendly") == {"v2.0.0"}


def test_a_gated_base_is_read_with_its_own_token(simulate: Play, hub: LocalHub) -> None:
    hub.add_user("carol")
    refused = simulate("gated-base.yml", _pushed("v3.0.0"), HF_READ=hub.add_token("carol", role="read"))
    assert hub.ask_access("acme/gated", "carol") == "accepted"

    played = simulate("gated-base.yml", _pushed("v3.0.0"), HF_READ=hub.add_token("carol", role="read"))

    assert refused.code != 0
    assert "acme/gated" in refused.log
    assert played.code == 0, played.log
    assert "v3.0.0" in _tags(hub, "alice/model")


def test_the_image_of_the_action_is_a_jobs_own_container(simulate: Play, hub: LocalHub) -> None:
    played = simulate("kubernetes.yml", _pushed("v4.0.0"))

    assert played.code == 0, played.log
    assert "v4.0.0" in _tags(hub, "alice/model")


def test_a_pull_request_shows_its_plan(simulate: Play, hub: LocalHub) -> None:
    before = _tags(hub, "alice/model")
    pull = {"number": 7, "head": {"ref": "topic", "repo": {"full_name": "alice/adapters"}}, "base": {"ref": "main"}}

    played = simulate("plan-on-pull-request.yml", event("pull_request", action="opened", number=7, pull_request=pull))

    assert played.code == 0, played.log
    assert "gh pr comment 7 --repo alice/adapters --body-file plan/report.md" in played.log
    assert "### Plan" in played.log
    assert _tags(hub, "alice/model") == before


def test_a_job_with_an_identity_publishes_without_a_secret(simulate: Play, hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("To be filled by releases.")
    hub.add_model("alice/keyless", tmp_path)
    with IdentityProvider.start("alice/adapters", ref="refs/tags/v5.0.0") as provider:
        hub.trust("alice/keyless", provider.issuer, repository="alice/adapters")
        released = event("release", action="published", release={"tag_name": "v5.0.0", "draft": False})

        played = simulate("keyless.yml", released, identity=provider.env())

    assert played.code == 0, played.log
    assert _tags(hub, "alice/keyless") == {"v5.0.0", "latest"}


def test_every_example_is_played_here() -> None:
    played = Path(__file__).read_text("utf-8")

    assert [path.name for path in EXAMPLES.glob("*.yml") if f'"{path.name}"' not in played] == []
