"""Adapters that were trained on the text half of a model of text and pictures: merged into the whole, or refused.

The oracle is the half itself with the adapter on it, unmerged, as PEFT computes it; the release is loaded by
transformers as the base's own class, and its half must compute the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from runner.judge.judge import judge
from runner.protocol.errors import AdapterMismatch
from runner.protocol.verdict import Status
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
IDS = torch.arange(3, 23)[None]
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4, "partial_rotary_factor": 0.25}
_QWEN3_5: Mapping[str, Any] = {
    "text_config": {
        **structures.TEXT, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "rope_parameters": _MROPE, "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "hidden_size": 16,
        "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
    },
    "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
    "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
MORE: Mapping[str, Mapping[str, Any]] = {
    "MllamaForConditionalGeneration": {
        "text_config": {
            **structures.UNTIED, "cross_attention_layers": [1], "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "vision_config": {
            "hidden_size": 32, "attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_global_layers": 1, "image_size": 16, "patch_size": 4, "vision_output_dim": 64, "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0],
        },
        "image_token_index": 90,
    },
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5MoeForConditionalGeneration": {**_QWEN3_5, "text_config": {**_QWEN3_5["text_config"], **_EXPERTS}},
    "Llama4ForConditionalGeneration": {
        "text_config": {
            **structures.HEAD, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            **structures.VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        },
        "image_token_index": 90,
    },
}  # fmt: skip
ARCHITECTURES = (
    "Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration", "Mistral3ForConditionalGeneration", "SmolVLMForConditionalGeneration",
    "InternVLForConditionalGeneration", "PaliGemmaForConditionalGeneration", "Idefics3ForConditionalGeneration", *MORE,
)  # fmt: skip
# Three families whose layers, or whose vision towers, are named in three ways.
SOME = ("LlavaForConditionalGeneration", "MllamaForConditionalGeneration", "Idefics3ForConditionalGeneration")


class _Headed(nn.Module):
    """A text model with its head, as classes for causal language models hold the two."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = model, head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.lm_head(self.model(input_ids=input_ids)[0])
        return hidden


def _save_base(architecture: str, folder: Path) -> Path:
    model = structures.build(architecture, MORE.get(architecture))
    return models.save_base(model, folder, dtype=torch.float32, shard="30KB")


def _half(model: PreTrainedModel) -> nn.Module:
    text = type(model.config.get_text_config())
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and isinstance(part.config, text)]
    half: nn.Module = parts[-1] if _is_headed(parts) else parts[0]
    return half


def _is_headed(parts: list[PreTrainedModel]) -> bool:
    # The outer one is a class with a head, such as Llama 4's.
    return any(isinstance(child, type(parts[-1])) for child in parts[0].children())


def _text_class(model: PreTrainedModel) -> nn.Module:
    return _Headed(_half(model), model.get_output_embeddings())


HALVES: Mapping[str, Callable[[PreTrainedModel], nn.Module]] = {"text class": _text_class, "text model": _half}


