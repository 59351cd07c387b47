"""What is told while files are sent and fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.utils import _xet

from runner.protocol.repo_ref import RepoRef
from runner.supervisor.hub import connect
from runner.supervisor.publish import upload
from tests.hub.faults import Kind
from tests.hub.xetclient import use_xet
from tests.supervisor.publish.world import World

SIZES = {"model-00001-of-00002.safetensors": 3_000_000, "model-00002-of-00002.safetensors": 2_000_000}


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


@pytest.mark.parametrize("protocol", ["LFS", "Xet"])
def test_a_download_is_counted_until_it_is_whole_and_then_its_check(
    protocol: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if protocol == "Xet":
        use_xet(monkeypatch, tmp_path / "home")
    seed = tmp_path / "seed"
    seed.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        (seed / name).write_bytes(bytes([number]) * size)
    weight_map = ", ".join(f'"{name}": "{name}"' for name in SIZES)
    (seed / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    (seed / "config.json").write_text("{}")
    world.hub.add_model("acme/base", seed)
    total = sum(path.stat().st_size for path in seed.iterdir() if path.name != "model.safetensors.index.json")
    told: list[tuple[int, int, str]] = []

    def fetch() -> None:
        hub = connect(world.hub.endpoint, token=world.token, on_download=lambda *event: told.append(event))
        hub.snapshot(RepoRef(repo_id="acme/base"), kind="base", cache_dir=tmp_path / "cache")

    fetch()
    arriving = [done for done, of, doing in told if doing == "acme/base" and of == total]
    checking = [done for done, _, doing in told if doing == "checking acme/base"]
    assert arriving == sorted(arriving)
    assert arriving[-1] == total
    assert len(set(arriving)) > 2
    assert checking[-1] == sum(path.stat().st_size for path in seed.iterdir())
    told.clear()
    fetch()  # all of it is in the cache

    assert {doing for _, _, doing in told} == {"checking acme/base"}
    if protocol == "Xet":
        _xet.abort_xet_session()
