"""Ways out that a message tells in words: followed on the very folder that caused it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.files.adapter.folder import read_adapter
from runner.protocol.errors import BrokenAdapter, RunnerError
from runner.supervisor.hub.select import check_adapter
from runner.worker.merge.prepare import prepare
from tests.contract.test_ways_out import lora, small_base, trained
from tests.contract.ways_out import texts
from tests.parity import models
from tests.parity.pipeline import run_merge
from tools.messages import GAP


def _refusal(base: Path, adapter: Path) -> RunnerError:
    with pytest.raises(RunnerError) as raised:
        prepare(base, adapter, dtype="auto")
    return raised.value


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = small_base(tmp_path / "base")
    trained(base, lora()).save_pretrained(tmp_path / "adapter")
    for path in base.glob("model*"):  # one file
        path.unlink()
    models.llama(tied=False).to(torch.float32).save_pretrained(base)
    return base, tmp_path / "adapter"


def test_a_config_that_calls_plain_weights_quantised_is_mended_as_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    told = re.search(r"remove `(\w+)` from (\S+) in a copy", _refusal(base, adapter).problem.fix)
    assert told is not None

    copy = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((copy / told[2]).read_text())
    del config[told[1]]
    (copy / told[2]).write_text(json.dumps(config))

    run_merge(copy, adapter, tmp_path / "merged")


def test_a_variant_is_renamed_as_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (base / "model.safetensors").rename(base / "model.fp32.safetensors")
    told = re.search(r"In a copy of the base, rename (\S+) to (\S+), and", _refusal(base, adapter).problem.fix)
    assert told is not None

    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / told[1]).rename(copy / told[2])

    run_merge(copy, adapter, tmp_path / "merged")


def test_an_adapter_on_an_adapter_is_merged_in_two_steps_as_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, first = pair
    _, merged = run_merge(base, first, tmp_path / "step")
    trained(merged.root, lora()).save_pretrained(tmp_path / "second")
    fix = _refusal(first, tmp_path / "second").problem.fix
    assert "merge this one into its own base first, and set `base-model` to the folder" in fix

    run_merge(merged.root, tmp_path / "second", tmp_path / "merged")


def test_a_quantised_base_is_replaced_by_the_plain_one_as_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    packed = shutil.copytree(base, tmp_path / "packed")
    codes = load_file(packed / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    codes |= {name: codes[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    save_file(codes, packed / "model.safetensors")
    assert "Set `base-model` to the 16-bit model" in _refusal(packed, adapter).problem.fix

    run_merge(base, adapter, tmp_path / "merged")


def test_a_base_that_mlx_wrote_in_its_own_layout_is_named(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "mlx"})

    assert "written by mlx: 'model.layers.0.mlp.up_proj.weight'" in str(_refusal(base, adapter))


def test_a_plain_base_that_mlx_wrote_is_merged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", metadata={"format": "mlx"})

    run_merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("name, is_offered", [("adapter_model.bin", True), ("training_args.bin", False)])
def test_pickles_are_allowed_only_where_that_helps(name: str, is_offered: bool, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (adapter / "adapter_model.safetensors").rename(adapter / name)

    problem = _refusal(base, adapter).problem

    assert ("`pickle`" in problem.fix) == (name in problem.what) == is_offered


def test_a_model_where_an_adapter_belongs_is_named(pair: tuple[Path, Path]) -> None:
    base, _ = pair

    for refused in (
        lambda: read_adapter(base),
        lambda: check_adapter(["config.json", "model.safetensors"], named="a/b"),
    ):
        with pytest.raises(BrokenAdapter, match="it holds a whole model") as raised:
            refused()
        assert "`mode: verify`" in raised.value.problem.fix


def test_no_way_out_ends_at_the_base_that_is_given_already() -> None:
    told = [text for name, text in texts() if re.search(r"to the (?:very )?model that the adapters? w", text)]

    assert len(told) >= 8
    for text in told:
        asks_for_one = text.startswith("Set `base-model` to the model that the adapter was trained on" + GAP)
        assert asks_for_one or "if it is that already" in text, text


def _misfits(adapter: Path, name: str | None) -> None:
    """Give the adapter a rank that its tensors do not have, and a base to name."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 3, "base_model_name_or_path": name}))


@pytest.mark.parametrize(
    "name, said", [("acme/base", "the adapter names 'acme/base' as its base"), (None, "it names no base")]
)
def test_a_misfit_shows_what_the_adapter_names_and_both_ways_on(
    name: str | None, said: str, pair: tuple[Path, Path]
) -> None:
    base, adapter = pair
    _misfits(adapter, name)

    problem = _refusal(base, adapter).problem

    assert said in problem.why
    assert "if it is that already, set `base-revision`" in problem.fix
