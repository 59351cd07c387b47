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
from tests.publish.world import make_folder

KILLS = 30


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
        return "uploads" if any((hub.root / "repos" / repo_id / "lfs").glob("*")) else "a repository"
    return "a tag" if repo.tags else "a commit"


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_what_the_next_run_makes_whole(half: Half, hub: LocalHub, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "merged")
    token = hub.add_token("alice")
    moments = random.Random(6)

    def job(number: int, attempt: str) -> dict[str, Any]:
        return {
            "endpoint": hub.endpoint, "token": token, "repo_id": f"alice/model-{number}", "tag": "v1",
            "adapter": "a" * 64, "folder": str(folder), "xet": bool(number % 2),
            "home": str(tmp_path / f"home-{number}-{attempt}"), "result": str(tmp_path / f"result-{number}-{attempt}"),
        }  # fmt: skip

    whole_s = []
    for number in (KILLS, KILLS + 1):  # one of each protocol, not killed
        started = time.monotonic()
        assert half.publish(job(number, "whole")) == [0]
        whole_s.append(time.monotonic() - started)
    states: Counter[str] = Counter()
    for number in range(KILLS):
        (code,) = half.publish(job(number, "killed"), kill_after_s=moments.uniform(0.0, whole_s[number % 2]))
        assert code in (0, -signal.SIGKILL)
        repo_id = f"alice/model-{number}"
        states[_state(hub, repo_id)] += 1
        assert half.publish(job(number, "again")) == [0]
        repo = hub.repo(repo_id)
        assert repo is not None
        assert len(repo.commits) == 2, (number, states)
        assert repo.tags == {"v1": repo.branches["main"]}
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert repo.read(path.relative_to(folder).as_posix(), "v1") == path.read_bytes()

    assert states.total() == KILLS
    assert len(states) >= 3, states  # the kills met different steps
