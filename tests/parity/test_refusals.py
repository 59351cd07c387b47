"""Adapters that PEFT or transformers cannot put on the base, or cannot merge: refused by merge and judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from runner.judge.judge import judge
from runner.protocol.combination import Combination, Several
from runner.protocol.errors import (
    AdapterMismatch,
    BrokenAdapter,
    BrokenCheckpoint,
    RunnerError,
    UnsupportedAdapter,
    UnsupportedCheckpoint,
)
from runner.worker.merge.prepare import prepare
from tests.parity import models, structures
from tests.parity.pipeline import run_merge

WEIGHTS = "adapter_model.safetensors"
Damage = Callable[[Path], None]


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def _config(**fields: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Damage:
    def rewrite(folder: Path) -> None:
        save_file(dict(change(load_file(folder / WEIGHTS))), folder / WEIGHTS)

    return rewrite


@dataclass(frozen=True)
class Case:
    """An adapter, what is done to it, and what the merge says of it; `by_judge` "" where that reads on."""

    said: str
    family: type[RunnerError]
    build: Callable[[], PreTrainedModel] = lambda: models.llama(tied=False)
    lora: LoraConfig = field(default_factory=_lora)
    damage: Damage = lambda _folder: None
    by_judge: str = ""


BAMBA = "BambaForCausalLM"
_BAMBA = {
    **structures.TEXT, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_expand": 2,
}  # fmt: skip


def _beside(*damages: Damage) -> Damage:
    def change(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return change


def _with_out_proj(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add what a PEFT before 0.15 trained on Mamba's last projection."""
    under = "base_model.model.backbone.layers.0.mixer.out_proj"
    return {**tensors, f"{under}.lora_A.weight": torch.ones(4, 64), f"{under}.lora_B.weight": torch.ones(32, 4)}


REFUSED = {
    "a task that nobody knows": Case(
        "task type is 'DANCE'", UnsupportedAdapter, damage=_config(task_type="DANCE")
    ),
    "fields that contradict each other": Case(
        "PEFT refuses adapter_config.json", UnsupportedAdapter, damage=_config(layers_pattern="layers")
    ),
    "a saved module that is not there": Case(
        "The adapter has no tensor for .*lm_head", AdapterMismatch, lora=_lora(modules_to_save=["lm_head"]),
        damage=_tensors(lambda tensors: {name: each for name, each in tensors.items() if "lm_head" not in name}),
    ),
    "a task that the architecture has no class for": Case(
        "transformers has no gemma2 class", UnsupportedAdapter, build=models.gemma2,
        damage=_config(task_type="QUESTION_ANS"), by_judge="transformers has no model for the adapter's task",
    ),
    "parameters that the base does not have": Case(
        "PEFT cannot put the adapter on", AdapterMismatch, build=models.mixtral,
        lora=_lora(target_parameters=["mlp.experts.down_proj"]),
        damage=_config(target_modules=["nothing"], target_parameters=["mlp.experts.nothing"]),
        by_judge="PEFT cannot put the adapter on the base",
    ),
    "a convolution in groups": Case(
        r"PEFT cannot merge 'model\.layers\.0\.mamba\.conv1d'", UnsupportedAdapter,
        build=lambda: structures.build(BAMBA, _BAMBA),
        lora=_lora(target_modules=["conv1d"], r=80),
    ),
    "a module that PEFT refuses in Mamba": Case(
        "PEFT cannot put the adapter on MambaForCausalLM.*incompatible", UnsupportedAdapter,
        build=lambda: structures.build("MambaForCausalLM"), lora=_lora(target_modules=["in_proj"]),
        damage=_beside(_config(target_modules=["in_proj", "out_proj"]), _tensors(_with_out_proj)),
        by_judge="PEFT cannot put the adapter on the base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case = REFUSED[name]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", case.lora)
    case.damage(adapter)

    with pytest.raises(case.family, match=case.said):
        prepare(base, adapter, dtype="auto")
    if case.by_judge:
        with pytest.raises(RunnerError, match=case.by_judge):
            judge(base=base, adapter=adapter, merged=base, dtype="auto")


def test_a_head_whose_own_weight_was_never_saved_is_refused(tmp_path: Path) -> None:
    """LoRA on a classifier that the training had at random values, which the adapter does not hold."""
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16)
    model = LlamaForSequenceClassification.from_pretrained(base)
    peft_model = get_peft_model(model, _lora(target_modules=["q_proj", "score"], task_type=None))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    with pytest.raises(AdapterMismatch, match=r"'score\.weight' is in neither the adapter nor the base"):
        prepare(base, tmp_path / "adapter", dtype="auto")


