"""A publisher that gets SIGKILL at any moment, and the next run: one commit, one tag, the right bytes."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.half import Half, halves
from tests.hub.faults import FOREVER, Kind
from tests.hub.server import LocalHub
from tests.supervisor.publish.world import make_folder


@pytest.fixture(scope="module")
def half() -> Iterator[Half]:
    with halves() as half:
        yield half


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub.start(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_user("alice")
        hub.fail("*", Kind.SLOW, delay_s=0.02, times=FOREVER)  # as far away as a real one, so that each step has time
        yield hub


def _state(hub: LocalHub, repo_id: str) -> str:
    repo = hub.repo(repo_id)
    if repo is None:
        return "nothing"
    if len(repo.commits) == 1:
        if any((hub.root / "repos" / repo_id / "lfs").glob("*")):
            return "uploads"
        return "a branch" if len(repo.branches) > 1 else "a repository"
    if not repo.tags:
        return "a commit"
    return "a tag" if len(repo.branches) == 1 else "a tag, and a branch to be removed"


@pytest.mark.slow
@pytest.mark.parametrize(("is_staged", "kills"), [(False, 30), (True, 20)], ids=["direct", "staged"])
def test_a_kill_at_any_moment_leaves_what_the_next_run_makes_whole(
    half: Half, hub: LocalHub, tmp_path: Path, is_staged: bool, kills: int
) -> None:
    folder = make_folder(tmp_path / "merged")
    token = hub.add_token("alice")
    moments = random.Random(6)
    name = "alice/staged" if is_staged else "alice/model"

    def job(number: int, attempt: str) -> dict[str, Any]:
        return {
            "endpoint": hub.endpoint, "token": token, "repo_id": f"{name}-{number}", "tag": "v1",
            "adapter": "a" * 64, "folder": str(folder), "xet": bool(number % 2), "is_staged": is_staged,
            "home": str(tmp_path / f"home-{number}-{attempt}"), "result": str(tmp_path / f"result-{number}-{attempt}"),
        }  # fmt: skip

    whole_s = []
    for number in (kills, kills + 1):  # one of each protocol, not killed
        started = time.monotonic()
        assert half.publish(job(number, "whole")) == [0]
        whole_s.append(time.monotonic() - started)
    states: Counter[str] = Counter()
    for number in range(kills):
        (code,) = half.publish(job(number, "killed"), kill_after_s=moments.uniform(0.0, whole_s[number % 2]))
        assert code in (0, -signal.SIGKILL)
        repo_id = f"{name}-{number}"
        states[_state(hub, repo_id)] += 1
        assert half.publish(job(number, "again")) == [0]
        repo = hub.repo(repo_id)
        assert repo is not None
        # The first commit, the release, and, where it was staged, the one that brings its files to the branch.
        assert len(repo.commits) == (3 if is_staged else 2), (number, states)
        assert repo.branches.keys() == {"main"}
        assert repo.tags.keys() == {"v1"}
        assert is_staged or repo.tags["v1"] == repo.branches["main"]
        for path in (path for path in folder.rglob("*") if path.is_file()):
            for revision in ("v1", "main"):
                assert repo.read(path.relative_to(folder).as_posix(), revision) == path.read_bytes()

    assert states.total() == kills
    assert len(states) >= 3, states  # the kills met different steps
