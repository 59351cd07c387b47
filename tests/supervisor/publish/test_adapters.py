"""The repository of the adapter, and the adapter in the release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runner.files.sidecars.archive import archive
from runner.protocol.errors import HubError
from tests.supervisor.publish.test_targets import second
from tests.supervisor.publish.world import REPO, World


def with_adapter(world: World, tmp_path: Path) -> None:
    seed = tmp_path / "adapter"
    seed.mkdir()
    (seed / "adapter_config.json").write_text("{}")
    (seed / "adapter_model.safetensors").write_bytes(b"adapter" * 1000)
    (seed / "notes.md").write_text("mine")
    world.hub.add_model(REPO, seed)


def test_in_an_adapters_repository_the_release_has_a_branch_of_its_own(world: World, tmp_path: Path) -> None:
    with_adapter(world, tmp_path)
    with pytest.raises(HubError, match="holds an adapter"):
        world.publish(allows_adapter=True)
    release = world.publish(allows_adapter=True, branch="merged")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= world.paths("main")
    assert not {"adapter_config.json", "adapter_model.safetensors"} & world.paths(release.commit)
    assert "notes.md" in world.paths(release.commit)
    assert world.publish(allows_adapter=True, branch="merged") == replace(release, created=False)


def test_the_adapter_goes_along_and_goes_with_a_release_that_has_none(world: World, tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    for name in ("adapter_config.json", "README.md", "training_args.bin", "optimizer.pt"):
        (adapter / name).write_text(name)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 300_000)
    kept = archive([adapter])
    first = world.publish(archived=kept)
    names = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"}
    assert {path for path in world.paths(first.commit) if path.startswith("adapter/")} == names
    assert world.publish(archived=kept) == replace(first, created=False)
    newer = second(world, tmp_path).publish(tag="v2")
    assert not {path for path in world.paths(newer.commit) if path.startswith("adapter/")}


def test_several_adapters_are_numbered_in_their_order(tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        root.mkdir()
        (root / "adapter_config.json").write_text(root.name)
    assert [(kept.file.path, kept.source.read_text()) for kept in archive(roots)] == [
        ("adapter/1/adapter_config.json", "one"),
        ("adapter/2/adapter_config.json", "two"),
    ]
