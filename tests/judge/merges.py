"""Reference merges: PEFT's own float32 merge, rounded once, written in the base's layout by a few plain lines."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from runner.architecture.names import map_names
from runner.files.layout import INDEX_FILE, read_checkpoint

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def merged_weights(base: Path, adapter: Path, *, rows: int | None = None) -> dict[str, torch.Tensor]:
    """Return the state dict (float32) of PEFT's merge of the base loaded in float32.

    Tied sides are separated first, so that a delta on one of them does not leak into the other, as it does in
    `merge_and_unload` of a tied model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        peft = PeftModel.from_pretrained(model, adapter)
        seen: set[int] = set()
        for module in peft.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
                seen.add(id(parameter))
        plain = peft.merge_and_unload(safe_merge=False)
    return {key: value.detach().clone() for key, value in plain.state_dict().items()}


def save_merge(out: Path, base: Path, adapter: Path, *, dtype: str = "auto", rows: int | None = None) -> Path:
    """Write the right merge in the base's shards and return its folder."""
    return write_merge(out, base, merged_weights(base, adapter, rows=rows), dtype=dtype, rows=rows)


def write_merge(
    out: Path, base: Path, weights: dict[str, torch.Tensor], *, dtype: str = "auto", rows: int | None = None
) -> Path:
    """Write `weights` (by state-dict key, unrounded) over a copy of the base, each in its output dtype."""
    shutil.copytree(base, out)
    checkpoint = read_checkpoint(base)
    keys = {name: key for key, name in map_names(_empty(base), checkpoint.tensors).renamed.items()}
    edits: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    extra = _untied(base, weights, keys)
    last = checkpoint.files[-1].name
    for file in checkpoint.files:
        with safe_open(base / file.name, framework="pt") as handle:
            tensors = {info.name: handle.get_tensor(info.name) for info in file.tensors}
        for name, tensor in tensors.items():
            target = TORCH[NAMES[dtype]] if dtype != "auto" and tensor.is_floating_point() else tensor.dtype
            value = weights.get(keys.get(name, ""), tensor)
            tensors[name] = value.to(target).contiguous()
        if file.name == last:
            tensors |= {name: value.to(next(iter(tensors.values())).dtype) for name, value in extra.items()}
        save_file(tensors, out / file.name, metadata=dict(file.metadata))
    if checkpoint.is_indexed:
        write_index(out)
    if extra:
        edits["tie_word_embeddings"] = False
    if rows is not None:
        edits["vocab_size"] = rows
    edit_config(out, **edits)
    return out


def write_index(folder: Path) -> None:
    """Write the index anew from the shards that it names, after tensors were added or changed their size."""
    path = folder / INDEX_FILE
    index = json.loads(path.read_bytes())
    weight_map, total = {}, 0
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                weight_map[name] = file
                total += handle.get_tensor(name).nbytes
    path.write_text(json.dumps({"metadata": {**index["metadata"], "total_size": total}, "weight_map": weight_map}))


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}, indent=2))


def _untied(base: Path, weights: dict[str, torch.Tensor], keys: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return what has to be stored beside the base's tensors because a tie no longer holds."""
    return {
        target: weights[target]
        for target, source in _empty(base).all_tied_weights_keys.items()
        if target not in keys.values() and not torch.equal(weights[target], weights[source])
    }


def _empty(base: Path) -> PreTrainedModel:
    from transformers import AutoConfig

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
