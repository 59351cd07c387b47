"""Two publishers of different merges want the same tag at the same time: one gets it, whole; the other says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.supervisor.documents.provenance import MANIFEST
from tests.acceptance.half import Half, halves
from tests.hub.server import LocalHub
from tests.supervisor.publish.world import make_folder, origin

ROUNDS = 20


@pytest.fixture(scope="module")
def half() -> Iterator[Half]:
    with halves() as half:
        yield half


@pytest.mark.slow
def test_of_two_publishers_one_wins_and_the_other_says_so(half: Half, tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / "first", seed=1), make_folder(tmp_path / "second", shards=3, seed=2)]
    adapters = ["a" * 64, "b" * 64]
    won = [0, 0]
    with LocalHub.start(tmp_path / "hub") as hub:
        hub.add_user("alice")
        token = hub.add_token("alice")
        for number in range(ROUNDS):
            repo_id = f"alice/model-{number}"
            jobs: list[dict[str, Any]] = [
                {
                    "endpoint": hub.endpoint, "token": token, "repo_id": repo_id, "tag": "v1", "adapter": adapters[who],
                    "folder": str(folders[who]), "xet": bool(number % 2),
                    "home": str(tmp_path / f"home-{number}-{who}"), "result": str(tmp_path / f"result-{number}-{who}"),
                }
                for who in (number % 2, 1 - number % 2)
            ]  # fmt: skip

            codes = half.publish(*jobs)

            told = [json.loads(Path(job["result"]).read_text()) for job in jobs]
            assert min(codes) == 0, told
            assert max(codes) in (3, 9), told
            loser = told[codes.index(0) ^ 1]
            assert loser["family"] in ("PublishConflict", "TagExists"), loser
            winner = jobs[codes.index(0)]
            won[adapters.index(winner["adapter"])] += 1
            _is_wholly(hub, repo_id, winner)

    assert sum(won) == ROUNDS


def _is_wholly(hub: LocalHub, repo_id: str, winner: dict[str, Any]) -> None:
    """Check that the tag holds the winner's files, and nothing of the loser's."""
    repo = hub.repo(repo_id)
    assert repo is not None
    assert list(repo.tags) == ["v1"]
    assert json.loads(repo.read(MANIFEST, "v1"))["input_digest"] == origin(winner["adapter"]).input_digest()
    folder = Path(winner["folder"])
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in repo.tree("v1") if path not in (".gitattributes", "README.md", MANIFEST)} == paths
    for path in paths:
        assert repo.read(path, "v1") == (folder / path).read_bytes()