def test_experts_of_another_size_than_the_config_says_are_refused(tmp_path: Path) -> None:
    small = models.mixtral()
    config = {**small.config.to_dict(), "intermediate_size": small.config.intermediate_size + 2}
    large = models.save_base(MixtralForCausalLM(MixtralConfig(**config)), tmp_path / "large", dtype=torch.bfloat16)
    adapter = models.save_adapter(large, tmp_path / "adapter", _lora(target_parameters=["mlp.experts.down_proj"]))
    base = models.save_base(small, tmp_path / "base", dtype=torch.bfloat16)
    shutil.copy(large / "config.json", base / "config.json")

    with pytest.raises(UnsupportedCheckpoint, match="conversion cannot be undone: it makes"):
        prepare(base, adapter, dtype="auto")


def test_a_layer_that_peft_cannot_merge_is_refused(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=True), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora(target_modules=["lm_head"], lora_bias=True))

    with pytest.raises(UnsupportedAdapter, match="PEFT cannot merge 'lm_head'"):
        run_merge(base, adapter, tmp_path / "merged")
    with pytest.raises(UnsupportedAdapter, match="PEFT's own merge of lm_head"):
        judge(base=base, adapter=adapter, merged=base, dtype="auto")


def test_oft_on_a_convolution_wider_than_1_stops_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    base = models.save_base(model, tmp_path / "base", dtype=torch.float32)
    point = OFTConfig(r=0, oft_block_size=4, target_modules=r".*shortcut\.convolution")
    wide = OFTConfig(r=0, oft_block_size=4, target_modules=r".*layer\.1\.convolution")

    prepare(base, models.save_adapter(base, tmp_path / "1x1", point), dtype="auto")
    with pytest.raises(UnsupportedAdapter, match=r"PEFT's own merge of '.*layer\.1\.convolution' is not the trained"):
        prepare(base, models.save_adapter(base, tmp_path / "3x3", wide), dtype="auto", only_plans=True)


def test_a_base_in_float64_is_refused(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.float64)
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora())

    with pytest.raises(UnsupportedCheckpoint, match="stores as F64"):
        prepare(base, adapter, dtype="auto")


