"""Pickled weights on the Hub: downloaded only where the user allows it and there are no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.protocol.errors import UnsupportedAdapter, UnsupportedCheckpoint
from runner.protocol.repo_ref import RepoRef
from tests.supervisor.publish.test_snapshot import base_files, names, unwanted_files, write
from tests.supervisor.publish.world import World

PICKLES = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def pickled_base_files() -> dict[str, str | bytes]:
    index = json.dumps({"weight_map": {"a": PICKLES[0], "b": PICKLES[1]}})
    files = {name: content for name, content in base_files().items() if not name.startswith("model")}
    return files | {"pytorch_model.bin.index.json": index, **dict.fromkeys(PICKLES, b"pickle")}


def test_pickled_weights_are_taken_only_where_that_is_allowed(world: World, tmp_path: Path) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **pickled_base_files()))
    ref, cache = RepoRef(repo_id="acme/base"), tmp_path / "cache"
    with pytest.raises(UnsupportedCheckpoint, match="pickled weights only") as raised:
        world.connect().snapshot(ref, kind="base", cache_dir=cache)
    assert "add `pickle` to `allow`" in raised.value.problem.fix

    wanted = set(pickled_base_files())
    assert names(world.connect().snapshot(ref, kind="base", cache_dir=cache, pickles=True).root) == wanted
    assert names(world.connect().outline(ref, cache_dir=cache, pickles=True).root) == wanted
    with pytest.raises(UnsupportedCheckpoint, match="pickled weights only"):  # what is judged is never unpickled
        world.connect().snapshot(ref, kind="merged", cache_dir=cache, pickles=True)


def test_pickles_beside_safetensors_are_never_taken(world: World, tmp_path: Path) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files(), **unwanted_files()))
    root = (
        world.connect()
        .snapshot(RepoRef(repo_id="acme/base"), kind="base", cache_dir=tmp_path / "cache", pickles=True)
        .root
    )
    assert names(root) == set(base_files())


def test_an_adapter_beside_a_pickled_base_hides_nothing_of_it(world: World, tmp_path: Path) -> None:
    files = pickled_base_files() | {"adapter_model.safetensors": b"an adapter's"}
    world.hub.add_model("acme/base", write(tmp_path / "seed", **files))
    snapshot = world.connect().snapshot(
        RepoRef(repo_id="acme/base"), kind="base", cache_dir=tmp_path / "cache", pickles=True
    )
    assert set(PICKLES) <= names(snapshot.root)


def test_a_pickled_adapter_is_taken_only_where_that_is_allowed(world: World, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "adapter_config.json": "{}",
        "adapter_model.bin": b"pickle",
        "optimizer.pt": b"pickle",
    }
    world.hub.add_model("acme/lora", write(tmp_path / "seed", **files))
    ref, cache = RepoRef(repo_id="acme/lora"), tmp_path / "cache"
    with pytest.raises(UnsupportedAdapter, match=r"adapter_model\.bin") as raised:
        world.connect().snapshot(ref, kind="adapter", cache_dir=cache)
    assert "add `pickle` to `allow`" in raised.value.problem.fix

    root = world.connect().snapshot(ref, kind="adapter", cache_dir=cache, pickles=True).root
    assert names(root) == {"adapter_config.json", "adapter_model.bin"}
