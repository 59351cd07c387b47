"""An adapter that would do nothing, or that nobody can merge, is refused from its folder alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig
from peft.tuners.lora.config import ArrowConfig
from safetensors.torch import load_file, save_file

from runner.files.adapter.folder import read_adapter
from runner.protocol.errors import BrokenAdapter, UnsupportedAdapter
from tests.parity import models
from tests.parity.cases import CASES, llama, lora

QV = ["q_proj", "v_proj"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_base(llama(), tmp_path_factory.mktemp("base") / "llama", dtype=torch.bfloat16)


# As PEFT makes them, before any training: each of these methods starts at no effect.
UNTRAINED = ["lora", "rslora", "patterns", "adalora", "loha", "lokr", "fourierft", "gralora", "hira", "mica"]


@pytest.mark.parametrize("name", UNTRAINED)
def test_refuses_an_adapter_that_changes_nothing(name: str, base: Path, tmp_path: Path) -> None:
    config = CASES[name].config
    adapter = models.save_adapter(base, tmp_path / "adapter", config, scale=0.0, change=_clear)
    with pytest.raises(UnsupportedAdapter, match="changes nothing"):
        read_adapter(adapter)


def _clear(model: torch.nn.Module) -> None:
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("lora_E", "spectrum", "hada_w2_a", "lokr_w2", "gralora_B", "hira_B")):
            parameter.data.zero_()


@pytest.mark.parametrize("damage", [0.0, -0.0])
def test_one_factor_that_is_not_zero_is_enough(damage: float, base: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules=QV))
    tensors = load_file(adapter / WEIGHTS)
    names = sorted(name for name in tensors if "lora_B" in name)
    for name in names[1:]:
        tensors[name].fill_(damage)
    save_file(tensors, adapter / WEIGHTS)
    read_adapter(adapter)

    tensors[names[0]].fill_(damage)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UnsupportedAdapter, match=r"each of its 8 tensors is zero or is multiplied by zero, .*lora_B"):
        read_adapter(adapter)


def test_zero_factors_beside_a_trained_module_are_not_nothing(base: Path, tmp_path: Path) -> None:
    config = lora(target_modules=QV, modules_to_save=["lm_head"])
    read_adapter(models.save_adapter(base, tmp_path / "adapter", config, scale=0.0))


def test_refuses_a_file_without_tensors_and_a_dtype_that_no_float32_holds(base: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules=QV))
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(UnsupportedAdapter, match="is stored as F8_E4M3"):
        read_adapter(adapter)

    save_file({}, adapter / WEIGHTS)
    with pytest.raises(BrokenAdapter, match="holds no tensor"):
        read_adapter(adapter)


def test_refuses_a_config_of_gigabytes_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BrokenAdapter, match="is larger than"):
        read_adapter(tmp_path)


WRONG_FIELDS = [
    {"lora_alpha": float("nan")},
    {"target_modules": "(unclosed"},
    {"r": 1 << 40},
    {"rank_pattern": {"q_proj": 1 << 40}},
    {"r": 0},
]


@pytest.mark.parametrize("fields", WRONG_FIELDS, ids=str)
def test_refuses_a_field_that_peft_cannot_mean(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules=QV))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(BrokenAdapter, match=f"The adapter's config sets `{next(iter(fields))}"):
        read_adapter(adapter)


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_refuses_a_config_that_is_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(BrokenAdapter):
        read_adapter(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_refuses_a_value_that_is_not_finite(value: float, dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules=QV))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
    name = max(tensors)
    tensors[name][-1, -1] = value
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(BrokenAdapter, match="holds NaN or Inf") as raised:
        read_adapter(adapter)
    assert name in raised.value.problem.what


def _saved(config: Callable[[], PeftConfig]) -> Callable[[Path, Path], None]:
    return lambda base, folder: _save(base, folder, config())


def _save(base: Path, folder: Path, config: PeftConfig) -> None:
    config.task_type = "CAUSAL_LM"
    models.save_adapter(base, folder, config)


def _edited(**changes: Any) -> Callable[[Path, Path], None]:
    """Return a maker of a sound LoRA folder whose config says something else, where PEFT cannot make the real one."""

    def make(base: Path, folder: Path) -> None:
        _save(base, folder, lora(target_modules=QV))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


REFUSED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "PROMPT_TUNING": (_saved(lambda: peft.PromptTuningConfig(num_virtual_tokens=4)), "'PROMPT_TUNING'"),
    "P_TUNING": (_saved(lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8)), "'P_TUNING'"),
    "PREFIX_TUNING": (_saved(lambda: peft.PrefixTuningConfig(num_virtual_tokens=4)), "'PREFIX_TUNING'"),
    "CPT": (
        _saved(
            lambda: peft.CPTConfig(
                task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
            )
        ),
        "'CPT'",
    ),
    "LILY": (_saved(lambda: peft.LilyConfig(target_modules=QV)), "'LILY'"),
    "POLY": (_saved(lambda: peft.PolyConfig(r=4, target_modules=QV)), "'POLY'"),
    "SHADOW": (_saved(peft.ShadowConfig), "'SHADOW'"),
    "ADAPTION_PROMPT": (
        _saved(lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1)), "'ADAPTION_PROMPT'",
    ),
    "CARTRIDGE": (_saved(lambda: peft.CartridgeConfig(num_virtual_tokens=4)), "'CARTRIDGE'"),
    "MULTITASK_PROMPT_TUNING": (_edited(peft_type="MULTITASK_PROMPT_TUNING"), "'MULTITASK_PROMPT_TUNING'"),
    "XLORA": (_edited(peft_type="XLORA"), "'XLORA'"),
    "ADAMSS": (_edited(peft_type="ADAMSS"), "'ADAMSS'"),
    "alora": (_saved(lambda: lora(target_modules=QV, alora_invocation_tokens=[1])), "`alora_invocation_tokens`"),
    "arrow": (_edited(arrow_config=ArrowConfig().__dict__), "`arrow_config`"),
    "pissa_niter": (_saved(lambda: lora(target_modules=QV, init_lora_weights="pissa_niter_4")), "'pissa_niter_4'"),
    "lora_ga": (
        _saved(lambda: lora(target_modules=QV, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())),
        "'lora_ga'",
    ),
    "corda": (_edited(init_lora_weights="corda"), "'corda'"),
    "loftq": (_edited(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "'loftq'"),
    "pvera_sampled": (
        _saved(lambda: peft.PveraConfig(r=4, target_modules=QV, sample_at_inference=True)), "`sample_at_inference`",
    ),
    "layer_replication": (
        _saved(lambda: lora(target_modules=QV, layer_replication=[(0, 2), (1, 2)])), "`layer_replication`",
    ),
    "megatron": (_edited(megatron_config={"tensor_model_parallel_size": 2}), "`megatron_config`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_has_no_merge_from_the_folder_alone(name: str, base: Path, tmp_path: Path) -> None:
    make, subject = REFUSED[name]
    make(base, tmp_path / "adapter")
    with pytest.raises(UnsupportedAdapter, match=subject) as raised:
        read_adapter(tmp_path / "adapter")
    assert raised.value.problem.why[0].isupper()
    assert raised.value.problem.fix


def test_the_helpers_of_this_file_make_sound_adapters(base: Path, tmp_path: Path) -> None:
    _edited()(base, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").peft_type == "LORA"