def test_a_base_whose_class_cannot_be_built_is_refused(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora())
    config = json.loads((base / "config.json").read_text())
    for fields in ({"model_type": "lama"}, {"hidden_size": -8}):
        (base / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(BrokenCheckpoint, match="The model class LlamaForCausalLM cannot be built"):
            prepare(base, adapter, dtype="auto")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and an adapter that fits it."""
    root = tmp_path_factory.mktemp("plain")
    base = models.save_base(models.llama(tied=False), root / "base", dtype=torch.bfloat16)
    models.save_adapter(base, root / "adapter", _lora())
    return root


def _half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.0" not in name or "lora_A" not in name}


def _other_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:2].clone() if "lora_A" in name else tensor for name, tensor in tensors.items()}


def _other_width(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:, :-1].clone() if "lora_A" in name else tensor for name, tensor in tensors.items()}


def _no_object(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[1]")


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


JUDGED: dict[str, tuple[Damage, type[RunnerError], str]] = {
    "half a pair": (_tensors(_half), BrokenAdapter, "but not both halves of that pair"),
    "two ranks": (_tensors(_other_rank), BrokenAdapter, "their ranks differ"),
    "another base": (_tensors(_other_width), AdapterMismatch, "PEFT cannot put the adapter on the base"),
    "a config that is no object": (_no_object, BrokenAdapter, "is not a JSON object"),
    "no config": (_no_config, BrokenAdapter, "cannot be read"),
    "no weights": (_no_weights, BrokenAdapter, "cannot be read"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_judge_refuses_what_it_cannot_read_by_itself(name: str, plain: Path, tmp_path: Path) -> None:
    damage, family, said = JUDGED[name]
    shutil.copytree(plain / "adapter", tmp_path / "adapter")
    damage(tmp_path / "adapter")

    with pytest.raises(family, match=said):
        judge(base=plain / "base", adapter=tmp_path / "adapter", merged=plain / "base", dtype="auto")


def _extra(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"base_model.model.lm_head.weight": torch.ones(models.llama(tied=False).lm_head.weight.shape)}


def _poisoned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors[min(tensors)][0, 0] = float("nan")
    return tensors


def _rank_two(folder: Path) -> None:
    _config(r=2)(folder)
    _tensors(
        lambda tensors: {
            name: (tensor[:2] if "lora_A" in name else tensor[:, :2]).clone() for name, tensor in tensors.items()
        }
    )(folder)


# What is done to the second of two adapters, how they are combined, and what merge and judge say; "" where the merge
# refuses for another reason, which tests/parity/test_several_refused.py has.
COMBINED: dict[str, tuple[Damage, str, str, str]] = {
    "more than its config says": (_tensors(_extra), "cat", "part 2 brings .*lm_head", "An adapter brings .*lm_head"),
    "another base": (_tensors(_other_width), "cat", "", "PEFT cannot put an adapter on the base"),
    "a tensor that PEFT does not keep": (_tensors(_poisoned), "cat", "", "PEFT does not hold the adapter tensor"),
    "another rank": (_rank_two, "ties", "", "PEFT cannot combine the adapters"),
}


@pytest.mark.parametrize("name", COMBINED)
def test_two_adapters_of_which_one_cannot_be_combined_are_refused(name: str, plain: Path, tmp_path: Path) -> None:
    damage, kind, by_merge, by_judge = COMBINED[name]
    shutil.copytree(plain / "adapter", tmp_path / "second")
    damage(tmp_path / "second")
    is_pruned = kind == "ties"
    combination = Combination(
        kind=kind, weights=(1.0, 1.0), density=0.5 if is_pruned else None, majority_sign="total" if is_pruned else None
    )
    several = Several(paths=(plain / "adapter", tmp_path / "second"), combination=combination)

    with pytest.raises(RunnerError, match=by_merge):
        run_merge(plain / "base", several, tmp_path / "merged")
    with pytest.raises(AdapterMismatch if "brings" not in by_judge else UnsupportedAdapter, match=by_judge):
        judge(base=plain / "base", adapter=several, merged=plain / "base", dtype="auto")


def test_weights_beyond_float32_are_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "adapter", tmp_path / "large")
    _tensors(lambda tensors: {name: tensor * 1e4 for name, tensor in tensors.items()})(tmp_path / "large")
    combination = Combination(kind="svd", weights=(1e38, 1e38))
    several = Several(paths=(plain / "adapter", tmp_path / "large"), combination=combination)

    with pytest.raises(AdapterMismatch, match="PEFT cannot combine the adapters"):
        run_merge(plain / "base", several, tmp_path / "merged")


def test_the_fix_for_a_layer_that_peft_refuses_names_no_other_base(tmp_path: Path) -> None:
    case = REFUSED["a module that PEFT refuses in Mamba"]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", case.lora)
    case.damage(adapter)

    with pytest.raises(UnsupportedAdapter) as raised:
        prepare(base, adapter, dtype="auto")
    assert "base-model" not in raised.value.problem.fix
