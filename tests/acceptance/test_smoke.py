"""The program that a maintainer runs against the real Hub, run against the test Hub; and what it says of a bad one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from tests.acceptance.action import REPO, TAG
from tests.acceptance.warmth import ROOT
from tests.hub.faults import Kind
from tests.hub.server import LocalHub
from tests.supervisor.publish.world import make_folder
from tools.smoke import QUESTIONS


@pytest.fixture
def release(tmp_path: Path) -> Iterator[tuple[LocalHub, str, str]]:
    """Yield a Hub with something tagged that lists its checksums, a token, and the commit."""
    folder = make_folder(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(path for path in folder.rglob("*") if path.is_file())
    ]
    (folder / "checksums.txt").write_text("".join(lines))
    with LocalHub.start(tmp_path / "hub") as hub:
        hub.add_user("alice")
        token = hub.add_token("alice")
        commit = hub.add_model(REPO, folder)
        HfApi(endpoint=hub.endpoint, token=token).create_tag(REPO, tag=TAG, revision=commit)
        yield hub, token, commit


def _ask(hub: LocalHub, token: str, commit: str, home: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.smoke", REPO, "--tag", TAG, "--commit", commit], cwd=ROOT,
        env=os.environ | hub.env(token, home=home), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_everything_is_as_the_publisher_takes_for_granted_and_nothing_is_left(
    release: tuple[LocalHub, str, str], tmp_path: Path
) -> None:
    hub, token, commit = release

    code, said = _ask(hub, token, commit, tmp_path / "home")

    assert code == 0, said
    assert said.count("yes  ") == len(QUESTIONS) == 7
    repo = hub.repo(REPO)
    assert repo is not None
    assert (repo.tags, repo.branches) == ({TAG: commit}, {"main": commit})


@pytest.mark.parametrize(
    "endpoint, kind, more, text",
    [
        ("commit", Kind.STATUS, {"nth": 2, "status": 409}, "the answer was 409"),
        ("create-tag", Kind.STATUS, {"status": 403}, "the answer was 403"),
        ("blob", Kind.STATUS, {"status": 403, "times": 100}, "NO   Every downloaded file"),
    ],
)
def test_what_is_otherwise_is_told(
    endpoint: str, kind: Kind, more: dict[str, Any], text: str, release: tuple[LocalHub, str, str], tmp_path: Path
) -> None:
    hub, token, commit = release
    hub.fail(endpoint, kind, **more)

    code, said = _ask(hub, token, commit, tmp_path / "home")

    assert code == 1, said
    assert text in said


def test_other_bytes_are_told(release: tuple[LocalHub, str, str], tmp_path: Path) -> None:
    hub, token, _ = release
    api = HfApi(endpoint=hub.endpoint, token=token)
    commit = api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO).oid
    api.delete_tag(REPO, tag=TAG)
    api.create_tag(REPO, tag=TAG, revision=commit)

    code, said = _ask(hub, token, commit, tmp_path / "home")

    assert code == 1, said
    assert "config.json has the sha256" in said
