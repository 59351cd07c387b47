"""Where a merge computes nothing, its float32 output is held to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig

from runner.files.layout import read_checkpoint
from runner.judge.judge import judge
from runner.protocol.verdict import Layer, Status
from tests.judge.faults import changed, rewrite
from tests.judge.merges import save_merge
from tests.judge.tiny import lora, save_adapter, save_base

METHODS: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "ln_tuning": (lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), "layers.0.input_layernorm.weight"),
    "other_tokens": (lambda: lora(trainable_token_indices=[1, 5]), "embed_tokens.weight"),
    "trained_tokens": (lambda: peft.TrainableTokensConfig(token_indices=[1, 319]), "embed_tokens.weight"),
    "modules_to_save": (lambda: lora(modules_to_save=["lm_head"]), "lm_head.weight"),
    "saved_norm": (lambda: lora(modules_to_save=["norm"]), "model.norm.weight"),
    "shira": (lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"]), "layers.0.self_attn.q_proj.weight"),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "layers.0.self_attn.k_proj.weight",
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_unit_in_the_last_place_of_a_copy_fails(method: str, tmp_path: Path) -> None:
    config, ending = METHODS[method]
    base = save_base(tmp_path / "base", "llama", dtype=torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, config())
    merged = save_merge(tmp_path / "merged", base, adapter)
    assert judge(base=base, adapter=adapter, merged=merged, dtype="auto").status is Status.PASS
    name = next(name for name in read_checkpoint(merged).tensors if name.endswith(ending))
    assert name in changed(merged, base)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.int32).view(-1)[-1] += 1

    rewrite(merged, read_checkpoint(merged).tensors[name].file, edit)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")

    assert verdict.status is Status.FAIL
    assert {check.layer for check in verdict.failures} == {Layer.STORAGE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_neighbour_below_a_power_of_two_fails(dtype: torch.dtype, tmp_path: Path) -> None:
    """It is half a unit of the number above it away."""
    base = save_base(tmp_path / "base", "llama", dtype=dtype)

    def ones(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.norm.weight"].fill_(1.0)

    adapter = save_adapter(tmp_path / "adapter", base, lora(modules_to_save=["norm"]))
    rewrite(adapter, "adapter_model.safetensors", ones)
    merged = save_merge(tmp_path / "merged", base, adapter)

    def below(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int32 if dtype == torch.float32 else torch.int16)[3] -= 1

    assert judge(base=base, adapter=adapter, merged=merged, dtype="auto").status is Status.PASS
    rewrite(merged, read_checkpoint(merged).tensors["model.norm.weight"].file, below)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    (check,) = (check for check in verdict.failures if check.layer is Layer.STORAGE)
    assert "model.norm.weight[3] is 0.99" in check.detail
