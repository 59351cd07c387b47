"""A sample of the grid; `python -m tests.parity.grid` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig

from tests.parity import grid, models
from tests.parity.grid_cells import METHODS, MODELS, Model, cells
from tests.parity.pipeline import run_merge

SAMPLE = {
    ("LlamaForCausalLM", "lora"): grid.MERGED,
    ("GPT2LMHeadModel", "ia3"): grid.MERGED,
    ("BertForSequenceClassification", "dora"): grid.MERGED,
    ("T5ForConditionalGeneration", "oft"): grid.MERGED,
    ("ViTForImageClassification", "ln_tuning"): grid.MERGED,
    ("LlamaForCausalLM", "prefix tuning"): grid.REFUSED,
    ("ResNetForImageClassification", "lora"): grid.MERGED,
    ("ResNetForImageClassification", "oft"): grid.REFUSED,  # PEFT's merge of a convolution wider than 1 is not OFT's
}


def _cell(name: str, method: str) -> tuple[Model, PeftConfig]:
    model = next(model for model in MODELS if model.name == name)
    config = METHODS[method](model)
    assert config is not None
    return model, config


def _run(name: str, method: str, folder: Path) -> grid.Cell:
    model, config = _cell(name, method)
    return grid.run(model, method, config, grid.save_model(model, folder / "base"), folder)


def test_the_grid_is_as_large_as_pefts() -> None:
    assert len(list(cells())) > 450


@pytest.mark.parametrize("name, method", SAMPLE, ids=str)
def test_a_cell_is_merged_or_refused(name: str, method: str, tmp_path: Path) -> None:
    cell = _run(name, method, tmp_path)
    assert cell.outcome == SAMPLE[name, method], cell.said


def test_a_merge_that_computes_something_else_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is not asked: the grid compares outputs by itself."""
    merge = run_merge

    def then_forget(base: Path, adapter: Path, merged: Path) -> None:
        merge(base, adapter, merged)
        (merged / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())

    monkeypatch.setattr(grid, "run_merge", then_forget)
    assert _run("LlamaForCausalLM", "lora", tmp_path / "judged").said.startswith("a right merge fails")
    base, adapter = tmp_path / "judged" / "base", tmp_path / "judged" / "adapter"
    assert grid.distance(base, adapter, tmp_path / "judged" / "merged") > grid.LIMIT


def test_a_traceback_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Path) -> None:
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr(grid, "run_merge", fails)
    cell = _run("LlamaForCausalLM", "lora", tmp_path)
    assert (cell.outcome, cell.said) == (grid.WRONG, "ZeroDivisionError: by chance")


def test_outputs_are_seen_to_differ(tmp_path: Path) -> None:
    model, config = _cell("LlamaForCausalLM", "lora")
    base = grid.save_model(model, tmp_path / "base")
    adapter = models.save_adapter(base, tmp_path / "adapter", config)
    with torch.no_grad():
        assert grid.distance(base, adapter, base) > grid.LIMIT
