"""What is told while files are sent."""

from __future__ import annotations

import pytest

from runner.publish import upload
from tests.hub.faults import Kind
from tests.publish.world import World


def test_progress_moves_while_a_file_is_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PROGRESS_EVERY_S", 0.02)
    world.hub.fail("lfs-part", Kind.SLOW, delay_s=0.3, times=2)
    calls: list[int] = []
    world.publish(on_progress=lambda done, _total: calls.append(done))
    assert calls == sorted(calls)
    sizes = {path.stat().st_size for path in world.folder.glob("*.safetensors")}
    begun = calls[0]
    whole = {begun, *(begun + size for size in sizes), begun + sum(sizes)}
    assert any(done not in whole for done in calls)
    assert calls[-1] == begun + sum(sizes)
