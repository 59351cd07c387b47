"""The example workflows under a simulator of GitHub's runner (nektos/act), with a Hub on the same machine.

The workflow is the example's own text. Only names change: this action is the image that was built from this checkout,
repositories are those of the local Hub, and every kind of runner is one container image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.contract.runner_emulator import ROOT
from tests.hub.server import LocalHub

EXAMPLES = ROOT / "examples"
ACTION = "org/lora-merge-action@v1"
RUNNERS = ("self-hosted", "ubuntu-latest")
REPOSITORY = {"full_name": "alice/adapters", "name": "adapters", "owner": {"login": "alice"}, "default_branch": "main"}

# What the examples need of a runner besides a shell: GitHub's program, which says what it was asked to do.
GH = '#!/bin/sh\necho "gh $*"\nwhile [ $# -gt 0 ]; do [ "$1" = --body-file ] && cat "$2"; shift; done\nexit 0\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How one workflow ended."""

    code: int
    log: str


def build_runner_image(folder: Path, *, base: str, name: str) -> str:
    """Return an image in which jobs run: `base` and GitHub's program."""
    folder.mkdir()
    (folder / "gh").write_text(GH)
    (folder / "gh").chmod(0o755)
    (folder / "Dockerfile").write_text(f"FROM {base}\nCOPY gh /usr/local/bin/gh\n")
    env = {**os.environ, "DOCKER_BUILDKIT": "0"}
    subprocess.run(["docker", "build", "-q", "-t", name, str(folder)], env=env, capture_output=True, check=True)
    return name


def event(name: str, **payload: Any) -> dict[str, Any]:
    """Return the payload of an event in `alice/adapters`."""
    return {"event": name, "repository": REPOSITORY, "sender": {"login": "alice"}, **payload}


def play(
    example: str,
    happening: Mapping[str, Any],
    *,
    checkout: Path,
    image: str,
    runner_image: str,
    hub: LocalHub,
    secrets: Mapping[str, str],
    names: Mapping[str, str],
    identity: Mapping[str, str] | None = None,
) -> Played:
    """Run one example.

    Args:
        example: its file.
        happening: the event; see `event`.
        checkout: files of the repository; the workflow is put among them.
        image: of this action.
        runner_image: of the jobs.
        hub: where everything goes.
        secrets: of the repository.
        names: what stands in the example → what it is here.
        identity: variables that GitHub's runner gives a job with `id-token: write`, and the simulator does not.
    """
    _place(example, checkout, names={**names, ACTION: "./.action"}, image=image)
    payload = checkout.parent / f"{example}.event.json"
    payload.write_text(json.dumps(happening))
    socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    command = ["act", str(happening["event"]), "-e", str(payload), "--container-daemon-socket", socket]
    # Bound, not copied at a checkout: an example without one must find the action all the same.
    command += ["--pull=false", "--action-offline-mode", "--network", "host", "--bind"]
    for label in RUNNERS:
        command += ["-P", f"{label}={runner_image}"]
    given = {name: hub.env()[name] for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "NO_PROXY")}
    for name, value in {**given, **(identity or {})}.items():
        command += ["--env", f"{name}={value}"]
    secret_file = checkout.parent / f"{example}.secrets"
    secret_file.write_text("".join(f"{name}={value}\n" for name, value in secrets.items()))
    command += ["--secret-file", str(secret_file)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=600, check=False)
    log = done.stdout + done.stderr
    assert not [value for value in secrets.values() if value in log], "a secret is in the log"
    return Played(code=done.returncode, log=log)


def _place(example: str, checkout: Path, *, names: Mapping[str, str], image: str) -> None:
    workflows = checkout / ".github" / "workflows"
    shutil.rmtree(workflows, ignore_errors=True)
    workflows.mkdir(parents=True)
    text = (EXAMPLES / example).read_text("utf-8")
    for there, here in names.items():
        text = text.replace(there, here)
    (workflows / example).write_text(text)
    action = checkout / ".action"
    action.mkdir(exist_ok=True)
    metadata = (ROOT / "action.yml").read_text("utf-8")
    named = re.sub(r"^  image: Dockerfile$", f"  image: docker://{image}", metadata, flags=re.MULTILINE)
    assert named != metadata
    (action / "action.yml").write_text(named)
    identity = ["-c", "user.name=alice", "-c", "user.email=alice@example.org"]
    remote = ["config", "remote.origin.url", f"https://github.com/{REPOSITORY['full_name']}"]
    everything = [*identity, "commit", "-qm", "All", "--allow-empty"]
    for arguments in (["init", "-q", "-b", "main"], remote, ["add", "-A"], everything):
        subprocess.run(["git", *arguments], cwd=checkout, check=True, capture_output=True)
