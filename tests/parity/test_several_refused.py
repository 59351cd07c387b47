"""Several adapters that cannot be combined without losing a part of them are refused, each by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from runner.protocol.combination import KINDS, Several
from runner.protocol.errors import AdapterMismatch, UnsupportedAdapter
from tests.parity import models
from tests.parity.pipeline import run_merge
from tests.parity.several import combination, lora, save_all


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_base(models.llama(tied=False), tmp_path_factory.mktemp("base") / "b", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return save_all(base, tmp_path_factory.mktemp("pair"), lora(), lora(lora_alpha=16))


REFUSED: Mapping[str, dict[str, object]] = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "ensure_weight_tying": {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "use_qalora": {"use_qalora": True},
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_would_drop_is_refused_by_name(name: str, place: int, tmp_path: Path) -> None:
    base = models.save_base(models.qwen2(), tmp_path / "base", dtype=torch.bfloat16)
    configs = [lora(target_modules=["q_proj"]), lora(target_modules=["q_proj"])]
    configs[place] = lora(**{"target_modules": ["q_proj"], **REFUSED[name]})
    several = Several(paths=save_all(base, tmp_path, *configs), combination=combination("cat", 1.0, 1.0))

    with pytest.raises(UnsupportedAdapter, match=f"Adapter {place + 1} .*{name}"):
        run_merge(base, several, tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_a_field_that_nobody_foresaw_is_refused(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    several = Several(
        paths=(_edited(pair[0], tmp_path / "other", use_novelty=True), pair[1]),
        combination=combination("cat", 1.0, 1.0),
    )

    with pytest.raises(UnsupportedAdapter, match="use_novelty"):
        run_merge(base, several, tmp_path / "merged")


def _edited(adapter: Path, folder: Path, **fields: object) -> Path:
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    return folder


def test_adapters_of_different_bases_are_refused(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    other = _edited(pair[1], tmp_path / "other", base_model_name_or_path="somebody/else")

    with pytest.raises(AdapterMismatch, match="'somebody/else'"):
        run_merge(base, Several(paths=(pair[0], other), combination=combination("cat", 1.0, 1.0)), tmp_path / "merged")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cat" and not kind.endswith("svd")])
@pytest.mark.parametrize("second", [{"r": 2}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_kinds_that_add_factors_refuse_different_ranks(
    kind: str, second: dict[str, object], base: Path, tmp_path: Path
) -> None:
    adapters = save_all(base, tmp_path, lora(), lora(**second))

    with pytest.raises(AdapterMismatch, match=r"rank.* 2"):
        run_merge(base, Several(paths=adapters, combination=combination(kind, 1.0, 1.0)), tmp_path / "merged")


def test_a_method_that_is_no_lora_is_refused(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    import peft

    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    other = models.save_adapter(base, tmp_path / "ia3", config)

    with pytest.raises(UnsupportedAdapter, match="Adapter 2 is of type IA3"):
        run_merge(base, Several(paths=(pair[0], other), combination=combination("cat", 1.0, 1.0)), tmp_path / "merged")


def test_tokenizers_that_differ_are_told(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    paths = tuple(_edited(path, tmp_path / f"copy{number}") for number, path in enumerate(pair))
    for number, path in enumerate(paths):
        (path / "tokenizer.json").write_text(json.dumps({"number": number}))

    plan, merged = run_merge(base, Several(paths=paths, combination=combination("cat", 1.0, 1.0)), tmp_path / "merged")

    assert any("Adapter 2 carries other tokenizer files" in note for note in plan.summary.notes)
    assert json.loads((merged.root / "tokenizer.json").read_text()) == {"number": 0}
