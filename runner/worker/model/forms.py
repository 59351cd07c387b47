"""The form of the merged model: its class, its labels and its vocabulary, which are the base's or the adapter's.

Decided from configs, headers and tensor names; no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from runner.architecture.adapter_names import name_adapter
from runner.architecture.building import BUILD_ERRORS
from runner.architecture.names import StoredNames, map_names
from runner.files.adapter.folder import Adapter
from runner.files.formats import check_plain
from runner.files.layout import Checkpoint
from runner.files.sidecars.files import read_config
from runner.protocol.errors import UnsupportedCheckpoint
from runner.worker.model.empty import empty_model, unbuildable
from runner.worker.model.heads import HEADED, choose_class, find_labels
from runner.worker.model.vocabulary import resized_config
from runner.worker.tensors.view import view


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the adapter makes of the base, besides its weights.

    Attributes:
        checkpoint: the base as the merged model's class sees it.
        model: of that class, on the meta device, in evaluation mode.
        adapter: with its tensors under the names that PEFT gives them in `model`; not to be read from.
        names: where each stored tensor goes in it.
        config_edits: keys of config.json with their new values.
        notes: what the user should know, one sentence each.
        is_resized: whether the vocabulary is not the base's.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    adapter: Adapter
    names: StoredNames
    config_edits: Mapping[str, Any]
    notes: tuple[str, ...]
    is_resized: bool


def decide_form(checkpoint: Checkpoint, adapter: Adapter) -> Form:
    """Return the form of the merge of `adapter` into `checkpoint`.

    Raises:
        BrokenCheckpoint: config.json is incomplete or of another model.
        UnsupportedCheckpoint: quantised, or of a class that transformers does not have.
        UnsupportedAdapter: transformers has no class for the adapter's task.
        AdapterMismatch: the adapter's own embeddings contradict each other, or its names fit several parts of the base.
    """
    own_class, config = _own_class(checkpoint)
    model_class = choose_class(own_class, config, adapter)
    model = empty_model(model_class, config)
    adapter = _under_own_names(model, adapter)
    labels = find_labels(model, adapter)
    edits = dict(labels.edits) if labels else {}
    if labels is not None and labels.count != config.num_labels:
        config.num_labels = labels.count
        model = empty_model(model_class, config)
    notes: list[str] = []
    if model_class is not own_class:
        edits["architectures"] = [model_class.__name__]
        strange = map_names(model, checkpoint.tensors).unknown
        left_out = _replaced(own_class, config, strange, checkpoint) if adapter.task_type in HEADED else ()
        checkpoint = view(checkpoint, dropped=left_out)
        notes.append(_departure(own_class, model_class, left_out, [name for name in strange if name not in left_out]))
    names = map_names(model, checkpoint.tensors)
    resized = resized_config(model, adapter)
    if resized is not None:
        rows = resized.get_text_config().vocab_size
        notes.append(f"The vocabulary has {rows} rows as in the adapter, not {config.get_text_config().vocab_size}.")
        edits["vocab_size"] = rows
        model = empty_model(model_class, resized)
        checkpoint = view(checkpoint, cut=_cut(model, checkpoint, names))
    return Form(
        checkpoint=checkpoint,
        model=model,
        adapter=adapter,
        names=names,
        config_edits=edits,
        notes=tuple(notes),
        is_resized=resized is not None,
    )


def grows(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether a stored shape becomes the wanted one by growing in one dimension."""
    pairs = list(zip(stored, wanted, strict=False))
    return len(stored) == len(wanted) and sum(a < b for a, b in pairs) == 1 and all(a <= b for a, b in pairs)


def _own_class(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    raw = read_config(checkpoint.root)
    architecture = next(iter(raw.get("architectures") or ()), None)
    model_class = getattr(transformers, str(architecture), None)
    check_plain(raw, checkpoint.tensors)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise UnsupportedCheckpoint(
            f"The base's architecture is {architecture!r}, which this transformers has no class for.",
            why="Code that comes with a model is never run.",
            fix="Use a base whose architecture is part of transformers, or a newer release of this action.",
        )
    try:
        return model_class, AutoConfig.from_pretrained(str(checkpoint.root), trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise unbuildable(model_class, error) from error


def _under_own_names(model: PreTrainedModel, adapter: Adapter) -> Adapter:
    naming = name_adapter(model, adapter.config, adapter.tensors)
    tensors = {naming.names[name]: tensor for name, tensor in adapter.tensors.items()}
    return replace(adapter, tensors=tensors, config={**adapter.config, **naming.config})


def _replaced(
    own_class: type[PreTrainedModel], config: PretrainedConfig, unknown: tuple[str, ...], checkpoint: Checkpoint
) -> tuple[str, ...]:
    """Return which of the `unknown` tensors are the head of the base's own class, whose place another head takes."""
    own = empty_model(own_class, config)
    mine = map_names(own, checkpoint.tensors)
    homes = {name: key for key, name in mine.renamed.items()}
    homes |= {name: key for key, names in mine.converted.items() for name in names}
    return tuple(name for name in unknown if name in homes and _is_of_head(own, homes[name]))


def _is_of_head(model: PreTrainedModel, key: str) -> bool:
    """Return whether a parameter lies outside the body, which is what classes of other tasks have in common."""
    if hasattr(model, model.base_model_prefix):
        return not key.startswith(f"{model.base_model_prefix}.")
    head = model.get_output_embeddings()
    return head is not None and model.get_submodule(key.rpartition(".")[0]) is head


def _departure(
    own: type[PreTrainedModel], new: type[PreTrainedModel], left_out: Sequence[str], kept: Sequence[str]
) -> str:
    text = f"The adapter was trained on a {new.__name__}: that is what the release is, not a {own.__name__}"
    if left_out:
        text += f"; left out: the base's own head, {_first_of(left_out)}"
    if kept:
        text += f"; kept, although a {new.__name__} does not know it: {_first_of(kept)}"
    return f"{text}."


def _first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if names[1:] else "")


def _cut(model: PreTrainedModel, checkpoint: Checkpoint, names: StoredNames) -> dict[str, tuple[int, ...]]:
    """Return the new shapes of the stored tensors that lose their last rows."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    cut = {}
    for key, stored in names.renamed.items():
        before, after = checkpoint.tensors[stored].shape, shapes[key]
        # Only then are the rows that stay the first bytes: (V, …), or the bias (1, V) of an encoder-decoder.
        is_prefix = before[1:] == after[1:] or (len(before) == 2 and before[0] == after[0] == 1)
        if before != after and is_prefix and grows(after, before):
            cut[stored] = after
    return cut
