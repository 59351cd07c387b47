"""Adapters in several files, folders of a training's checkpoints, and bases that an adapter lies beside."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.files.adapter.folder import read_adapter
from runner.judge.judge import judge
from runner.protocol.errors import AdapterError, BrokenAdapter
from runner.protocol.verdict import Status
from runner.supervisor.converted import Pickles, conversion_note
from runner.supervisor.hub.select import check_adapter
from tests.parity import models, oracle
from tests.parity.cases import lora
from tests.parity.pipeline import run_merge

WEIGHTS, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"


def _shard(adapter: Path) -> Path:
    """Put the adapter's weights into two files with an index, as trainers save a model."""
    tensors = load_file(adapter / WEIGHTS)
    names = sorted(tensors)
    halves = {f"adapter_model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, adapter / file, {"format": "pt"})
    weight_map = {name: file for file, held in halves.items() for name in held}
    (adapter / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (adapter / WEIGHTS).unlink()
    return adapter


def _joined(adapter: Path, folder: Path) -> Path:
    return Pickles(allowed=False, into=folder, environ=os.environ).adapter(adapter)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16)


def test_the_merge_is_that_of_one_file(base: Path, tmp_path: Path) -> None:
    whole = models.save_adapter(base, tmp_path / "whole", lora(r=4))
    sharded = _shard(Path(shutil.copytree(whole, tmp_path / "sharded")))
    (sharded / "checkpoint-5").mkdir()
    (sharded / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")

    joined = _joined(sharded, tmp_path / "made")
    _, once = run_merge(base, whole, tmp_path / "once")
    _, merged = run_merge(base, joined, tmp_path / "merged")

    assert {path.name for path in joined.iterdir()} == {path.name for path in whole.iterdir()}
    assert all(
        torch.equal(tensor, load_file(whole / WEIGHTS)[name]) for name, tensor in load_file(joined / WEIGHTS).items()
    )
    first, second = oracle.read_folder(once.root), oracle.read_folder(merged.root)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert judge(base=base, adapter=joined, merged=merged.root, dtype="auto").status is Status.PASS
    assert "joined" in conversion_note(sharded, joined, "adapter")[0]
    assert _joined(sharded, tmp_path / "made") == joined  # made once
    assert _joined(whole, tmp_path / "made") == whole


def _drop_a_shard(adapter: Path) -> None:
    next(adapter.glob("adapter_model-*")).unlink()


def _index(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], None]:
    def rewrite(adapter: Path) -> None:
        weight_map = json.loads((adapter / INDEX).read_text())["weight_map"]
        (adapter / INDEX).write_text(json.dumps({"weight_map": change(weight_map)}))

    return rewrite


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (_drop_a_shard, "cannot be read|is not a sound safetensors file"),
    "the index lacks a tensor": (_index(lambda named: dict(list(named.items())[1:])), "contradict each other over"),
    "the index leads outside": (_index(lambda named: dict.fromkeys(named, "../x.safetensors")), "names the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_that_are_not_whole_are_refused(damage: str, base: Path, tmp_path: Path) -> None:
    sharded = _shard(models.save_adapter(base, tmp_path / "adapter", lora(r=4)))
    change, said = DAMAGES[damage]
    change(sharded)

    with pytest.raises(AdapterError, match=said):
        _joined(sharded, tmp_path / "made")
    assert not list(tmp_path.glob("made/*"))


def test_a_repository_of_shards_is_an_adapter() -> None:
    files = ["adapter_config.json", INDEX, "adapter_model-00001-of-00001.safetensors"]
    assert check_adapter(files, named="me/it") == INDEX


def test_checkpoints_of_a_training_are_named_and_each_can_be_merged(base: Path, tmp_path: Path) -> None:
    for step in (5, 100, 20):
        models.save_adapter(base, tmp_path / "run" / f"checkpoint-{step}", lora(r=4))

    with pytest.raises(BrokenAdapter, match="checkpoint-5, checkpoint-20, checkpoint-100") as raised:
        read_adapter(tmp_path / "run")

    match = re.search(r"'(.+)'", raised.value.problem.fix)
    assert match is not None
    named = Path(match[1])
    assert named == tmp_path / "run" / "checkpoint-100"
    _, merged = run_merge(base, named, tmp_path / "merged")
    assert judge(base=base, adapter=named, merged=merged.root, dtype="auto").passed


def test_checkpoints_of_a_training_in_a_repository_are_named() -> None:
    files = [f"checkpoint-{step}/adapter_config.json" for step in (5, 100, 20)]
    with pytest.raises(BrokenAdapter, match="checkpoint-5, checkpoint-20, checkpoint-100"):
        check_adapter(["README.md", *files], named="me/it")


def test_an_adapter_beside_the_weights_of_a_base_is_not_carried(base: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(r=4))
    _, alone = run_merge(base, adapter, tmp_path / "alone")
    for path in models.save_adapter(base, tmp_path / "other", lora(r=2), seed=9).iterdir():
        shutil.copyfile(path, base / path.name)

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    assert not list(merged.root.glob("adapter_*"))
    first, second = oracle.read_folder(alone.root), oracle.read_folder(merged.root)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS
