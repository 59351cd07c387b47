"""A merge with a head of its own goes wrong in ways of its own; each is caught, in the layer that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.files.layout import read_checkpoint
from runner.judge.judge import judge
from runner.protocol.verdict import Layer, Status
from tests.judge.merges import edit_config, write_index
from tests.parity import heads, models
from tests.parity.heads import Trained
from tests.parity.pipeline import run_merge

Damage = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return (base, adapter, merged) of a classification adapter with three labels on a causal base."""
    root = tmp_path_factory.mktemp("heads")
    base = models.save_base(models.llama(tied=False), root / "base", dtype=torch.bfloat16)
    options = {"target_modules": ["q_proj", "v_proj"]}
    adapter = heads.save_adapter(base, root / "adapter", Trained(task="SEQ_CLS", labels=3, options=options))
    run_merge(base, adapter, root / "merged")
    return base, adapter, root / "merged"


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the shard that holds the head, and bring the index up to date."""
    path = folder / read_checkpoint(folder).tensors["score.weight"].file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    write_index(folder)


def _lose_head(folder: Path, base: Path) -> None:
    _edit(folder, lambda tensors: [tensors.pop("score.weight")].clear())


def _keep_base_head(folder: Path, base: Path) -> None:
    checkpoint = read_checkpoint(base)
    head = load_file(base / checkpoint.tensors["lm_head.weight"].file)["lm_head.weight"]
    _edit(folder, lambda tensors: tensors.update({"lm_head.weight": head}))


def _shift_rows(folder: Path, base: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"score.weight": tensors["score.weight"].roll(1, 0).contiguous()}))


def _random_head(folder: Path, base: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"score.weight": torch.randn(3, 48).bfloat16()}))


def _fewer_rows(folder: Path, base: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({"score.weight": tensors["score.weight"][:2].contiguous()}))


def _two_labels(folder: Path, base: Path) -> None:
    edit_config(folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})


def _swapped_labels(folder: Path, base: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    edit_config(folder, id2label=dict(zip(config["id2label"], reversed(config["id2label"].values()), strict=True)))


def _base_class(folder: Path, base: Path) -> None:
    edit_config(folder, architectures=["LlamaForCausalLM"])


FAULTS: dict[str, tuple[Damage, Layer, str]] = {
    "head_lost": (_lose_head, Layer.STRUCTURE, "score.weight is missing"),
    "base_head_kept": (_keep_base_head, Layer.STRUCTURE, "lm_head.weight is not expected"),
    "rows_shifted": (_shift_rows, Layer.STORAGE, "score.weight"),
    "head_random": (_random_head, Layer.STORAGE, "score.weight"),
    "rows_missing": (_fewer_rows, Layer.STRUCTURE, "score.weight has shape [2, 48]"),
    "wrong_num_labels": (_two_labels, Layer.STRUCTURE, "id2label"),
    "labels_swapped": (_swapped_labels, Layer.STRUCTURE, "id2label"),
    "class_of_the_base": (_base_class, Layer.STRUCTURE, "architectures"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fails_a_wrong_head(right: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter, merged = right
    damage, layer, text = FAULTS[name]
    damaged = Path(shutil.copytree(merged, tmp_path / "damaged"))
    damage(damaged, base)

    verdict = judge(base=base, adapter=adapter, merged=damaged, dtype="auto")

    assert verdict.status is Status.FAIL
    assert any(check.layer is layer and text in check.detail for check in verdict.failures), verdict.failures


def test_the_base_in_the_tasks_class_is_not_the_merge(right: tuple[Path, Path, Path]) -> None:
    base, adapter, _ = right
    verdict = judge(base=base, adapter=adapter, merged=base, dtype="auto")
    assert verdict.status is Status.FAIL
    assert {Layer.STRUCTURE, Layer.STORAGE} <= {check.layer for check in verdict.failures}
