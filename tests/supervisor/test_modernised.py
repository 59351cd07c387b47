"""Adapters that today's PEFT would read otherwise than they were trained, or that lack a part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from runner.files.layout import read_checkpoint
from runner.protocol.allow import Allow, entry_problem
from runner.protocol.errors import AdapterError, BrokenAdapter, BrokenCheckpoint, UnsupportedAdapter
from runner.supervisor.modernised import read_modern
from runner.worker.model.attach import attach
from tests.parity import models

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.save_base(models.gpt2(), tmp_path / "base", dtype=torch.float32, shard="5GB")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    return models.save_adapter(base, tmp_path / "adapter", config)


def _edit(adapter: Path, **fields: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields))


def test_an_adapter_that_needs_no_change_stays_where_it_is(adapter: Path, tmp_path: Path) -> None:
    modern = read_modern(adapter, Allow(), tmp_path / "into")

    assert modern.adapter.root == adapter
    assert modern.notes == ()
    assert not (tmp_path / "into").exists()


def test_float64_is_rounded_as_peft_does_and_refused_where_it_does_not_fit(adapter: Path, tmp_path: Path) -> None:
    whole = load_file(adapter / WEIGHTS)
    wide = {name: tensor.double() + 1e-12 for name, tensor in whole.items()}
    save_file(wide, adapter / WEIGHTS, {"format": "pt"})

    modern = read_modern(adapter, Allow(), tmp_path / "into")

    assert {name: tensor.dtype for name, tensor in modern.adapter.tensors.items()} == dict.fromkeys(whole, "F32")
    made = load_file(modern.adapter.root / WEIGHTS)
    assert all(torch.equal(made[name], tensor.float()) for name, tensor in wide.items())
    for value, family in ((1e300, "float32 cannot hold"), (float("nan"), "NaN or Inf")):
        first = min(wide)
        save_file({**wide, first: torch.full_like(wide[first], value)}, adapter / WEIGHTS)
        with pytest.raises(BrokenAdapter, match=family):
            read_modern(adapter, Allow(), tmp_path / "into")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_that_are_not_in_the_file_are_refused_or_allowed_to_be_lost(
    base: Path, adapter: Path, tmp_path: Path, bias: str
) -> None:
    _edit(adapter, bias=bias)

    with pytest.raises(UnsupportedAdapter, match="are not in the adapter's file") as refused:
        attach(read_checkpoint(base), read_modern(adapter, Allow(), tmp_path / "into").adapter)
    modern = read_modern(adapter, Allow(entries=("lost-biases",)), tmp_path / "into")

    assert "`lost-biases`" in refused.value.problem.fix
    assert "biases are not in its file" in modern.notes[0]
    attach(read_checkpoint(base), modern.adapter)


def test_tensors_that_zero_3_left_empty_are_called_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole = load_file(base / "model.safetensors")
    gone = min(whole)
    save_file({**whole, gone: torch.zeros(0)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BrokenCheckpoint, match="of shape \\[0\\]") as of_base:
        attach(read_checkpoint(base), read_modern(adapter, Allow(), tmp_path / "into").adapter)
    factors = load_file(adapter / WEIGHTS)
    save_file({**factors, min(factors): torch.zeros(0)}, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(BrokenAdapter, match="of shape \\[0\\]") as of_adapter:
        read_modern(adapter, Allow(), tmp_path / "into")

    assert "ZeRO-3" in of_base.value.problem.why
    assert "ZeRO-3" in of_adapter.value.problem.why
    assert isinstance(of_adapter.value, AdapterError)


@pytest.mark.parametrize(
    ("entry", "is_good"),
    [("peft=0.13", True), ("peft=0.13.2", True), ("peft=0.21", True), ("peft=0.22", False), ("peft=new", False),
     ("peft=", False), ("peft", False), ("lost-biases", True)],
)  # fmt: skip
def test_a_release_is_named_as_people_write_it(entry: str, is_good: bool) -> None:
    assert (entry_problem(entry) is None) == is_good
