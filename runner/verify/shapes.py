"""Where a right merge has other shapes than the base: the vocabulary of the adapter, and tensors of its own."""

from __future__ import annotations

from runner.checkpoint.layout import Checkpoint
from runner.verify.blueprint import Blueprint
from runner.verify.recipe import Copy, LowRank, Recipe


def resized_rows(recipe: Recipe, blueprint: Blueprint) -> int | None:
    """Return the adapter's vocabulary size where it brings embeddings of another size than the base's, else None."""
    for key, rule in recipe.rules.items():
        if key.rpartition(".")[0] not in blueprint.embeddings:
            continue
        tensor = rule.tensor if isinstance(rule, Copy) else rule.replaced_base if isinstance(rule, LowRank) else None
        if tensor is not None and recipe.tensors[tensor].shape[0] != blueprint.keys[key][0]:
            return recipe.tensors[tensor].shape[0]
    return None


def main_dtype(base: Checkpoint, blueprint: Blueprint) -> str:
    """Return the dtype of most bytes of what the merged model keeps of the base."""
    sizes: dict[str, int] = {}
    for info in base.tensors.values():
        if info.name not in blueprint.dropped:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
    return max(sorted(sizes), key=lambda name: sizes[name])
