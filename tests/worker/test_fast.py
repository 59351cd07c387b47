"""Blocks of rows have the bits of the whole matrix, wherever the cuts fall."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import PreTrainedModel

from runner.protocol.errors import RunnerError
from runner.worker.merge.fast import LEAST_ROWS, MIN_ROWS, SUM_BYTES, is_same, row_blocks
from runner.worker.merge.whole import UnitMerger
from tests.parity import models, oracle
from tests.parity.pipeline import run_merge


@pytest.mark.parametrize("step", [MIN_ROWS, 9, 64])
def test_spans_cover_all_rows_and_leave_none_alone(step: int) -> None:
    for rows in range(2, 4 * step + 2):
        spans = list(row_blocks(rows, step))

        assert [row for first, last in spans for row in range(first, last)] == list(range(rows))
        assert all(min(rows, LEAST_ROWS) <= last - first <= step for first, last in spans)
    assert list(row_blocks(1, step)) == [(0, 1)]


def test_a_matrix_that_would_end_in_a_single_row_has_the_bits_of_peft(tmp_path: Path) -> None:
    rows = SUM_BYTES // (2 * 48) + 1
    config = transformers.LlamaConfig(**{**models.LLAMA_CONFIG, "vocab_size": rows, "tie_word_embeddings": False})
    torch.manual_seed(1)
    base = models.save_base(transformers.LlamaForCausalLM(config), tmp_path / "base", dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=24, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, tmp_path / "adapter", lora)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    expected = oracle.peft_merge(base, adapter)["lm_head.weight"]
    assert torch.equal(oracle.read_folder(merged.root)["lm_head.weight"], expected)


def test_a_matrix_of_very_wide_rows_has_the_bits_of_peft(tmp_path: Path) -> None:
    columns = SUM_BYTES // 4 // 2 + 232  # less than two rows of the output fit into a block of the usual size
    config = transformers.LlamaConfig(**{**models.LLAMA_CONFIG, "intermediate_size": columns})
    torch.manual_seed(1)
    base = models.save_base(transformers.LlamaForCausalLM(config), tmp_path / "base", dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=24, target_modules=["down_proj"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, tmp_path / "adapter", lora)

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    expected = oracle.peft_merge(base, adapter)
    found = oracle.read_folder(merged.root)
    names = [name for name in found if "down_proj" in name]
    assert names
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_a_product_whose_small_blocks_differ_is_told_from_one_whose_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 16, generator=generator), torch.randn(16, 4096, generator=generator)

    assert is_same(left, right)
    with pytest.MonkeyPatch.context() as patch:
        product = torch.mm
        patch.setattr(
            torch, "mm", lambda a, b: product(a.double(), b.double()).float() if len(a) < 8 else product(a, b)
        )
        assert not is_same(left, right)


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
# How a build of torch could multiply: (the fault is in this product, model, adapter, what is said).
FAULTS: dict[str, tuple[Callable[[torch.Tensor, bool], bool], Callable[[], PreTrainedModel], LoraConfig, str]] = {
    "small blocks": (
        lambda left, _in_place: len(left) < MIN_ROWS,
        lambda: models.llama(tied=False),
        _lora(target_modules=["q_proj"]),
        "disagree on 'model.layers.0.self_attn.q_proj.weight'",
    ),
    "all blocks": (
        lambda _left, in_place: in_place,
        lambda: models.llama(tied=False),
        _lora(target_modules=["q_proj"]),
        "disagree on 'model.layers.0.self_attn.q_proj.weight'",
    ),
    "experts": (lambda _left, in_place: not in_place, models.mixtral, _lora(**EXPERTS), "disagree on an expert"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_torch_that_multiplies_otherwise_merges_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_wrong, build, config, said = FAULTS[fault]
    base = models.save_base(build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", config)
    product = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        result = product(left, right) if out is None else product(left, right, out=out)
        return result.mul_(1.5) if is_wrong(left, out is not None) else result

    monkeypatch.setattr(torch, "mm", mm)
    with pytest.raises(RunnerError, match=said):
        run_merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_peft_that_merges_to_another_shape_merges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", _lora(target_modules=["q_proj"], use_dora=True))
    merge = UnitMerger.merge
    monkeypatch.setattr(
        UnitMerger, "merge", lambda self, path: {name: whole[1:] for name, whole in merge(self, path).items()}
    )

    with pytest.raises(RunnerError, match=r"gives 'model\.layers\.0\.self_attn\.q_proj\.weight' the shape"):
        run_merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
