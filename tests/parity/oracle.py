"""The oracle: PEFT's own `merge_and_unload()` of the base loaded in float32, rounded once to the output dtype."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from runner.architecture.names import map_names

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def peft_merge(base: Path, adapter: Path, *, untie: bool = False) -> dict[str, torch.Tensor]:
    """Return stored name → float32 tensor as PEFT merges it.

    Args:
        base: checkpoint.
        adapter: PEFT adapter.
        untie: load the base with its head cloned from the embeddings, as PEFT advises before such a merge.
    """
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if untie:
        embeddings = model.get_input_embeddings().weight
        model.get_output_embeddings().weight = torch.nn.Parameter(embeddings.detach().clone())
        model.config.tie_word_embeddings = False
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False)
    names = map_names(model, read_folder(base)).renamed
    state = model.state_dict()
    stored = {name: state[key] for key, name in names.items()}
    if untie or (config.tie_word_embeddings and not model.config.tie_word_embeddings):
        stored |= {key: state[key] for key in model._tied_weights_keys if key not in names}
    return stored


def saved_merge(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return stored name → float32 tensor as PEFT merges it and transformers saves it, through `folder`."""
    torch.set_num_threads(1)
    model = PeftModel.from_pretrained(load(base), adapter)
    model.merge_and_unload(safe_merge=False).save_pretrained(folder)
    return read_folder(folder)


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model of the class that config.json names, in `dtype`."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(folder, dtype=dtype)
    return model


def peft_merge_of_fused(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return stored name → float32 tensor of a model whose parameters are not all stored as they are."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return reverted(PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False))


def reverted(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the model's parameters by their stored names, as transformers saves them."""
    return dict(revert_weight_conversion(model, model.state_dict()))


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint folder."""
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
