"""The five real adapters of the fault suite, trained on the demo's chats into a cache outside git.

Their characters are what matters: a strong one that bf16 keeps whole, DoRA, one with trained embeddings and new tokens,
and two weak ones (of the mild one bf16 keeps a tenth, of the tiny one next to nothing), where most faults hide.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.train import ALL_LINEAR, BASE_NAME, CHATS, batches, encode, read_chats, save, train

NEW_TOKENS = ("<|arr|>", "<|matey|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one adapter is trained.

    Attributes:
        config: fields of `LoraConfig`.
        steps: of 8 chats each.
        rate: of the first step.
        dtype: that the weights are stored in.
        adds_tokens: whether `NEW_TOKENS` are added, and used in the chats.
        seed: of the weights and of the order of the chats.
    """

    config: Mapping[str, Any]
    steps: int
    rate: float
    dtype: str = "float32"
    adds_tokens: bool = False
    seed: int = 0


LINEAR = tuple(ALL_LINEAR.split(","))
RECIPES: Mapping[str, Recipe] = {
    "strong": Recipe(config={"r": 16, "lora_alpha": 32, "target_modules": LINEAR}, steps=24, rate=2e-3),
    "tiny": Recipe(config={"r": 8, "lora_alpha": 8, "target_modules": ("q_proj", "v_proj")}, steps=3, rate=2e-5),
    "mild": Recipe(config={"r": 8, "lora_alpha": 16, "target_modules": LINEAR}, steps=8, rate=1e-4),
    "saved": Recipe(
        config={
            "r": 8,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": ("q_proj", "v_proj", "o_proj"),
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
        steps=8,
        rate=1e-3,
        dtype="bfloat16",
        adds_tokens=True,
    ),
    "dora": Recipe(
        config={"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ("q_proj", "o_proj", "down_proj")},
        steps=16,
        rate=2e-3,
    ),
}


def trained(name: str, base: Path, cache: Path) -> Path:
    """Return the folder of one adapter in `cache`, trained if a former call has not finished it with this recipe."""
    folder, marker, recipe = cache / name, cache / f"{name}.json", RECIPES[name]
    wanted = json.loads(json.dumps({**recipe.config, "steps": recipe.steps, "rate": recipe.rate, "seed": recipe.seed}))
    if folder.is_dir() and marker.is_file() and json.loads(marker.read_bytes())["recipe"] == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    losses = _train(recipe, base, folder)
    marker.write_text(json.dumps({"recipe": wanted, "losses": losses}))
    return folder


def _train(recipe: Recipe, base: Path, folder: Path) -> Sequence[float]:
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chats = read_chats(CHATS)
    if recipe.adds_tokens:
        tokenizer.add_tokens(list(NEW_TOKENS))
        model.resize_token_embeddings(len(tokenizer))
        for chat in chats:
            chat[-1]["content"] = f"{NEW_TOKENS[0]} {chat[-1]['content']} {NEW_TOKENS[1]}"
    model.name_or_path = BASE_NAME
    config = LoraConfig(
        **{name: list(value) if isinstance(value, tuple) else value for name, value in recipe.config.items()},
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_NAME,
    )
    peft_model: Any = get_peft_model(model, config)
    data = batches([encode(tokenizer, chat) for chat in chats], size=8, pad=tokenizer.pad_token_id, seed=recipe.seed)
    losses = train(peft_model, data, steps=recipe.steps, rate=recipe.rate)
    save(peft_model.eval(), folder, dtype=recipe.dtype, card=f"# {folder.name}\n\nOf the fault suite.\n")
    if recipe.adds_tokens:
        tokenizer.save_pretrained(folder)
    return losses