def _compute(half: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = half(input_ids=IDS)
    return found if isinstance(found, torch.Tensor) else found[0]


def _edit(adapter: Path, **fields: Any) -> None:
    (adapter / CONFIG).write_text(json.dumps(json.loads((adapter / CONFIG).read_text()) | fields))


def _train(half: nn.Module, folder: Path, *, task: str | None = "CAUSAL_LM", **options: Any) -> torch.Tensor:
    """Save a random adapter of the half and return what PEFT's unmerged model computes with it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})
    torch.manual_seed(3)
    peft_model = get_peft_model(half, config).eval()
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(folder)
    _edit(folder, task_type=task)
    return _compute(peft_model)


def _far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_of_the_text_half_is_merged_into_the_whole(architecture: str, kind: str, tmp_path: Path) -> None:
    base = _save_base(architecture, tmp_path / "base")
    half = HALVES[kind](oracle.load(base))
    before = _compute(half)
    wanted = _train(half, tmp_path / "adapter", task="CAUSAL_LM" if kind == "text class" else None)

    plan, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged")

    assert _far(before, wanted) > 1e-3
    assert oracle.read_folder(merged.root).keys() == oracle.read_folder(base).keys()
    assert json.loads((merged.root / CONFIG.removeprefix("adapter_")).read_text())["architectures"] == [architecture]
    assert _far(_compute(HALVES[kind](oracle.load(merged.root))), wanted) < 1e-5
    said = " ".join(plan.summary.notes)
    assert "can be read in one way only" in said or "transformers' own renamings" in said
    verdict = judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def _rename(adapter: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)


def _merged_text(base: Path, adapter: Path, merged: Path) -> torch.Tensor:
    _, made = run_merge(base, adapter, merged)
    verdict = judge(base=base, adapter=adapter, merged=made.root, dtype="auto")
    assert (verdict.failures, verdict.status) == ((), Status.PASS)
    return _compute(_text_class(oracle.load(made.root)))


def test_full_paths_in_the_config_are_those_of_the_half(tmp_path: Path) -> None:
    base = _save_base("LlavaForConditionalGeneration", tmp_path / "base")
    wanted = _train(
        _text_class(oracle.load(base)),
        tmp_path / "adapter",
        target_modules=r"model\.layers\.\d+\.self_attn\.[qv]_proj|lm_head",
        rank_pattern={"model.layers.0.self_attn.q_proj": 2},
        alpha_pattern={"model.layers.1.self_attn.v_proj": 32},
        modules_to_save=["model.embed_tokens"],
    )

    assert _far(_merged_text(base, tmp_path / "adapter", tmp_path / "merged"), wanted) < 1e-5


def test_bare_targets_mean_the_half_that_the_adapter_has_tensors_for(tmp_path: Path) -> None:
    base = _save_base("LlavaForConditionalGeneration", tmp_path / "base")
    wanted = _train(_text_class(oracle.load(base)), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    _rename(tmp_path / "adapter", lambda name: name.replace("model.model.layers", "model.model.language_model.layers"))

    notes = prepare(base, tmp_path / "adapter", dtype="auto").plan.summary.notes

    assert any("also matches 4 modules outside 'model.language_model'" in note for note in notes)
    assert _far(_merged_text(base, tmp_path / "adapter", tmp_path / "merged"), wanted) < 1e-5


def test_a_half_that_lacks_one_module_is_refused(tmp_path: Path) -> None:
    base = _save_base("LlavaForConditionalGeneration", tmp_path / "base")
    _train(_text_class(oracle.load(base)), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj" not in name}
    save_file(kept, tmp_path / "adapter" / WEIGHTS)

    with pytest.raises(AdapterMismatch, match=r"language_model\.layers\.1\.self_attn\.v_proj"):
        prepare(base, tmp_path / "adapter", dtype="auto")


@pytest.mark.parametrize("architecture", ["Qwen3_5ForConditionalGeneration", "MllamaForConditionalGeneration"])
def test_a_compiled_text_class_is_read(architecture: str, tmp_path: Path) -> None:
    base = _save_base(architecture, tmp_path / "base")
    wanted = _train(_text_class(oracle.load(base)), tmp_path / "adapter")
    _rename(tmp_path / "adapter", lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."))

    assert _far(_merged_text(base, tmp_path / "adapter", tmp_path / "merged"), wanted) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "parameter"),
    [
        ("Qwen3_5MoeForConditionalGeneration", "mlp.experts.gate_up_proj"),
        ("Llama4ForConditionalGeneration", "feed_forward.experts.gate_up_proj"),
    ],
)
def test_parameters_of_experts_in_a_text_class_are_merged(architecture: str, parameter: str, tmp_path: Path) -> None:
    base = _save_base(architecture, tmp_path / "base")
    wanted = _train(
        _text_class(oracle.load(base)), tmp_path / "adapter", target_modules=["q_proj"], target_parameters=[parameter]
    )

    assert _far(_merged_text(base, tmp_path / "adapter", tmp_path / "merged"), wanted) < 1e-5


@pytest.mark.parametrize("architecture", ["Qwen3_5ForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_the_adapter_of_another_model_is_refused_by_one_name(architecture: str, tmp_path: Path) -> None:
    base = _save_base(architecture, tmp_path / "base")
    gpt2 = models.save_base(models.gpt2(), tmp_path / "gpt2", dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(gpt2, tmp_path / "adapter", config)

    with pytest.raises(AdapterMismatch):
        prepare(base, adapter, dtype="auto")


_AUDIO: Mapping[str, Any] = {
    "audio_config": {
        "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20,
    },
    "text_config": {"model_type": "qwen2", **structures.UNTIED},
    "audio_token_index": 90,
}  # fmt: skip


def test_names_that_fit_two_halves_are_refused_with_both_and_read_once_they_say_which(tmp_path: Path) -> None:
    model = structures.build("Qwen2AudioForConditionalGeneration", _AUDIO)
    base = models.save_base(model, tmp_path / "base", dtype=torch.float32)
    loaded = oracle.load(base)
    _train(_half(loaded), tmp_path / "adapter", target_modules=["q_proj"], task=None)

    with pytest.raises(AdapterMismatch) as refused:
        prepare(base, tmp_path / "adapter", dtype="auto")

    assert "audio_tower.layers.0.self_attn.q_proj' or" in refused.value.problem.what
    new, old = re.findall(r"'(base_model\.[^']+)'", refused.value.problem.fix)
    places = re.findall(r"'([\w.]+)'", refused.value.problem.what)[1:]
    text = next(place for place in places if "audio" not in place)
    assert new == f"{PREFIX}{places[0]}"
    assert old.endswith("layers.0.self_attn.q_proj")
    before = old.removesuffix("layers.0.self_attn.q_proj")
    after = f"{PREFIX}{text}".removesuffix("layers.0.self_attn.q_proj")
    _rename(tmp_path / "adapter", lambda name: name.replace(before, after))
    units = prepare(base, tmp_path / "adapter", dtype="auto").units
    assert {path.removesuffix("self_attn.q_proj") for path in units} == {
        text.replace("layers.0.self_attn.q_proj", f"layers.{number}.") for number in (0, 1)
    }


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a base of text and pictures, an adapter of its text class, and the right merge of the two."""
    root = tmp_path_factory.mktemp("mllama")
    base = _save_base("MllamaForConditionalGeneration", root / "base")
    _train(_text_class(oracle.load(base)), root / "adapter")
    _, merged = run_merge(base, root / "adapter", root / "merged")
    return base, root / "adapter", merged.root


@pytest.mark.parametrize("fault", ["the vision tensors are lost", "one module is the base's"])
def test_the_judge_fails_a_merge_of_a_half_in_which(
    fault: str, mllama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, merged = mllama
    tensors, before = oracle.read_folder(merged), oracle.read_folder(base)
    if fault == "the vision tensors are lost":
        tensors = {name: tensor for name, tensor in tensors.items() if "vision" not in name}
    else:
        changed = next(name for name, tensor in tensors.items() if not torch.equal(tensor, before[name]))
        tensors[changed] = before[changed]
    tmp_path.joinpath("config.json").write_bytes((merged / "config.json").read_bytes())
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )

    assert judge(base=base, adapter=adapter, merged=tmp_path, dtype="auto").status is Status.FAIL
