"""Checkpoints of a few bytes, and what structure says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.files.layout import INDEX_FILE, SINGLE_FILE, read_checkpoint
from runner.judge.sidecars.files import judge_files
from runner.judge.structure import Form, Wanted, judge_structure
from runner.protocol.verdict import Check, Outcome

CONFIG = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 8}
TENSORS = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
WANTED = {"a": Wanted(dtype="F32", shape=(2, 3)), "b": Wanted(dtype="F32", shape=(4,))}


def form_of(**fields: Any) -> Form:
    usual = {
        "required": WANTED, "optional": {}, "dtype": "auto", "is_untied": False, "may_untie": False, "rows": None,
        "config": {},
    }  # fmt: skip
    return Form(**{**usual, **fields})


def write_folder(
    root: Path, tensors: dict[str, torch.Tensor] | None = None, files: Mapping[str, str | None] | None = None
) -> Path:
    """Write a checkpoint; None leaves a file out."""
    root.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS if tensors is None else tensors, root / SINGLE_FILE)
    for name, text in {"config.json": json.dumps(CONFIG), **(files or {})}.items():
        if text is not None:
            (root / name).write_text(text)
    return root


def write_indexed(root: Path, total: int | None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a checkpoint of one shard with an index that tells a total, or none."""
    write_folder(root, tensors)
    shard = root / "model-00001-of-00001.safetensors"
    (root / SINGLE_FILE).rename(shard)
    metadata = {} if total is None else {"total_size": total}
    names = dict.fromkeys(tensors or TENSORS, shard.name)
    (root / INDEX_FILE).write_text(json.dumps({"metadata": metadata, "weight_map": names}))
    return root


def problems(base: Path, merged: Path, form: Form | None = None, adapter: Path | None = None) -> list[str]:
    """Return the details of the checks that fail."""
    return [check.detail for check in checks_of(base, merged, form, adapter) if check.outcome is Outcome.FAIL]


def checks_of(base: Path, merged: Path, form: Form | None = None, adapter: Path | None = None) -> list[Check]:
    """Return the checks of structure, then those of the files beside the weights."""
    form = form or form_of()
    found = read_checkpoint(merged)
    checks = list(judge_structure(base=read_checkpoint(base), merged=found, form=form))
    assert len(checks) == 4
    beside = judge_files(base, (adapter or base / "none",), found, rows=form.rows)
    assert len(beside) == 4
    return [*checks, *beside]
