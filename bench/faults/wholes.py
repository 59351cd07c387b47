"""Wrong values that only some adapters can have: DoRA's magnitudes, whole tensors, rows of added tokens."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from bench.faults.scene import EMBEDDING, Scene, Values


def magnitude_ignored(scene: Scene) -> Values:
    """DoRA merged as if it were LoRA."""
    tensors = load_file(scene.adapter / "adapter_model.safetensors")
    scaling = scene.config["lora_alpha"] / scene.config["r"]
    for name in scene.weights:
        a, b = (tensors[f"base_model.model.{name.removesuffix('weight')}lora_{half}.weight"] for half in "AB")
        yield name, scene.plain[name] + scaling * (b.float() @ a.float())


def saved_ignored(scene: Scene) -> Values:
    """The base's rows where the adapter brings whole tensors; added rows are the adapter's."""
    for name, value in scene.saved.items():
        plain = scene.plain[name]
        yield name, torch.cat([plain, value[len(plain) :]]) if len(plain) < len(value) else plain


def head_is_embedding(scene: Scene) -> Values:
    """The head holds the embedding."""
    yield "lm_head.weight", scene.exact(EMBEDDING)


def embedding_is_head(scene: Scene) -> Values:
    """The embedding holds the head."""
    yield EMBEDDING, scene.exact("lm_head.weight")


def added_rows_random(scene: Scene) -> Values:
    """The rows of added tokens are what resizing starts with, not what was trained."""
    generator = torch.Generator().manual_seed(5)
    for name, value in scene.saved.items():
        rows = len(scene.plain[name])
        fresh = value.std() * torch.randn(value[rows:].shape, generator=generator)
        yield name, torch.cat([value[:rows], fresh])
