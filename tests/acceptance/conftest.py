"""What the acceptance suites share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.action import Stage, a_hub, staged


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture(scope="session")
def merged_digest(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of the merge, from a run without faults."""
    folder = tmp_path_factory.mktemp("plain")
    with a_hub(folder / "hub") as (hub, token):
        ended = stage.run(hub, token, folder / "run", xet=False)
    assert ended.code == 0, ended.log
    digest = ended.report["outputs"]["merged-digest"]
    assert len(digest) == 64
    return str(digest)
