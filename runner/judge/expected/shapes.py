"""Where a right merge has other shapes than the base: the vocabulary of the adapter, and tensors of its own."""

from __future__ import annotations

from runner.files.layout import Checkpoint
from runner.judge.expected.blueprint import Blueprint
from runner.judge.expected.recipe import PREFIX, Recipe


def resized_rows(recipe: Recipe, blueprint: Blueprint) -> int | None:
    """Return the adapter's vocabulary size where it brings embeddings of another size than the base's, else None."""
    for name, info in recipe.tensors.items():
        key = name.removeprefix(PREFIX)
        if key.endswith(".lora_embedding_A"):
            weight, rows = f"{key.removesuffix('.lora_embedding_A')}.weight", info.shape[1]
        else:
            weight, rows = key.replace(".token_adapter.", ".").replace(".base_layer.", "."), info.shape[0]
        is_embedding = weight.rpartition(".")[0] in blueprint.embeddings and weight in blueprint.keys
        if is_embedding and rows != blueprint.keys[weight][0]:
            return rows
    return _rows_of_tokens(recipe, blueprint)


def _rows_of_tokens(recipe: Recipe, blueprint: Blueprint) -> int | None:
    """Return how many rows the tokens need that the adapter trains by their index, where the base has fewer."""
    chosen = recipe.config.get("trainable_token_indices") or recipe.config.get("token_indices") or ()
    named = chosen if isinstance(chosen, dict) else {"": chosen}
    for name, indices in named.items():
        for module in blueprint.embeddings:
            is_meant = module.endswith(name) if name else module.rpartition(".")[2] in ("embed_tokens", "wte")
            rows = blueprint.keys[f"{module}.weight"][0]
            if is_meant and indices and max(indices) >= rows:
                return int(max(indices)) + 1
    return None


def main_dtype(base: Checkpoint, blueprint: Blueprint) -> str:
    """Return the dtype of most bytes of what the merged model keeps of the base."""
    sizes: dict[str, int] = {}
    for info in base.tensors.values():
        if info.name not in blueprint.dropped:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
    return max(sorted(sizes), key=lambda name: sizes[name])
