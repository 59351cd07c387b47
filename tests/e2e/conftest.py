"""A tiny real base and adapter, a Hub on loopback, and the image where an engine answers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.contract.runner_emulator import ROOT, Runner
from tests.hub.server import LocalHub
from tests.judge.tiny import lora, save_adapter, save_base

# By the checkout's own path, so that the tests of two checkouts on one machine do not take each other's image.
CHECKOUT = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
IMAGE = os.environ.get("LORA_MERGE_TEST_IMAGE", f"lora-merge-action:test-{CHECKOUT}")
REQUIRED = "LORA_MERGE_REQUIRE_ENGINE"
BASE_IMAGE = "LORA_MERGE_TEST_BASE_IMAGE"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base` and `adapter`."""
    root = tmp_path_factory.mktemp("models")
    base = save_base(root / "base", "llama")
    save_adapter(root / "adapter", base, lora())
    return root


@pytest.fixture
def runner(tmp_path: Path, models: Path) -> Runner:
    """Return a runner whose workspace holds `base` and `adapter`."""
    runner = Runner(tmp_path / "runner")
    for name in ("base", "adapter"):
        shutil.copytree(models / name, runner.workspace / name)
    return runner


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub.start(tmp_path / "hub") as running:
        running.add_user("alice")
        yield running


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the name of the image, built from this checkout by the builder that every host has.

    The image that had the name before, of an older state of the checkout, is removed: nothing names it any more.
    """
    reason = _engine_problem()
    if reason and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED} is 1, but {reason}")
    if reason:
        pytest.skip(reason)
    with FileLock(tmp_path_factory.getbasetemp().parent / "image.lock"):  # the other worker finds it in the cache
        before = _image_id()
        _build()
        if before and before != _image_id():
            subprocess.run(["docker", "image", "rm", before], capture_output=True, check=False)
    return IMAGE


def _build() -> None:
    base_image = os.environ.get(BASE_IMAGE)
    arguments = ["--build-arg", f"BASE_IMAGE={base_image}"] if base_image else []
    command = ["docker", "build", "--network", "host", *arguments, "-t", IMAGE, str(ROOT)]
    env = {**os.environ, "DOCKER_BUILDKIT": "0"}
    built = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)
    if built.returncode:
        pytest.fail(f"the image cannot be built:\n{built.stdout[-3000:]}\n{built.stderr[-3000:]}")


def _image_id() -> str:
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", IMAGE]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _engine_problem() -> str | None:
    if shutil.which("docker") is None:
        return "there is no docker program"
    if "DOCKER_HOST" not in os.environ and not Path("/var/run/docker.sock").is_socket():
        return "neither DOCKER_HOST nor /var/run/docker.sock names an engine"
    asked = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    return None if asked.returncode == 0 else f"no engine answers: {asked.stderr.strip()[-200:]}"
