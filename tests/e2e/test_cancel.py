"""The runner's cancel sequence (SIGINT, 7.5 s, SIGTERM, 2.5 s, its `docker run` killed), in every phase, for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.synthetic import ALL_LINEAR, write_adapter, write_base
from tests.contract.runner_emulator import Event, Runner
from tests.e2e.scenarios import REPO, Stage
from tests.hub.faults import FOREVER, Kind
from tests.hub.server import LocalHub

pytestmark = [pytest.mark.docker, pytest.mark.slow]
LARGE_BYTES = 600_000_000  # so that merging takes longer than it takes to notice


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("large")
    shape = write_base(root / "base", size_bytes=LARGE_BYTES)
    write_adapter(root / "adapter", base=root / "base", shape=shape, r=8, targets=ALL_LINEAR)
    yield root
    for path in (root / "base").iterdir():  # pytest would keep it for three runs
        path.unlink()


@pytest.fixture
def stage(image: str, runner: Runner, hub: LocalHub) -> Stage:
    return Stage(runner=runner, hub=hub, token=hub.add_token("alice", role="write"), executor="docker", image=image)


@pytest.mark.parametrize("phase", ["preflight", "download", "plan", "merge", "verify", "publish"])
def test_a_run_that_is_cancelled_ends_long_before_it_is_killed(phase: str, stage: Stage, large: Path) -> None:
    inputs = {}
    if phase in ("plan", "merge"):
        for name in ("base", "adapter"):
            target = stage.runner.workspace / f"large-{name}"
            target.mkdir()
            for file in (large / name).iterdir():
                (target / file.name).hardlink_to(file)
        inputs = {"adapter_path": "large-adapter", "base_model": "large-base"}
    if phase == "preflight":
        stage.hub.fail("whoami", Kind.SLOW, delay_s=60, times=FOREVER)
    elif phase == "download":
        stage.hub.add_model("alice/base", stage.runner.workspace / "base")
        stage.hub.fail("resolve", Kind.SLOW, delay_s=60, times=FOREVER, where="safetensors")
        inputs = {"base_model": "alice/base"}
    elif phase == "publish":
        stage.hub.fail("commit", Kind.SLOW, delay_s=60, times=FOREVER)

    result = stage.run(Event.release("v1.0.0"), cancel_when=f"::group::{phase.capitalize()}", **inputs)
    stage.hub.heal()

    assert result.exit_code == 130, result.log
    # A plan of headers takes less time than a signal's way through the engine: it may be the merge already.
    title = result.annotations_of("error")[0].title
    phases = (phase, "merge") if phase == "plan" else (phase,)
    assert title in [f"The run was cancelled in the phase `{name}`." for name in phases]
    assert "was cancelled in the phase" in result.summary
    assert result.cancelled_s is not None
    # Four seconds, and what the engine takes on a busy machine; before the runner sends SIGTERM, in any case.
    assert result.cancelled_s < 7
    repo = stage.hub.repo(REPO)
    assert repo is None or not repo.tags
    assert list(stage.runner.temp.glob("lora-merge-*")) == []
    after = stage.post(result)
    assert (after.exit_code, after.annotations) == (0, ())
