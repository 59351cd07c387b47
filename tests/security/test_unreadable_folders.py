"""Folders that must not be read, or built: pipes, devices, gigabytes, a billion layers. Each is told at once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.architecture.building import BUILD_ERRORS
from runner.files.adapter.folder import read_adapter
from runner.files.layout import INDEX_FILE, read_checkpoint
from runner.judge.judge import READABLE, judge
from runner.protocol.errors import BrokenAdapter, BrokenCheckpoint, CheckpointError
from runner.protocol.verdict import Layer, Outcome, Status
from runner.worker.merge.prepare import prepare
from tests.judge.tiny import lora, save_adapter, save_base

Damage = Callable[[Path], object]


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def long(name: str) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(1 << 30)

    return damage


def directory(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def index(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))

    return damage


def config(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


UNREADABLE: Mapping[str, tuple[Damage, str]] = {
    "a config that is a pipe": (pipe("config.json"), "'config.json' is a pipe"),
    "a config that is a device": (link("config.json", "/dev/zero"), "'config.json' is a device"),
    "a config made by the kernel": (link("config.json", "/proc/self/mem"), "which the kernel makes up"),
    "a config of a gigabyte": (long("config.json"), "config.json is larger than"),
    "a config that is a folder": (directory("config.json"), "is a folder"),
    "an index that is a device": (link(INDEX_FILE, "/dev/urandom"), "is a device"),
    "an index of a gigabyte": (long(INDEX_FILE), "is larger than"),
    "a tokenizer that is a pipe": (pipe("tokenizer.json"), "'tokenizer.json' is a pipe"),
    "a template that is a pipe": (pipe("additional_chat_templates/x.jinja"), "is a pipe"),
    "an index of a name too long": (index("é" * 400 + ".safetensors"), "names the file"),
    "an index of a name with a null": (index("x\0.safetensors"), "names the file"),
    "weights that are a pipe": (pipe("model.safetensors"), "is a pipe"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers = 1e+09"),
    "a number of layers with 4000 digits": (config(num_hidden_layers=10**4000), "a number of hundreds of digits"),
    "a billion labels": (config(num_labels=10**9), "num_labels"),
    "a billion layers in a part": (config(text_config={"n_layers": 10**9}), "text_config.n_layers"),
    "a billion layers in a list": (config(attention_types=[[["global"], 10**9]]), "attention_types"),
}  # fmt: skip
UNBUILDABLE: Mapping[str, Damage] = {
    "more layers than tensors": config(num_hidden_layers=100_000),
    "heads of a billion": config(head_dim=10**9),
    "a vocabulary of a billion": config(vocab_size=10**9),
    "a width beyond any number": config(hidden_size=10**30),
    "no heads": config(num_attention_heads=0),
    "a width that is text": config(hidden_size="64"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_adapter(root / "adapter", save_base(root / "base", "llama"), lora())
    return root


@pytest.fixture
def damaged(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "base", tmp_path / "damaged"))


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_base_is_refused_and_a_merged_folder_fails(name: str, models: Path, damaged: Path) -> None:
    damage, says = UNREADABLE[name]
    damage(damaged)
    started = time.monotonic()

    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(damaged)
    verdict = judge(base=models / "base", adapter=models / "adapter", merged=damaged, dtype="auto")

    assert says in str(caught.value)
    assert verdict.status is Status.FAIL
    assert [(check.name, says in check.detail) for check in verdict.failures] == [(READABLE, True)]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", UNBUILDABLE)
def test_a_base_whose_config_asks_for_another_model_is_refused(name: str, models: Path, damaged: Path) -> None:
    UNBUILDABLE[name](damaged)

    with pytest.raises(BrokenCheckpoint, match=r"config\.json|cannot load the base"):
        prepare(damaged, models / "adapter", dtype="auto")
    with pytest.raises(BrokenCheckpoint, match="cannot load the base"):
        judge(base=damaged, adapter=models / "adapter", merged=models / "base", dtype="auto")


@pytest.mark.parametrize("name", ["more layers than tensors", "heads of a billion", "a width that is text"])
def test_of_a_merged_folder_with_such_a_config_nothing_is_loaded(name: str, models: Path, damaged: Path) -> None:
    UNBUILDABLE[name](damaged)

    verdict = judge(base=models / "base", adapter=models / "adapter", merged=damaged, dtype="auto")

    assert verdict.status is Status.FAIL
    models_ran = [check for check in verdict.checks if check.layer is Layer.END_TO_END]
    assert [check.outcome for check in models_ran] == [Outcome.SKIPPED]
    assert "the structure failed" in models_ran[0].detail


@pytest.mark.parametrize(
    "damage", [pipe("adapter_config.json"), link("README.md", "/dev/zero"), pipe("tokenizer.json")]
)
def test_an_adapter_with_what_cannot_be_read_is_refused(damage: Damage, models: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))
    damage(adapter)

    with pytest.raises(BrokenAdapter, match=r"is a (pipe|device)"):
        read_adapter(adapter)


def test_a_context_of_ten_million_is_no_count_of_parts(models: Path, damaged: Path) -> None:
    config(max_position_embeddings=10_485_760, n_positions=10_485_760, bos_token_id=10**7)(damaged)

    read_checkpoint(damaged)


def test_an_error_of_a_config_of_transformers_is_known() -> None:
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    assert issubclass(StrictDataclassFieldValidationError, BUILD_ERRORS)
