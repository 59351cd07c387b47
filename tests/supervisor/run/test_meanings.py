"""The whole action on adapters that an older PEFT, or another program, wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.parity import models
from tests.supervisor.run.conftest import Action

OLD = "rank_pattern alpha_pattern r lora_alpha peft_type task_type target_modules base_model_name_or_path bias".split()


def _plan(action: Action, base: Path, adapter: Path, *flags: str) -> tuple[int, str]:
    done = action.run("--mode", "plan", "--adapter-path", str(adapter), "--base-model", str(base), *flags)
    return done.code, done.log


def test_a_config_with_two_meanings_is_refused_and_merged_as_chosen(action: Action, base: Path, tmp_path: Path) -> None:
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"self_attn.q_proj": 64},
        task_type="CAUSAL_LM",
    )
    adapter = models.save_adapter(base, tmp_path / "lora", lora)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: config[name] for name in OLD}))

    code, log = _plan(action, base, adapter)
    done = action.publish(base, adapter, "--allow", "peft=0.13.2")

    assert code == 4, log
    assert "`rank_pattern` and `alpha_pattern`" in log
    assert "`peft=0.13` for PEFT 0.13 and earlier" in log
    assert done.code == 0, done.log
    assert done.outputs["status"] == "PASS"
    assert "is read as PEFT 0.13 and earlier did (as `allow` says)" in done.log


def test_small_oddities_of_an_adapter_are_put_right_and_told(
    action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    odd = shutil.copytree(adapter, tmp_path / "odd")
    weights = load_file(odd / "adapter_model.safetensors")
    save_file(
        {name: tensor.double() for name, tensor in weights.items()},
        odd / "adapter_model.safetensors",
        {"format": "pt"},
    )
    path = odd / "adapter_config.json"
    config = json.loads(path.read_text()) | {"r": 4.0, "alpha_pattern": {"qproj": 3}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())

    done = action.publish(base, odd, "--on-existing-tag", "replace")

    assert done.code == 0, done.log
    assert done.outputs["status"] == "PASS"
    assert "stored in float64, and are rounded to float32" in done.log
    assert "`alpha_pattern` of the adapter's config has entries without effect" in done.log
    assert "'qproj'" in done.log


def test_an_adapter_of_mlx_is_called_so(action: Action, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(8, 2)}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}})
    )

    code, log = _plan(action, base, folder)

    assert code == 4
    assert "saved by mlx, not by PEFT" in log
