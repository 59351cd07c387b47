"""Several adapters: the merge equals PEFT's `add_weighted_adapter` on the float32 base, merged and rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from runner.checkpoint.names import map_names
from runner.combination import KINDS, PRUNING, RANDOM, VOTING, Combination, Several
from runner.verify.judge import judge
from tests.parity import models, oracle
from tests.parity.pipeline import run_merge

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options})


def combination(kind: str, *weights: float, seed: int = 5) -> Combination:
    return Combination(
        kind=kind,
        weights=weights,
        density=0.6 if kind in PRUNING else None,
        seed=seed if kind in RANDOM else None,
        majority_sign="total" if kind in VOTING else None,
    )


def peft_combination(base: Path, several: Several) -> dict[str, torch.Tensor]:
    """Return stored name → float32 tensor, as somebody does it who knows PEFT alone."""
    torch.set_num_threads(1)
    wanted = several.combination
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, several.paths[0], adapter_name="a0")
    for number, path in enumerate(several.paths[1:], start=1):
        peft_model.load_adapter(path, adapter_name=f"a{number}")
    torch.manual_seed(wanted.seed or 0)
    peft_model.add_weighted_adapter(
        [f"a{number}" for number in range(len(several.paths))],
        list(wanted.weights),
        "both",
        combination_type=wanted.kind,
        density=wanted.density,
        majority_sign_method=wanted.majority_sign or "total",
        svd_full_matrices=False,
    )
    merged = peft_model.merge_and_unload(adapter_names=["both"])
    state = merged.state_dict()
    return {name: state[key] for key, name in map_names(merged, oracle.read_folder(base)).renamed.items()}


def check(base: Path, several: Several, merged: Path) -> None:
    expected, before, after = peft_combination(base, several), oracle.read_folder(base), oracle.read_folder(merged)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        wanted = expected[name] if name in expected else before[name]
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_base(models.llama(tied=False), tmp_path_factory.mktemp("base") / "b", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return (
        models.save_adapter(base, root / "first", _lora(), seed=3),
        models.save_adapter(base, root / "second", _lora(lora_alpha=16), seed=4),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_peft(kind: str, base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    several = Several(paths=pair, combination=combination(kind, 0.7, -0.4))

    plan, merged = run_merge(base, several, tmp_path / "merged")

    check(base, several, merged.root)
    assert any(kind in note for note in plan.summary.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_passes_a_right_merge(kind: str, base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    several = Several(paths=pair, combination=combination(kind, 0.7, -0.4))
    _, merged = run_merge(base, several, tmp_path / "merged")

    verdict = judge(base=base, adapter=several, merged=merged.root, dtype="auto")

    assert verdict.failures == ()
    assert verdict.passed
