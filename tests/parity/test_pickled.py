"""Pickled weights, where they are allowed: converted without the change of a bit, then merged and judged."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from runner.files.pickled import pickled_weights
from runner.judge.judge import judge
from runner.protocol.errors import (
    BrokenAdapter,
    BrokenCheckpoint,
    NotEnoughDisk,
    RunnerError,
    UnsupportedAdapter,
    UnsupportedCheckpoint,
)
from runner.supervisor.converted import Pickles
from runner.worker.unpickle import unpickle
from tests.parity import models, oracle
from tests.parity.cases import lora
from tests.parity.pipeline import run_merge

ADAPTER = "adapter_model"


def _pickles(folder: Path, *, allowed: bool = True) -> Pickles:
    return Pickles(allowed=allowed, into=folder / "converted", environ=os.environ)


def _as_bin(base: Path, *, zipped: bool = True) -> Path:
    """Turn a folder of safetensors into what transformers before safetensors wrote."""
    for path in sorted(base.glob("model*.safetensors")):
        torch.save(
            load_file(path),
            path.with_name(path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")),
            _use_new_zipfile_serialization=zipped,
        )
        path.unlink()
    for index in base.glob("model.safetensors.index.json"):
        text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        index.with_name("pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    return base


BASES: dict[str, tuple[Callable[[], PreTrainedModel], str, bool]] = {
    "sharded": (lambda: models.llama(tied=False), "40KB", True),
    "one file, tied": (lambda: models.llama(tied=True), "10MB", True),
    "before torch 1.6": (models.gpt2, "40KB", False),
}


@pytest.mark.parametrize("name", BASES)
def test_a_pickled_base_and_adapter_are_merged_as_peft_merges_them_and_judged(name: str, tmp_path: Path) -> None:
    build, shard, zipped = BASES[name]
    base = models.save_base(build(), tmp_path / "base", dtype=torch.bfloat16, shard=shard)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = oracle.saved_merge(base, adapter, tmp_path / "oracle")
    before = oracle.read_folder(base)
    _as_bin(base, zipped=zipped)
    torch.save(load_file(adapter / f"{ADAPTER}.safetensors"), adapter / f"{ADAPTER}.bin")
    (adapter / f"{ADAPTER}.safetensors").unlink()

    converted, converted_adapter = tmp_path / "as safetensors", tmp_path / "adapter as safetensors"
    unpickle(base, converted, pickled_weights({path.name for path in base.iterdir()}) or "")
    unpickle(adapter, converted_adapter, f"{ADAPTER}.bin")
    same = oracle.read_folder(converted)
    assert same.keys() == before.keys()
    assert all(torch.equal(same[name], before[name]) for name in before)
    _, merged = run_merge(converted, converted_adapter, tmp_path / "merged")

    after = oracle.read_folder(merged.root)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], expected[name].bfloat16()) for name in after)
    assert (merged.root / "1_Pooling" / "config.json").read_text() == "{}"
    assert not [path for path in merged.root.rglob("*") if path.suffix == ".bin" or path.is_symlink()]
    verdict = judge(base=converted, adapter=converted_adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.passed


def test_a_process_of_its_own_converts_once(tmp_path: Path) -> None:
    base = _as_bin(models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16))
    pickles = _pickles(tmp_path)

    converted = pickles.base(base)

    made = (converted / "model.safetensors.index.json").stat()
    assert pickles.base(base) == converted
    assert (converted / "model.safetensors.index.json").stat() == made


def test_tied_weights_that_share_memory_are_both_written(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=True), tmp_path / "base", dtype=torch.bfloat16, shard="10MB")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()

    unpickle(base, tmp_path / "converted", "pytorch_model.bin")

    converted = oracle.read_folder(tmp_path / "converted")
    assert torch.equal(converted["lm_head.weight"], tensors["model.embed_tokens.weight"])


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._marker}",)


def _hostile_zip(path: Path, marker: Path) -> None:
    torch.save({"weight": torch.ones(2), "extra": _Hostile(marker)}, path)


def _hostile_legacy(path: Path, marker: Path) -> None:
    torch.save({"extra": _Hostile(marker)}, path, _use_new_zipfile_serialization=False)


def _bare_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(_Hostile(marker)))


@pytest.mark.parametrize("write", [_hostile_zip, _hostile_legacy, _bare_pickle])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    write: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, marker = tmp_path / "hostile", tmp_path / "ran"
    folder.mkdir()
    write(folder / "pytorch_model.bin", marker)

    with pytest.raises(UnsupportedCheckpoint, match="holds more than tensors"):
        unpickle(folder, tmp_path / "converted", "pytorch_model.bin")

    assert not marker.exists()
    with contextlib.suppress(AttributeError, RuntimeError, TypeError):  # a bare pickle is no checkpoint once it has run
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "this pickle would not have run anything anyway"


def test_a_hostile_adapter_is_refused_in_the_process_of_its_own(tmp_path: Path) -> None:
    folder, marker = tmp_path / "hostile", tmp_path / "ran"
    folder.mkdir()
    _hostile_zip(folder / f"{ADAPTER}.bin", marker)

    with pytest.raises(UnsupportedAdapter, match="holds more than tensors"):
        _pickles(tmp_path).adapter(folder)

    assert not marker.exists()
    assert list((tmp_path / "converted").iterdir()) == []


STRANGE: dict[str, tuple[object, type[RunnerError], str]] = {
    "a list": ([torch.ones(2)], UnsupportedCheckpoint, "a list instead of"),
    "nothing": ({}, UnsupportedCheckpoint, "a dict instead of"),
    "nested": ({"state_dict": {"weight": torch.ones(2)}}, UnsupportedCheckpoint, "a dict under 'state_dict'"),
    "a number": ({"weight": torch.ones(2), "epoch": 3}, UnsupportedCheckpoint, "a int under 'epoch'"),
    "a sparse tensor": ({"weight": torch.eye(3).to_sparse()}, UnsupportedCheckpoint, "sparse"),
    "a complex tensor": ({"weight": torch.ones(2, dtype=torch.complex128)}, UnsupportedCheckpoint, "complex128"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_pickles_that_are_no_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    content, error, text = STRANGE[name]
    base = tmp_path / "base"
    base.mkdir()
    torch.save(content, base / "pytorch_model.bin")

    with pytest.raises(error, match=text):
        unpickle(base, tmp_path / "converted", "pytorch_model.bin")


def _cut(base: Path) -> None:
    path = min(base.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-200])


def _lost(base: Path) -> None:
    min(base.glob("*.bin")).unlink()


def _twice(base: Path) -> None:
    first, second, *_ = sorted(base.glob("*.bin"))
    shutil.copy(first, second)


def _misplaced(base: Path) -> None:
    index = base / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight"', '"lm_tail.weight"'))


def _outside(base: Path) -> None:
    index = base / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace('"pytorch_model-00001', '"../pytorch_model-00001'))


def _empty(base: Path) -> None:
    min(base.glob("*.bin")).write_bytes(b"")


DAMAGES = {
    "cut": (_cut, "cannot be unpickled"), "a lost shard": (_lost, "is not there"), "twice": (_twice, "is also in"),
    "index of other names": (_misplaced, "do not agree"), "index that leads outside": (_outside, "names the file"),
    "empty": (_empty, "cannot be unpickled"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    damage, text = DAMAGES[name]
    base = _as_bin(models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16))
    damage(base)

    with pytest.raises(BrokenCheckpoint, match=text):
        unpickle(base, tmp_path / "converted", "pytorch_model.bin.index.json")


def test_a_damaged_pickled_adapter_is_an_error_of_the_adapter(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with zipfile.ZipFile(adapter / f"{ADAPTER}.bin", "w") as archive:
        archive.writestr("data", "x")

    with pytest.raises(BrokenAdapter, match="cannot be unpickled"):
        _pickles(tmp_path).adapter(adapter)


def test_nothing_is_converted_unless_it_is_allowed_and_needed(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16, shard="10MB")
    torch.save({"weight": torch.ones(1)}, base / "pytorch_model.bin")  # an old copy beside
    assert _pickles(tmp_path).base(base) == base

    (base / "model.safetensors").unlink()
    assert _pickles(tmp_path, allowed=False).base(base) == base
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("beside", [f"{ADAPTER}.safetensors", f"{ADAPTER}.bin"])
def test_an_adapter_beside_a_pickled_base_is_not_taken_for_the_weights(beside: str, tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16, shard="10MB")
    before = oracle.read_folder(base)
    _as_bin(base)
    (base / beside).write_bytes(b"an adapter's")

    after = load_file(_pickles(tmp_path).base(base) / "model.safetensors")

    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_model_beside_a_pickled_adapter_is_not_taken_for_the_weights(tmp_path: Path) -> None:
    folder, tensors = tmp_path / "adapter", {"weight": torch.ones(2)}
    folder.mkdir()
    torch.save(tensors, folder / f"{ADAPTER}.bin")
    (folder / "model.safetensors").write_bytes(b"a model's")

    converted = load_file(_pickles(tmp_path).adapter(folder) / f"{ADAPTER}.safetensors")

    assert torch.equal(converted["weight"], tensors["weight"])


def test_too_little_disk_is_told_before_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _as_bin(models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16))
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("runner.supervisor.converted.shutil.disk_usage", lambda path: full)

    with pytest.raises(NotEnoughDisk, match="Writing the weights again"):
        _pickles(tmp_path).base(base)
