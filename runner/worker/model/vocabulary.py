"""A vocabulary of another size than the base's: which rows the adapter was trained with, and who has their values.

An adapter whose tokens were added (or whose padding was cut) brings embeddings with another number of rows. The base
then takes that size first, as `resize_token_embeddings` does it before PEFT loads the adapter: rows at the end are cut
off, or come from the adapter. A row that neither has is never invented.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from runner.files.adapter.folder import Adapter
from runner.protocol.errors import AdapterMismatch
from runner.worker.model.heads import PREFIX

# What PEFT puts between a module's path and the name of its parameter when it saves a copy of the base's.
_INSIDE = (".token_adapter.base_layer.", ".base_layer.")


def given_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the whole tensors that the adapter brings, and its other tensors, by the base's keys, with shapes."""
    given: dict[str, tuple[int, ...]] = {}
    for name, tensor in adapter.tensors.items():
        if not name.startswith(PREFIX):
            continue
        key = name[len(PREFIX) :]
        for part in _INSIDE:
            key = key.replace(part, ".")
        given[key] = tensor.shape
    return given


def resized_config(model: PreTrainedModel, adapter: Adapter) -> PretrainedConfig | None:
    """Return the config with the adapter's vocabulary, or None where that is the model's.

    Args:
        model: of the base's vocabulary, on the meta device.
        adapter: not loaded.

    Raises:
        AdapterMismatch: its embeddings have different numbers of rows among themselves.
    """
    current = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(current, int):
        return None
    found = {rows for rows in _rows(model, adapter, current) if rows != current}
    trained = {rows for rows in _trained_rows(model, adapter, current) if rows > current}
    found = found or trained
    if not found:
        return None
    if len(found) > 1:
        raise AdapterMismatch(
            f"The adapter's embeddings have {' and '.join(str(rows) for rows in sorted(found))} rows.",
            why="A model has one vocabulary; its input and output embeddings are of one size.",
            fix="Save the adapter again as a whole.",
        )
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = found.pop()
    return config


def zero_padded(model: PreTrainedModel, key: str, stored: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """Return `stored` in the model's larger shape, with zeros where that is what the added rows hold.

    So it is for buffers (BART's `final_logits_bias`), and where the adapter then trains every added row by its index.

    Raises:
        AdapterMismatch: nobody has the values of the added rows.
    """
    shape = tuple(model.state_dict()[key].shape)
    is_buffer = key in dict(model.named_buffers())
    added = set(range(stored.shape[0], shape[0]))
    if not is_buffer and not added <= set(_token_indices(adapter, key.rpartition(".")[0])):
        raise AdapterMismatch(
            f"The adapter was trained with {shape[0]} rows of {key!r}, the base has {stored.shape[0]}.",
            why="The adapter does not bring the values of the added rows; they would have to be invented.",
            fix="Save the adapter again from its training with `save_embedding_layers=True`, "
            "or set `base-model` to the base with the enlarged vocabulary.",
        )
    padded = torch.zeros(shape, dtype=stored.dtype)
    padded[tuple(slice(size) for size in stored.shape)] = stored
    return padded


def _rows(model: PreTrainedModel, adapter: Adapter, current: int) -> Iterator[int]:
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    paths = {id(module): path for path, module in model.named_modules()}
    output = model.get_output_embeddings()
    head = paths.get(id(output), "") if output is not None else ""
    embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for key, shape in given_shapes(adapter).items():
        module, _, part = key.rpartition(".")
        if key in shapes:
            if shapes[key][:1] == (current,) and (module in embeddings or module == head):
                yield shape[0]
        elif part == "lora_embedding_A" and shapes.get(f"{module}.weight", ())[:1] == (current,):
            yield shape[1]
        elif head and key == f"{head}.lora_B.weight":
            yield shape[0]


def _trained_rows(model: PreTrainedModel, adapter: Adapter, current: int) -> Iterator[int]:
    """Yield how many rows an embedding needs for the tokens that the adapter trains by their index."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    embeddings = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    for module in embeddings:
        indices = _token_indices(adapter, module)
        if indices and shapes[f"{module}.weight"][0] == current:
            yield max(indices) + 1


def _token_indices(adapter: Adapter, module: str) -> list[int]:
    """Return the rows of `module` that the adapter trains one by one."""
    name = module.rpartition(".")[2]
    config: Mapping[str, Any] = adapter.config
    if adapter.peft_type == "TRAINABLE_TOKENS":
        targets = config.get("target_modules") or ["embed_tokens"]
        chosen = config.get("token_indices") if name in ([targets] if isinstance(targets, str) else targets) else None
    else:
        chosen = config.get("trainable_token_indices")
        if isinstance(chosen, dict):
            chosen = chosen.get(name)
    return [int(index) for index in chosen or ()] if name.startswith(("embed", "wte", "word_emb", "shared")) else []
