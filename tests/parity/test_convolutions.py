"""LoRA on convolutions: merged as PEFT merges them, judged right, and each fault in the file found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from runner.judge.judge import judge
from runner.protocol.verdict import Status
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

WAVES = r".*conv_layers\.\d\.conv"  # not the positions' convolution, which is in groups
# Name → class, target modules, and the stored weight that changes.
LAYERS: dict[str, tuple[str, str | list[str], str]] = {
    "1d": ("Wav2Vec2ForCTC", WAVES, "wav2vec2.feature_extractor.conv_layers.1.conv.weight"),
    "2d": ("ViTForImageClassification", ["projection"], "vit.embeddings.patch_embeddings.projection.weight"),
    "3d": ("Qwen2VLForConditionalGeneration", ["proj"], "visual.patch_embed.proj.weight"),
}
FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "2 % too much": lambda before, after: before + (after - before) * 1.02,
    "kernels turned round": lambda _, after: after.flip(-1),
    "one channel zeroed": lambda _, after: torch.cat([torch.zeros_like(after[:1]), after[1:]]),
}


def _adapter(base: Path, folder: Path, targets: str | list[str], **options: Any) -> Path:
    return models.save_adapter(base, folder, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_merged_as_peft_does_and_passes(kind: str, use_dora: bool, tmp_path: Path) -> None:
    architecture, targets, name = LAYERS[kind]
    base = models.save_base(structures.build(architecture), tmp_path / "base", dtype=torch.bfloat16, shard="1GB")
    adapter = _adapter(base, tmp_path / "adapter", targets, use_dora=use_dora)

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    wanted = oracle.saved_merge(base, adapter, tmp_path / "oracle")
    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    assert not torch.equal(after[name], before[name])
    assert all(torch.equal(tensor, wanted[key].bfloat16()) for key, tensor in after.items())
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_fault_in_the_file_fails(kind: str, fault: str, tmp_path: Path) -> None:
    architecture, targets, name = LAYERS[kind]
    base = models.save_base(structures.build(architecture), tmp_path / "base", dtype=torch.bfloat16, shard="1GB")
    adapter = _adapter(base, tmp_path / "adapter", targets)
    _, merged = run_merge(base, adapter, tmp_path / "merged")
    path = merged.root / "model.safetensors"
    tensors, before = load_file(path), oracle.read_folder(base)[name]
    wrong = FAULTS[fault](before.float(), tensors[name].float()).to(tensors[name].dtype)
    assert not torch.equal(wrong, tensors[name])
    save_file({**tensors, name: wrong.contiguous()}, path, {"format": "pt"})

    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert any(name in check.detail for check in verdict.failures)
